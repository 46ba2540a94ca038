//! Events: waiting for them, and being told of them.

use std::ffi::c_void;

use pjrt_sys::*;

use super::handle::EventHandle;
use crate::boundary;
use crate::error::{Error, InnerError};
use crate::inner::library::api;

impl EventHandle {
    /// Waits for the event, and has its error.
    pub fn wait(self) -> Result<(), Error> {
        ask!(PJRT_Event_Await { event: self.raw() }).map(drop)
    }

    /// Whether it has happened, without an error.
    pub fn has_succeeded(self) -> bool {
        let ready = ask!(PJRT_Event_IsReady { event: self.raw() });
        // The error may be asked for once it is ready.
        ready.is_ok_and(|args| args.is_ready)
            && ask!(PJRT_Event_Error { event: self.raw() }).is_ok()
    }

    /// Its error, if it has happened with one.
    pub fn failure(self) -> Option<Error> {
        let ready = ask!(PJRT_Event_IsReady { event: self.raw() });
        match ready {
            Ok(args) if args.is_ready => ask!(PJRT_Event_Error { event: self.raw() }).err(),
            Ok(_) => None,
            Err(error) => Some(error),
        }
    }

    /// Calls `then` once the event has happened, on any thread. Waits for it here if it cannot be
    /// watched, since what `then` lets go of is in use until the event.
    pub fn on_ready<F: FnOnce(Result<(), Error>) + Send + 'static>(self, then: F) {
        let then = Box::into_raw(Box::new(then));
        let watched = ask!(PJRT_Event_OnReady {
            event: self.raw(),
            callback: Some(is_ready::<F>),
            user_arg: then.cast(),
        });
        if watched.is_err() {
            // SAFETY: made above; a callback that could not be set is not called.
            (unsafe { Box::from_raw(then) })(self.wait());
        }
    }
}

unsafe extern "C" fn is_ready<F: FnOnce(Result<(), Error>)>(
    error: *mut PJRT_Error,
    then: *mut c_void,
) {
    boundary::quiet((), || {
        // SAFETY: `on_ready` made the box, and an event calls back once. The callback owns the
        // error (`pjrt_c_api.h`, PJRT_Event_OnReadyCallback).
        let (then, error) = unsafe {
            let then = Box::from_raw(then.cast::<F>());
            (then, InnerError::new(error, api()))
        };
        then(error.map_or(Ok(()), |error| Err(error.into())));
    });
}
