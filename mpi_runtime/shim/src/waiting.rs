//! How a rank waits for MPI.
//!
//! Blocking calls are the fastest, but some MPIs (MPICH 4.0) never yield in them: with more ranks
//! than cores a waiting rank then keeps its peer from running. Nonblocking calls and a loop of our
//! own do the same and yield.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};

use mpi::ffi;

use crate::code::SUCCESS;

/// Whether to give up the core while waiting; see [`mpi_shim_abi::ShimApi::configure`].
pub(crate) static YIELDING: AtomicBool = AtomicBool::new(false);

/// Tests before the core is given up for the first time.
const SPINS: u32 = 64;

/// Whether to give up the core while waiting.
#[inline]
pub(crate) fn yielding() -> bool {
    YIELDING.load(Ordering::Relaxed)
}

/// Tests until the request is complete, giving up the core between tests.
///
/// # Safety
/// The request must be live or null.
#[inline]
pub(crate) unsafe fn wait(request: &mut ffi::MPI_Request, status: &mut ffi::MPI_Status) -> c_int {
    if !yielding() {
        // SAFETY: the request is live or null, as this function demands.
        return unsafe { ffi::MPI_Wait(request, status) };
    }
    // SAFETY: as above; MPI sets it to null when it is complete, and then it is not tested again.
    until(|done| unsafe { ffi::MPI_Test(request, done, status) })
}

/// Calls `test` until it fails or sets its flag, giving up the core between calls.
pub(crate) fn until(mut test: impl FnMut(&mut c_int) -> c_int) -> c_int {
    let mut tests = 0;
    loop {
        let mut done = 0;
        let code = test(&mut done);
        if code != SUCCESS || done != 0 {
            return code;
        }
        if tests < SPINS {
            tests += 1;
        } else {
            std::thread::yield_now();
        }
    }
}
