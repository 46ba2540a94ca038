//! Operations that the engine has checked; what makes the rest of the shim safe to call.

use std::ops::Deref;

use mpi_shim_abi::ShimOp;

/// An operation whose communicator is live, whose buffers are valid for its counts and types, whose
/// lists of counts have a number for each rank, none negative and with a sum that fits, and whose
/// status is null or an `MPI_Status`; all of that until the operation has been executed.
#[derive(Clone, Copy)]
pub(crate) struct Checked<'a>(&'a ShimOp);

impl<'a> Checked<'a> {
    /// Vouches for an operation.
    ///
    /// # Safety
    /// It must be as the type says.
    pub(crate) unsafe fn new(op: &'a ShimOp) -> Checked<'a> {
        Checked(op)
    }
}

impl Deref for Checked<'_> {
    type Target = ShimOp;

    fn deref(&self) -> &ShimOp {
        self.0
    }
}
