//! Errors that cross the PJRT boundary: ours, and the inner plugin's.
//!
//! `PJRT_Error` is opaque, so an error of ours is a box in disguise. The set [`OURS`] tells the two
//! apart, so that the framework can read and destroy either (`pjrt/error.rs`).

use std::any::Any;
use std::collections::HashSet;
use std::fmt;
use std::ptr::NonNull;
use std::sync::LazyLock;

use mpi_runtime::OperationError;
use parking_lot::Mutex;
use pjrt_sys::*;

/// What our errors begin with, among the many texts that a user's program prints.
pub const PREFIX: &str = "mpi_cuda: ";

/// An error on its way to the framework. It is small, since results with it are moved often.
#[derive(Debug)]
pub enum Error {
    /// Made here.
    Own(Box<OwnError>),
    /// Made by the inner plugin.
    Inner(Box<InnerError>),
}

/// An error that is made here.
#[derive(Debug)]
pub struct OwnError {
    /// What kind of error.
    pub code: PJRT_Error_Code,
    /// What the user reads.
    pub message: String,
}

impl Error {
    /// The caller passed something wrong.
    pub fn invalid(message: impl fmt::Display) -> Error {
        Error::own(PJRT_Error_Code_INVALID_ARGUMENT, message)
    }

    /// Something is missing or in the wrong state.
    pub fn precondition(message: impl fmt::Display) -> Error {
        Error::own(PJRT_Error_Code_FAILED_PRECONDITION, message)
    }

    /// We do not support this (yet).
    pub fn unimplemented(message: impl fmt::Display) -> Error {
        Error::own(PJRT_Error_Code_UNIMPLEMENTED, message)
    }

    /// The system gives less than is needed.
    pub fn exhausted(message: impl fmt::Display) -> Error {
        Error::own(PJRT_Error_Code_RESOURCE_EXHAUSTED, message)
    }

    /// A bug of ours, or a failure that nobody foresees.
    pub fn internal(message: impl fmt::Display) -> Error {
        Error::own(PJRT_Error_Code_INTERNAL, message)
    }

    /// What a panic said.
    pub fn panicked(panic: &(dyn Any + Send)) -> Error {
        let text = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("unknown");
        Error::internal(format!("internal error (a bug, please report it): {text}"))
    }

    /// A message as it is: it says already whose it is.
    pub fn verbatim(code: PJRT_Error_Code, message: impl Into<String>) -> Error {
        Error::Own(Box::new(OwnError {
            code,
            message: message.into(),
        }))
    }

    /// A message of ours begins with our name, among the many that a user's program prints.
    fn own(code: PJRT_Error_Code, message: impl fmt::Display) -> Error {
        Error::verbatim(code, format!("{PREFIX}{message}"))
    }

    /// What it says, without our name: for a line or a text that begins with it.
    pub fn bare(&self) -> String {
        let text = self.to_string();
        text.strip_prefix(PREFIX).unwrap_or(&text).to_owned()
    }

    /// The pointer to return to the framework, which destroys it.
    pub fn into_raw(self) -> *mut PJRT_Error {
        match self {
            Error::Inner(error) => error.into_raw(),
            Error::Own(own) => {
                let raw = Box::into_raw(own);
                OURS.lock().insert(raw as usize);
                raw.cast()
            }
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Own(own) => f.write_str(&own.message),
            Error::Inner(error) => f.write_str(&error.message()),
        }
    }
}

impl From<InnerError> for Error {
    fn from(error: InnerError) -> Error {
        Error::Inner(Box::new(error))
    }
}

/// An operation's error says already whose it is.
impl From<Box<OperationError>> for Error {
    fn from(error: Box<OperationError>) -> Error {
        Error::verbatim(PJRT_Error_Code_INTERNAL, error.to_string())
    }
}

/// Addresses of our errors that the framework has.
static OURS: LazyLock<Mutex<HashSet<usize>>> = LazyLock::new(Mutex::default);

/// Our error behind `raw`, if it is ours.
///
/// # Safety
/// `raw` must not be destroyed while the reference is used.
pub unsafe fn find_own<'a>(raw: *const PJRT_Error) -> Option<&'a OwnError> {
    let ours = OURS.lock().contains(&(raw as usize));
    // SAFETY: `into_raw` puts the addresses of its boxes into the set, and `take_own` takes an
    // address out before it frees the box.
    ours.then(|| unsafe { &*raw.cast::<OwnError>() })
}

/// Takes our error behind `raw` back, if it is ours.
pub fn take_own(raw: *mut PJRT_Error) -> Option<Box<OwnError>> {
    let ours = OURS.lock().remove(&(raw as usize));
    // SAFETY: the address was in the set, so it is a box of `into_raw` that nobody has freed.
    ours.then(|| unsafe { Box::from_raw(raw.cast::<OwnError>()) })
}

/// An error of the inner plugin; it is destroyed when dropped.
pub struct InnerError {
    raw: NonNull<PJRT_Error>,
    api: &'static PJRT_Api,
}

impl InnerError {
    /// The error behind `raw`; none for null, which means success.
    ///
    /// # Safety
    /// `raw` must be null or an error that `api` has returned, and that nobody else destroys.
    pub unsafe fn new(raw: *mut PJRT_Error, api: &'static PJRT_Api) -> Option<InnerError> {
        NonNull::new(raw).map(|raw| InnerError { raw, api })
    }

    fn message(&self) -> String {
        let Some(function) = self.api.PJRT_Error_Message else {
            return String::new();
        };
        let mut args = PJRT_Error_Message_Args {
            struct_size: size_of::<PJRT_Error_Message_Args>(),
            extension_start: std::ptr::null_mut(),
            error: self.raw.as_ptr(),
            message: std::ptr::null(),
            message_size: 0,
        };
        // SAFETY: the error is live, and its plugin fills in a text that lives as long as it.
        let text = unsafe {
            function(&mut args);
            if args.message.is_null() {
                return String::new();
            }
            std::slice::from_raw_parts(args.message.cast::<u8>(), args.message_size)
        };
        String::from_utf8_lossy(text).into_owned()
    }

    fn into_raw(self) -> *mut PJRT_Error {
        let raw = self.raw.as_ptr();
        std::mem::forget(self);
        raw
    }
}

impl Drop for InnerError {
    fn drop(&mut self) {
        let Some(function) = self.api.PJRT_Error_Destroy else {
            return;
        };
        let mut args = PJRT_Error_Destroy_Args {
            struct_size: size_of::<PJRT_Error_Destroy_Args>(),
            extension_start: std::ptr::null_mut(),
            error: self.raw.as_ptr(),
        };
        // SAFETY: the error is ours to destroy (`InnerError::new`), and nobody uses it any more.
        unsafe { function(&mut args) };
    }
}

impl fmt::Debug for InnerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("InnerError").field(&self.message()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_errors_are_found_and_taken_back() {
        let raw = Error::invalid("wrong").into_raw();
        // SAFETY: it is destroyed below.
        let found = unsafe { find_own(raw) }.expect("ours");
        assert_eq!(found.message, "mpi_cuda: wrong");
        assert_eq!(found.code, PJRT_Error_Code_INVALID_ARGUMENT);
        assert!(take_own(raw).is_some());
        assert!(take_own(raw).is_none());
    }
}
