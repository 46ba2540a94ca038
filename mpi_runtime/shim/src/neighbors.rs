//! Collectives between neighbours in the topology of a communicator (MPI 4.0, section 8.6).

use std::ffi::{c_int, c_void};

use mpi::ffi;
use mpi_shim_abi::{Kind, ShimOp};

use crate::checked::Checked;
use crate::code::{SUCCESS, attempt};
use crate::collective::{self, Call};
use crate::handle::comm_from_bits;
use crate::large;
use crate::topology::{degrees, may_be_confused, own_neighbors};

/// Executes one of them, if the topology has as many neighbours as there is room for; else
/// `MPI_ERR_TOPOLOGY`.
pub(crate) fn run(op: Checked<'_>) -> c_int {
    let (mut sources, mut destinations) = (0, 0);
    attempt! { degrees(comm_from_bits(op.comm), &mut sources, &mut destinations); };
    if (sources, destinations) != (op.sources, op.destinations) {
        return ffi::MPI_ERR_TOPOLOGY as c_int;
    }
    // MPICH asks for an address even of a rank that has no neighbour.
    let mut nothing = 0u128;
    let nowhere: *mut c_void = (&raw mut nothing).cast();
    let placed = ShimOp {
        send: if op.send.is_null() { nowhere } else { op.send },
        recv: if op.recv.is_null() { nowhere } else { op.recv },
        ..*op
    };
    // SAFETY: an array is only null if it has no elements: blocks of none, or no blocks.
    let op = unsafe { Checked::new(&placed) };
    if op.kind == Kind::NeighborAlltoall && op.count > 0 && may_be_confused(op) {
        return gather_and_choose(op);
    }
    attempt! { run_whole(op); };
    if op.kind == Kind::NeighborAlltoall && op.count > 0 {
        swap_own(op);
    }
    SUCCESS
}

fn run_whole(op: Checked<'_>) -> c_int {
    if large::is_large(op) {
        large::in_parts(op)
    } else {
        collective::run(op.kind, &Call::of(op))
    }
}

/// `MPI_Neighbor_alltoall` of a Cartesian topology, whose neighbours may be one rank: each sends
/// all that it has to all, so that MPI cannot confuse blocks.
fn gather_and_choose(op: Checked<'_>) -> c_int {
    let blocks = op.sources as usize;
    let bytes = op.count as usize * op.datatype.size();
    // Zeros, as the result is before, where no neighbour is.
    let mut all = vec![0u128; (blocks * blocks * bytes).div_ceil(size_of::<u128>())];
    let gather = ShimOp {
        kind: Kind::NeighborAllgather,
        count: op.count * blocks as i64,
        recv_count: op.count * blocks as i64,
        recv: all.as_mut_ptr().cast(),
        ..*op
    };
    // SAFETY: `send` has a block for each neighbour, and `all` room for all blocks of each.
    attempt! { run_whole(unsafe { Checked::new(&gather) }); };
    for place in 0..blocks {
        // The neighbour before comes first in its dimension, and sends this rank its second block.
        let block = place * blocks + (place ^ 1);
        let to = collective::after(op.recv, (place * bytes) as i64).cast_mut();
        // SAFETY: both lie within their memory, which is apart.
        unsafe {
            let from = all.as_ptr().cast::<u8>().add(block * bytes);
            to.cast::<u8>().copy_from_nonoverlapping(from, bytes);
        }
    }
    SUCCESS
}

/// What a rank sends to itself in a dimension that closes after one rank: the block for the one
/// before comes from the one behind. MPICH up to 5.0 matches the messages of several such
/// dimensions in another order.
fn swap_own(op: Checked<'_>) {
    let bytes = op.count as usize * op.datatype.size();
    for dimension in own_neighbors(op) {
        for (from, to) in [
            (2 * dimension, 2 * dimension + 1),
            (2 * dimension + 1, 2 * dimension),
        ] {
            let from = collective::after(op.send, (from * bytes) as i64);
            let to = collective::after(op.recv, (to * bytes) as i64).cast_mut();
            // SAFETY: both buffers have a block for each of the neighbours, two in a dimension, and
            // do not overlap; they are memory of the host's (`transfer/direct.rs`).
            unsafe { to.cast::<u8>().copy_from_nonoverlapping(from.cast(), bytes) };
        }
    }
}
