//! The one boundary for calls from C: no panic crosses it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pjrt_sys::PJRT_Error;

use crate::error::Error;

/// Runs the body of a PJRT function; null means success.
pub fn pjrt(body: impl FnOnce() -> Result<(), Error>) -> *mut PJRT_Error {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => std::ptr::null_mut(),
        Ok(Err(error)) => error.into_raw(),
        Err(panic) => Error::internal(panic_text(&*panic)).into_raw(),
    }
}

/// Runs a body that cannot report; a panic becomes `fallback` and a line on standard error.
pub fn quiet<T>(fallback: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        eprintln!("{}", panic_text(&*panic));
        fallback
    })
}

/// What a panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("unknown");
    format!("mpi_cuda: internal error (a bug, please report it): {text}")
}
