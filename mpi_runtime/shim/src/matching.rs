//! Which message a receive gets, where tags carry codes of element types.
//!
//! MPI keeps the order of messages from one sender only among those whose whole tags a receive
//! accepts (MPI 4.0, section 3.5). With the code in its tag, a message of the wrong type would be
//! overtaken by the next right one. So messages are taken as they come, whatever their tags. Those
//! that another receive must get are kept, in the order in which they came.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::{Mutex, TryLockError};

use mpi::ffi;
use mpi_shim_abi::{ANY, CODE_BITS, PROC_NULL, ShimOp};

use crate::code::{SUCCESS, attempt};
use crate::handle::comm_from_bits;
use crate::messages::rank;

/// A message that came before the one which a receive took.
struct Early {
    comm: u64,
    message: ffi::MPI_Message,
    status: ffi::MPI_Status,
}

// SAFETY: a message's handle and its status are plain data; MPI runs with `MPI_THREAD_MULTIPLE`.
unsafe impl Send for Early {}

impl Early {
    #[inline]
    fn is_for(&self, op: &ShimOp) -> bool {
        let from = op.source == ANY || op.source == self.status.MPI_SOURCE;
        self.comm == op.comm && from && has_tag(op, &self.status)
    }
}

/// Of all communicators. While it is locked no other message is taken, or one of another thread's
/// could be taken between a message and its place here.
static EARLY: Mutex<Vec<Early>> = Mutex::new(Vec::new());

/// Takes the message that `op` would receive out of the queue, if one is there.
///
/// # Safety
/// The communicator of `op` must be live.
#[inline]
pub(crate) unsafe fn take(
    op: &ShimOp,
    found: &mut c_int,
    message: &mut ffi::MPI_Message,
    status: &mut ffi::MPI_Status,
) -> c_int {
    let (source, comm) = (rank(op.source), comm_from_bits(op.comm));
    if op.recv_code == 0 || op.source == PROC_NULL {
        let tag = if op.recv_tag == ANY {
            ffi::MPI_ANY_TAG
        } else {
            op.recv_tag
        };
        // SAFETY: as this function demands.
        return unsafe { ffi::MPI_Improbe(source, tag, comm, found, message, status) };
    }
    *found = 0;
    // Who waits here would wait for another thread to be woken; the caller looks again.
    let mut early = match EARLY.try_lock() {
        Ok(early) => early,
        Err(TryLockError::Poisoned(early)) => early.into_inner(),
        Err(TryLockError::WouldBlock) => return SUCCESS,
    };
    if let Some(place) = early.iter().position(|early| early.is_for(op)) {
        let first = early.remove(place);
        (*found, *message, *status) = (1, first.message, first.status);
        return SUCCESS;
    }
    loop {
        attempt! {
            // SAFETY: as above.
            unsafe { ffi::MPI_Improbe(source, ffi::MPI_ANY_TAG, comm, found, message, status) };
        };
        if *found == 0 || has_tag(op, status) {
            return SUCCESS;
        }
        // SAFETY: an `MPI_Message` is an integer or a pointer, for which zero bytes are valid.
        let none = unsafe { MaybeUninit::zeroed().assume_init() };
        early.push(Early {
            comm: op.comm,
            message: std::mem::replace(message, none),
            status: *status,
        });
    }
}

/// Whether a message has the tag that `op` receives, whatever its code.
#[inline]
fn has_tag(op: &ShimOp, status: &ffi::MPI_Status) -> bool {
    op.recv_tag == ANY || op.recv_tag == status.MPI_TAG >> CODE_BITS
}
