//! Operations larger than MPI takes in one call: its counts are C `int` (MPI 4.0, section 2.5.8),
//! and inside MPIs products of counts and sizes overflow earlier. Collectives go in parts, which
//! every rank cuts in the same way; a message stays one message, of a datatype that is as long as
//! it.

use std::ffi::c_int;
use std::sync::atomic::{AtomicI64, Ordering};

use mpi::ffi;
use mpi_shim_abi::{Kind, ShimOp};

use crate::checked::Checked;
use crate::code::{SUCCESS, attempt};
use crate::collective::{Call, Counted, after, run};
use crate::datatype::{datatype, spaced};
use crate::handle::comm_from_bits;

/// Bytes of one call, over all ranks where the kind gathers or scatters.
pub(crate) static PART: AtomicI64 = AtomicI64::new(1 << 30);

/// Whether a collective must go in parts.
pub(crate) fn is_large(op: Checked<'_>) -> bool {
    let bytes = op.count.saturating_mul(op.datatype.size() as i64);
    bytes.saturating_mul(ranks_in_a_call(op)) > PART.load(Ordering::Relaxed)
}

fn ranks_in_a_call(op: Checked<'_>) -> i64 {
    if op.kind.has_blocks() {
        i64::from(size(op))
    } else {
        1
    }
}

pub(crate) fn size(op: Checked<'_>) -> c_int {
    let mut size = 1;
    // SAFETY: the communicator of a checked operation is live.
    unsafe { ffi::MPI_Comm_size(comm_from_bits(op.comm), &mut size) };
    size
}

/// Executes a collective in parts.
pub(crate) fn in_parts(op: Checked<'_>) -> c_int {
    if op.kind == Kind::ReduceScatter {
        return reduce_each(op);
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
            Kind::Allgather | Kind::Gather | Kind::NeighborAllgather => (plain, apart),
            Kind::Scatter => (apart, plain),
            Kind::Alltoall | Kind::NeighborAlltoall => (apart, apart),
            _ => (plain, plain),
        };
        // SAFETY: `count` elements from `start` on, of every rank's block, lie in the buffers.
        let call = unsafe { Call::of(op).part(start * element, sent, received) };
        attempt! { run(op.kind, &call); };
        start += count;
    }
    SUCCESS
}

/// A reduction to each rank in turn.
fn reduce_each(op: Checked<'_>) -> c_int {
    let mut rank = 0;
    // SAFETY: the communicator of a checked operation is live.
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
        // SAFETY: the operand has a block of `count` elements for each rank, and the result has
        // one.
        attempt! { in_parts(unsafe { Checked::new(&reduce) }); };
    }
    SUCCESS
}
