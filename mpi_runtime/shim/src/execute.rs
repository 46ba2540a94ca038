//! The operations themselves; the only MPI calls that wait on a peer.

#![forbid(unsafe_code)]

use std::ffi::c_int;

use mpi_shim_abi::ShimReceived;

use crate::checked::Checked;
use crate::collective::{self, Call};
use crate::large;
use crate::messages::exchange;
use crate::neighbors;
use crate::vector;

/// Executes `op`, whose buffers may be used again on return; returns MPI's code.
#[inline]
pub(crate) fn execute(op: Checked<'_>, received: &mut ShimReceived) -> c_int {
    *received = ShimReceived {
        source: -1,
        tag: -1,
        code: 0,
        bytes: -1,
    };
    match op.kind {
        kind if kind.is_message() => exchange(op, received),
        kind if kind.has_counts() => vector::run(op),
        kind if kind.has_neighbors() => neighbors::run(op),
        _ if large::is_large(op) => large::in_parts(op),
        _ => collective::run(op.kind, &Call::of(op)),
    }
}
