//! How XLA calls a custom call: one function makes a handler from a body without raw pointers, and
//! answers what XLA asks of every handler.

use std::ptr::NonNull;

use pjrt_sys::*;

use super::frame::Frame;
use crate::boundary::guarded;
use crate::error::Error;

/// An FFI handler as XLA calls it (`xla/ffi/api/c_api.h`, XLA_FFI_Handler).
pub type Handler = unsafe extern "C" fn(*mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error;

/// The handler that runs `body`: a function, or a closure that captures nothing, since XLA passes a
/// handler no data.
pub const fn handler<F: Fn(&Frame<'_>) -> Result<(), Error> + Copy>(_body: F) -> Handler {
    const { assert!(size_of::<F>() == 0) };
    run::<F>
}

/// No panic leaves it, and its error is the custom call's.
unsafe extern "C" fn run<F: Fn(&Frame<'_>) -> Result<(), Error>>(
    frame: *mut XLA_FFI_CallFrame,
) -> *mut XLA_FFI_Error {
    // SAFETY: XLA passes a valid frame. A body without data lies anywhere, and `handler` was given
    // one.
    let (frame, body) = unsafe {
        if answer_metadata(frame) {
            return std::ptr::null_mut();
        }
        (Frame::new(&*frame), NonNull::<F>::dangling().as_ref())
    };
    match guarded(|| body(&frame)) {
        Ok(()) => std::ptr::null_mut(),
        Err(error) => frame.error(&error.to_string()),
    }
}

/// XLA asks each handler for its API version before it accepts it; the right answer is the
/// version of the frame itself, whatever headers we were built with.
///
/// # Safety
/// `frame` must be what XLA passed.
pub unsafe fn answer_metadata(frame: *mut XLA_FFI_CallFrame) -> bool {
    // SAFETY: XLA passes a valid frame; a metadata extension has the layout of its type.
    unsafe {
        let extension = (*frame).extension_start;
        if extension.is_null() || (*extension).type_ != XLA_FFI_Extension_Metadata {
            return false;
        }
        let metadata = (*extension.cast::<XLA_FFI_Metadata_Extension>()).metadata;
        let version = &(*(*frame).api).api_version;
        (*metadata).api_version.major_version = version.major_version;
        (*metadata).api_version.minor_version = version.minor_version;
        (*metadata).traits = 0;
        true
    }
}
