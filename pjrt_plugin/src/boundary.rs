//! The one boundary for calls from C: no panic crosses it.

#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use mpi_runtime::log;
use pjrt_sys::PJRT_Error;

use crate::error::Error;

/// Runs the body of a PJRT function; null means success.
pub fn pjrt(body: impl FnOnce() -> Result<(), Error>) -> *mut PJRT_Error {
    match guarded(body) {
        Ok(()) => std::ptr::null_mut(),
        Err(error) => error.into_raw(),
    }
}

/// Runs a body; a panic becomes an error.
#[inline]
pub fn guarded<T>(body: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(Error::panicked(&*panic)))
}

/// Runs a body that cannot report; a panic becomes `fallback` and a line on standard error.
pub fn quiet<T>(fallback: T, body: impl FnOnce() -> T) -> T {
    guarded(|| Ok(body())).unwrap_or_else(|error| {
        log::line(&error.bare());
        fallback
    })
}
