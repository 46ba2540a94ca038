//! Errors as the framework reads and destroys them: ours, and the inner plugin's.

use std::ffi::c_char;

use pjrt_sys::*;

use crate::boundary::quiet;
use crate::error::{find_own, take_own};
use crate::inner::api;
use crate::inner::call::bytes;
use crate::inner::library::newer;
use crate::launch::completion;
use crate::pjrt::newer::FOR_EACH_PAYLOAD;

/// `PJRT_Error_Destroy`
pub unsafe extern "C" fn destroy(args: *mut PJRT_Error_Destroy_Args) {
    quiet((), || {
        // SAFETY: the framework passes valid arguments with an error that it has got, and not
        // destroyed. What is not ours is the inner plugin's.
        unsafe {
            if take_own((*args).error).is_none()
                && let Some(function) = api().PJRT_Error_Destroy
            {
                function(args);
            }
        }
    });
}

/// `PJRT_Error_Message`
pub unsafe extern "C" fn message(args: *mut PJRT_Error_Message_Args) {
    quiet((), || {
        // SAFETY: the framework passes valid arguments with a live error; the text lives as long.
        unsafe {
            if let Some(own) = find_own((*args).error) {
                (*args).message = own.message.as_ptr().cast::<c_char>();
                (*args).message_size = own.message.len();
            } else if let Some(function) = api().PJRT_Error_Message {
                function(args);
                completion::message_was_read(bytes((*args).message, (*args).message_size));
            }
        }
    });
}

/// `PJRT_Error_GetCode`
pub unsafe extern "C" fn get_code(args: *mut PJRT_Error_GetCode_Args) -> *mut PJRT_Error {
    // SAFETY: the framework passes valid arguments with a live error.
    unsafe {
        if let Some(own) = find_own((*args).error) {
            (*args).code = own.code;
            return std::ptr::null_mut();
        }
        match api().PJRT_Error_GetCode {
            Some(function) => function(args),
            None => std::ptr::null_mut(),
        }
    }
}

/// The beginning of the arguments of `PJRT_Error_ForEachPayload`, which our header does not have
/// yet.
#[repr(C)]
pub struct ForEachPayloadArgs {
    struct_size: usize,
    extension_start: *mut PJRT_Extension_Base,
    error: *const PJRT_Error,
}

/// `PJRT_Error_ForEachPayload`; our errors have none.
pub unsafe extern "C" fn for_each_payload(args: *mut ForEachPayloadArgs) -> *mut PJRT_Error {
    // SAFETY: the framework passes valid arguments with a live error. In that place of the inner
    // table is the function of these arguments, and what is not ours is the inner plugin's.
    unsafe {
        match newer(FOR_EACH_PAYLOAD) {
            Some(function) if find_own((*args).error).is_none() => function(args),
            _ => std::ptr::null_mut(),
        }
    }
}
