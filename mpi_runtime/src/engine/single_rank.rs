//! A world of size 1 without any MPI: every collective is a copy.

use std::ptr;

use mpi_shim_abi::{Kind, PROC_NULL};

use crate::engine::identity;
use crate::error::Failure;
use crate::operation::Operation;

/// Executes `op` in a world of one rank.
pub fn execute(op: &Operation<'_>) -> Result<(), Failure> {
    match op.kind {
        Kind::Barrier => Ok(()),
        kind if kind.is_message() && to_nobody(op) => {
            clear(op);
            Ok(())
        }
        kind if kind.is_message() => Err(
            "a message to this rank itself needs an MPI, and none was found; install one, or skip \
             the message in a world of size 1"
                .into(),
        ),
        kind if kind.has_neighbors() => {
            Err("neighbours are those of a communicator with a topology, which needs an MPI".into())
        }
        Kind::Exscan => {
            nothing_before(op);
            Ok(())
        }
        _ => {
            copy_through(op);
            Ok(())
        }
    }
}

/// The result of `exscan` where no rank is before this one.
pub fn nothing_before(op: &Operation<'_>) {
    if let Some(reduction) = op.reduction {
        identity::fill(&op.recv, reduction);
    }
}

/// Whether all peers of a message are `PROC_NULL`.
fn to_nobody(op: &Operation<'_>) -> bool {
    (!op.kind.sends() || op.dest == PROC_NULL) && (!op.kind.receives() || op.source == PROC_NULL)
}

/// Fills the result with zeros.
fn clear(op: &Operation<'_>) {
    if op.kind.has_result() {
        op.recv.clear_from(0);
    }
}

/// Copies the operand to the result, if there is one; both have the same size (checked before).
pub fn copy_through(op: &Operation<'_>) {
    let (from, to) = (op.send, op.recv);
    debug_assert_eq!(from.bytes(), to.bytes());
    if !to.data().is_null() && !ptr::eq(from.data(), to.data()) {
        // SAFETY: the result is as large as the operand, and XLA gives results memory of their own
        // where it is not exactly the operand's.
        unsafe { from.copy_to(to.data().cast()) };
    }
}
