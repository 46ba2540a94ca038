//! Targets and callbacks that the framework's Python registers (`ffi/forward.rs`,
//! `ffi/callbacks.rs`).

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::NonNull;

use super::answer::fail;
use crate::boundary::quiet;
use crate::error::Error;
use crate::ffi::callbacks::{self, Trampoline};
use crate::ffi::{self, Handler};

/// Forwards an FFI target of another package; a null handler is refused when it is called.
///
/// # Safety
/// `name` must be NUL-terminated, `handler` an XLA FFI handler or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_register_ffi_target(
    name: *const c_char,
    handler: Option<Handler>,
) -> c_int {
    quiet(-1, || {
        // SAFETY: the caller's name is NUL-terminated.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        ffi::register_foreign(&name, handler).map_or_else(fail, |()| 0)
    })
}

/// Registers a function of the custom calls before XLA's FFI under a target name, and has the FFI
/// handler that calls it; null on error.
///
/// # Safety
/// `name` must be NUL-terminated. `function` must stay, and take what its callers' API version of
/// custom calls says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_register_untyped_target(
    name: *const c_char,
    function: *mut c_void,
) -> *mut c_void {
    quiet(std::ptr::null_mut(), || {
        // SAFETY: the caller's name is NUL-terminated.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let registered = match NonNull::new(function) {
            // SAFETY: the caller's promise.
            Some(function) => unsafe { ffi::register_untyped(&name, function) },
            None => Err(Error::invalid(format!(
                "the custom call {name} has no function"
            ))),
        };
        registered.map_or_else(
            |error| {
                fail(error);
                std::ptr::null_mut()
            },
            |handler| handler as *mut c_void,
        )
    })
}

/// Installs the function that calls Python callbacks; null removes it.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_set_trampoline(trampoline: Option<Trampoline>) {
    quiet((), || callbacks::set_trampoline(trampoline));
}
