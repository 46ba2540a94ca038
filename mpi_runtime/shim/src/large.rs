//! Operations larger than MPI takes in one call: its counts are C `int` (MPI 4.0, section 2.5.8),
//! and inside MPIs products of counts and sizes overflow earlier. Collectives go in parts, which
//! every rank cuts in the same way; a message stays one message, of a datatype that is as long as
//! it.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicI64, Ordering};

use mpi::ffi;
use mpi_shim_abi::{Kind, ShimOp};

use crate::code::{SUCCESS, attempt};
use crate::collective::{Call, Counted, run};
use crate::datatype::{datatype, spaced};
use crate::handle::comm_from_bits;

/// Bytes of one call, over all ranks where the kind gathers or scatters.
pub(crate) static PART: AtomicI64 = AtomicI64::new(1 << 30);

/// Whether a collective must go in parts.
pub(crate) fn is_large(op: &ShimOp) -> bool {
    let bytes = op.count.saturating_mul(op.datatype.size() as i64);
    bytes.saturating_mul(ranks_in_a_call(op)) > PART.load(Ordering::Relaxed)
}

fn ranks_in_a_call(op: &ShimOp) -> i64 {
    if op.kind.has_blocks() {
        i64::from(size(op))
    } else {
        1
    }
}

fn size(op: &ShimOp) -> c_int {
    let mut size = 1;
    // SAFETY: a live communicator, as the engine promises.
    unsafe { ffi::MPI_Comm_size(comm_from_bits(op.comm), &mut size) };
    size
}

/// Executes a collective in parts.
///
/// # Safety
/// As for [`crate::execute::execute`].
pub(crate) unsafe fn in_parts(op: &ShimOp) -> c_int {
    if op.kind == Kind::ReduceScatter {
        // SAFETY: as the caller promises.
        return unsafe { reduce_each(op) };
    }
    let element = op.datatype.size() as i64;
    let stride = op.count * element;
    let most = (PART.load(Ordering::Relaxed) / element / ranks_in_a_call(op)).max(1);
    // Of equal size: MPICH 4.0 loses data of short messages whose datatype's extent is no C int.
    let parts = (op.count + most - 1) / most;
    let part = (op.count + parts - 1) / parts;
    let mut start = 0;
    while start < op.count {
        let count = part.min(op.count - start);
        let spaced = match spaced(count, op.datatype, stride) {
            Ok(spaced) => spaced,
            Err(code) => return code,
        };
        let plain = Counted {
            count: count as c_int,
            datatype: datatype(op.datatype),
        };
        let apart = Counted {
            count: 1,
            datatype: spaced.handle(),
        };
        let (sent, received) = match op.kind {
            Kind::Allgather | Kind::Gather => (plain, apart),
            Kind::Scatter => (apart, plain),
            Kind::Alltoall => (apart, apart),
            _ => (plain, plain),
        };
        let call = Call {
            send: after(op.send, start * element),
            recv: after(op.recv, start * element).cast_mut(),
            sent,
            received,
            ..Call::of(op)
        };
        // SAFETY: as the caller promises; each part lies inside the buffers.
        attempt! { unsafe { run(op.kind, &call) }; };
        start += count;
    }
    SUCCESS
}

/// A reduction to each rank in turn.
///
/// # Safety
/// As for [`in_parts`].
unsafe fn reduce_each(op: &ShimOp) -> c_int {
    let mut rank = 0;
    // SAFETY: as the caller promises.
    unsafe { ffi::MPI_Comm_rank(comm_from_bits(op.comm), &mut rank) };
    for root in 0..size(op) {
        let block = i64::from(root) * op.count * op.datatype.size() as i64;
        let reduce = ShimOp {
            kind: Kind::Reduce,
            send: after(op.send, block),
            recv: if root == rank {
                op.recv
            } else {
                std::ptr::null_mut()
            },
            root,
            ..*op
        };
        // SAFETY: as the caller promises; the block lies inside the operand.
        attempt! { unsafe { in_parts(&reduce) }; };
    }
    SUCCESS
}

fn after(start: *const c_void, bytes: i64) -> *const c_void {
    if start.is_null() {
        start
    } else {
        start.wrapping_byte_add(bytes as usize)
    }
}
