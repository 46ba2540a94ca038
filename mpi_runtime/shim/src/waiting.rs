//! How a rank waits for MPI.
//!
//! Blocking calls are the fastest, but some MPIs (MPICH 4.0) never yield in them: with more ranks
//! than cores a waiting rank then keeps its peer from running. Nonblocking calls and a loop of our
//! own do the same and yield.

use std::ffi::c_int;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mpi::ffi;
use mpi_shim_abi::{GIVEN_UP, Idle, ShimOp};

use crate::code::SUCCESS;

/// Whether to give up the core while waiting; see [`mpi_shim_abi::ShimApi::configure`].
pub(crate) static YIELDING: AtomicBool = AtomicBool::new(false);

/// What to do while a message is waited for; see [`Idle`].
pub(crate) static IDLE: OnceLock<Idle> = OnceLock::new();

/// Tests before [`IDLE`] is called for the first time, and between calls.
const TESTS: u32 = 256;

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

/// Calls `test` until it fails or sets its flag, or [`IDLE`] gives up waiting for a message of
/// `op`.
pub(crate) fn until_given_up(op: &ShimOp, mut test: impl FnMut(&mut c_int) -> c_int) -> c_int {
    let yielding = yielding();
    let (mut tests, mut since) = (0, None);
    loop {
        let mut done = 0;
        let code = test(&mut done);
        if code != SUCCESS || done != 0 {
            return code;
        }
        tests += 1;
        if yielding && tests > SPINS {
            std::thread::yield_now();
        }
        if tests % TESTS == 0 {
            let waited = since.get_or_insert_with(Instant::now).elapsed();
            let waited = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
            if IDLE.get().is_some_and(|idle| idle(op, waited) != 0) {
                return GIVEN_UP;
            }
            if waited > 1000 {
                // From now on the engine decides how to wait.
                tests = TESTS - 1;
            }
        }
    }
}
