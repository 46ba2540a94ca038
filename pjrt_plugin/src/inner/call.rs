//! The one helper for calls into the inner plugin: it sizes the arguments, checks that the table
//! has the function, and turns errors into [`Error`].

use std::ffi::c_char;
use std::mem::size_of;

use pjrt_sys::PJRT_Error;

use super::library::api;
use crate::error::{Error, InnerError};

/// A function of the PJRT table.
pub type Function<Args> = Option<unsafe extern "C" fn(*mut Args) -> *mut PJRT_Error>;

/// Zeroed arguments with their `struct_size`, which is the first member of every PJRT struct
/// (`pjrt_c_api.h`, "struct_size").
pub fn new_args<Args>() -> Args {
    // SAFETY: PJRT argument structs are plain C data for which zero bytes are valid, and their
    // first member is the `size_t struct_size`.
    unsafe {
        let mut args: Args = std::mem::zeroed();
        std::ptr::from_mut(&mut args)
            .cast::<usize>()
            .write(size_of::<Args>());
        args
    }
}

/// Calls `function` of the inner plugin with arguments of ours, and has what it filled in.
///
/// # Safety
/// `fill` must make the arguments what the function asks for, with live handles of the inner
/// plugin and with pointers that outlive the call.
pub unsafe fn ask<Args>(
    function: Function<Args>,
    fill: impl FnOnce(&mut Args),
) -> Result<Args, Error> {
    let mut args = new_args::<Args>();
    fill(&mut args);
    // SAFETY: `fill` has made the arguments right.
    unsafe { call(function, &mut args) }.map(|()| args)
}

/// Calls `function` of the inner plugin.
///
/// # Safety
/// The arguments must be what the function asks for, with live handles of the inner plugin.
pub unsafe fn call<Args>(function: Function<Args>, args: *mut Args) -> Result<(), Error> {
    let Some(function) = function else {
        return Err(Error::unimplemented(format!(
            "the inner XLA plugin lacks the function for {}",
            std::any::type_name::<Args>()
        )));
    };
    // SAFETY: the caller has made the arguments right; the plugin gives its error away.
    match unsafe { InnerError::new(function(args), api()) } {
        None => Ok(()),
        Some(error) => Err(error.into()),
    }
}

/// A C byte string.
///
/// # Safety
/// `data` must be valid for `size` bytes for the lifetime chosen, or null.
pub unsafe fn bytes<'a>(data: *const c_char, size: usize) -> &'a [u8] {
    // SAFETY: bytes have no alignment and no invalid values, and there are `size` of them.
    unsafe { slice(data.cast(), size) }
}

/// A C array; null means empty.
///
/// # Safety
/// `data` must be valid for `size` elements for the lifetime chosen, or null.
pub unsafe fn slice<'a, T>(data: *const T, size: usize) -> &'a [T] {
    if data.is_null() || size == 0 {
        return &[];
    }
    // SAFETY: `data` is not null, so it is valid for `size` elements.
    unsafe { std::slice::from_raw_parts(data, size) }
}
