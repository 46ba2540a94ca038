//! Errors that cross the PJRT boundary: ours, and the inner plugin's.
//!
//! `PJRT_Error` is opaque, so an error we make is a box of ours in disguise. The set [`OURS`]
//! tells the two apart, so that the framework can read and destroy either.

use std::collections::HashSet;
use std::ffi::{c_char, c_void};
use std::fmt;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use parking_lot::Mutex;
use pjrt_sys::*;

use crate::plugin::plugin;

/// An error on its way to the framework.
#[derive(Debug)]
pub enum Error {
    /// Made here.
    Own {
        /// What kind of error.
        code: PJRT_Error_Code,
        /// What the user reads.
        message: String,
    },
    /// Made by the inner plugin; owned.
    Inner(*mut PJRT_Error),
}

impl Error {
    /// The caller passed something wrong.
    pub fn invalid(message: impl Into<String>) -> Error {
        Error::Own {
            code: PJRT_Error_Code_INVALID_ARGUMENT,
            message: message.into(),
        }
    }

    /// Something is missing or in the wrong state.
    pub fn precondition(message: impl Into<String>) -> Error {
        Error::Own {
            code: PJRT_Error_Code_FAILED_PRECONDITION,
            message: message.into(),
        }
    }

    /// We do not support this (yet).
    pub fn unimplemented(message: impl Into<String>) -> Error {
        Error::Own {
            code: PJRT_Error_Code_UNIMPLEMENTED,
            message: message.into(),
        }
    }

    /// A bug of ours.
    pub fn internal(message: impl Into<String>) -> Error {
        Error::Own {
            code: PJRT_Error_Code_INTERNAL,
            message: message.into(),
        }
    }

    /// Forgets the error.
    pub fn discard(self) {
        if let Error::Inner(error) = self {
            let mut args = crate::inner::call::new_args::<PJRT_Error_Destroy_Args>();
            args.error = error;
            // SAFETY: owned, and destroyed once.
            unsafe { destroy(&mut args) };
        }
    }

    /// What it says.
    pub fn into_text(self) -> String {
        let text = self.to_string();
        self.discard();
        text
    }

    /// The pointer to return to the framework, which destroys it.
    pub fn into_raw(self) -> *mut PJRT_Error {
        match self {
            Error::Inner(error) => error,
            Error::Own { code, message } => {
                let raw = Box::into_raw(Box::new(Own { code, message }));
                OURS.lock().insert(raw as usize);
                raw.cast()
            }
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Own { message, .. } => f.write_str(message),
            Error::Inner(error) => f.write_str(&inner_message(*error)),
        }
    }
}

struct Own {
    code: PJRT_Error_Code,
    message: String,
}

static OURS: LazyLock<Mutex<HashSet<usize>>> = LazyLock::new(Mutex::default);

/// Our box behind `error`, if it is ours.
///
/// # Safety
/// `error` must be live.
unsafe fn own<'a>(error: *const PJRT_Error) -> Option<&'a Own> {
    let ours = OURS.lock().contains(&(error as usize));
    // SAFETY: only `into_raw` puts addresses into the set, and `destroy` takes them out.
    ours.then(|| unsafe { &*error.cast::<Own>() })
}

/// The message of an inner error.
pub fn inner_message(error: *const PJRT_Error) -> String {
    let Some(function) = plugin().inner.api().PJRT_Error_Message else {
        return String::new();
    };
    let mut args = crate::inner::call::new_args::<PJRT_Error_Message_Args>();
    args.error = error;
    // SAFETY: a live error of the inner plugin.
    unsafe { function(&mut args) };
    // SAFETY: the plugin filled in a string that lives as long as the error.
    let bytes = unsafe { crate::inner::call::bytes(args.message, args.message_size) };
    String::from_utf8_lossy(bytes).into_owned()
}

/// `PJRT_Error_Destroy`
pub unsafe extern "C" fn destroy(args: *mut PJRT_Error_Destroy_Args) {
    // SAFETY: the framework passes valid arguments.
    let error = unsafe { (*args).error };
    if OURS.lock().remove(&(error as usize)) {
        // SAFETY: made by `into_raw`, and destroyed once.
        drop(unsafe { Box::from_raw(error.cast::<Own>()) });
    } else if let Some(function) = plugin().inner.api().PJRT_Error_Destroy {
        // SAFETY: not ours, so the inner plugin's.
        unsafe { function(args) };
    }
}

/// `PJRT_Error_Message`
pub unsafe extern "C" fn message(args: *mut PJRT_Error_Message_Args) {
    // SAFETY: the framework passes valid arguments with a live error.
    unsafe {
        if let Some(own) = own((*args).error) {
            (*args).message = own.message.as_ptr().cast::<c_char>();
            (*args).message_size = own.message.len();
        } else if let Some(function) = plugin().inner.api().PJRT_Error_Message {
            function(args);
            crate::pjrt::event::message_was_read(crate::inner::call::bytes(
                (*args).message,
                (*args).message_size,
            ));
        }
    }
}

/// `PJRT_Error_GetCode`
pub unsafe extern "C" fn get_code(args: *mut PJRT_Error_GetCode_Args) -> *mut PJRT_Error {
    // SAFETY: the framework passes valid arguments with a live error.
    unsafe {
        if let Some(own) = own((*args).error) {
            (*args).code = own.code;
            return std::ptr::null_mut();
        }
        match plugin().inner.api().PJRT_Error_GetCode {
            Some(function) => function(args),
            None => std::ptr::null_mut(),
        }
    }
}

/// The beginning of the arguments of `PJRT_Error_ForEachPayload`, which our header does not have yet.
#[repr(C)]
pub struct ForEachPayloadArgs {
    struct_size: usize,
    extension_start: *mut PJRT_Extension_Base,
    error: *const PJRT_Error,
}

/// The inner plugin's function.
static FOR_EACH_PAYLOAD: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Says what the inner plugin has in the table.
pub fn for_each_payload_by(inner: *const c_void) {
    FOR_EACH_PAYLOAD.store(inner.cast_mut(), Ordering::Release);
}

/// `PJRT_Error_ForEachPayload`; our errors have none.
pub unsafe extern "C" fn for_each_payload(args: *mut ForEachPayloadArgs) -> *mut PJRT_Error {
    type Function = unsafe extern "C" fn(*mut ForEachPayloadArgs) -> *mut PJRT_Error;
    // SAFETY: the framework passes valid arguments with a live error.
    if unsafe { own((*args).error) }.is_some() {
        return std::ptr::null_mut();
    }
    let inner = FOR_EACH_PAYLOAD.load(Ordering::Acquire);
    if inner.is_null() {
        return std::ptr::null_mut();
    }
    // SAFETY: the entry of the inner table, which has this type; the error is the inner plugin's.
    unsafe { std::mem::transmute::<*mut c_void, Function>(inner)(args) }
}
