//! Collectives between neighbours in the topology of a communicator (MPI 4.0, section 8.6).

use std::ffi::{c_int, c_void};

use mpi::ffi;
use mpi_shim_abi::{Kind, ShimOp};

use crate::checked::Checked;
use crate::code::{SUCCESS, attempt};
use crate::collective::{self, Call};
use crate::handle::comm_from_bits;
use crate::large;
use crate::topology::{degrees, own_neighbors};

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
    attempt! {
        if large::is_large(op) {
            large::in_parts(op)
        } else {
            collective::run(op.kind, &Call::of(op))
        };
    };
    if op.kind == Kind::NeighborAlltoall && op.count > 0 {
        swap_own(op);
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
