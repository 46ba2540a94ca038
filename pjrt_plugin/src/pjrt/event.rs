//! Events: who looks at the completion of a launch is told apart from who waits for a result
//! (`launch/completion.rs`).

use std::ffi::c_void;

use pjrt_sys::*;

use crate::boundary;
use crate::inner::api;
use crate::inner::handles::EventHandle;
use crate::launch::completion;
use crate::pjrt::entry::entry;

entry! {
    /// `PJRT_Event_OnReady`
    pub fn on_ready(args: PJRT_Event_OnReady_Args, event: EventHandle) {
        if completion::is_watched(event) {
            let callback = Callback {
                function: args.callback,
                argument: args.user_arg,
            };
            // SAFETY: the callback takes that argument.
            let args = unsafe { args.members() };
            args.callback = Some(completed);
            args.user_arg = Box::into_raw(Box::new(callback)).cast();
        }
        args.pass_on(api().PJRT_Event_OnReady)
    }

    /// `PJRT_Event_Destroy`
    pub fn destroy(args: PJRT_Event_Destroy_Args, event: Option<EventHandle>) {
        // Addresses are reused, so this comes first.
        event.into_iter().for_each(completion::forget);
        args.pass_on(api().PJRT_Event_Destroy)
    }
}

/// What the framework wants to be called.
struct Callback {
    function: PJRT_Event_OnReadyCallback,
    argument: *mut c_void,
}

unsafe extern "C" fn completed(error: *mut PJRT_Error, callback: *mut c_void) {
    boundary::quiet((), || {
        // SAFETY: `on_ready` made the box, and an event calls back once.
        let callback = unsafe { Box::from_raw(callback.cast::<Callback>()) };
        completion::as_completion(|| {
            if let Some(function) = callback.function {
                // SAFETY: the framework's own callback with its own argument.
                unsafe { function(error, callback.argument) };
            }
        });
    });
}
