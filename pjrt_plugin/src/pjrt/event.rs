//! Who reads an error: the framework looks at the completion of every launch as a matter of course,
//! and a user only if they wait for a result. Errors seen by the first alone stay unread, and are
//! raised later (`mpi_runtime::Engine::take_unread_error`).

use std::cell::Cell;
use std::collections::HashSet;
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use pjrt_sys::*;

use crate::boundary;
use crate::inner::call::call;
use crate::plugin::{plugin, world};

/// Completion events of launches with operations, while the framework holds them.
static COMPLETIONS: Mutex<Option<HashSet<usize>>> = Mutex::new(None);
/// How many there are; spares the lock where there are none.
static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// This thread runs the framework's callback for the completion of a launch.
    static IN_COMPLETION: Cell<bool> = const { Cell::new(false) };
}

/// Notes the completion event of a launch with operations.
pub fn watch_completion(event: *const PJRT_Event) {
    if COMPLETIONS
        .lock()
        .get_or_insert_with(HashSet::new)
        .insert(event as usize)
    {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

fn is_completion(event: *const PJRT_Event) -> bool {
    COUNT.load(Ordering::Relaxed) > 0
        && COMPLETIONS
            .lock()
            .as_ref()
            .is_some_and(|events| events.contains(&(event as usize)))
}

/// The framework has read the message of an error of the inner plugin.
pub fn message_was_read(message: &[u8]) {
    if !IN_COMPLETION.get()
        && let Some(world) = world()
    {
        world.engine.mark_read(&String::from_utf8_lossy(message));
    }
}

struct Callback {
    function: PJRT_Event_OnReadyCallback,
    argument: *mut c_void,
}

/// `PJRT_Event_OnReady`
pub unsafe extern "C" fn on_ready(args: *mut PJRT_Event_OnReady_Args) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            if is_completion((*args).event) {
                let callback = Callback {
                    function: (*args).callback,
                    argument: (*args).user_arg,
                };
                (*args).callback = Some(completed);
                (*args).user_arg = Box::into_raw(Box::new(callback)).cast();
            }
            call(plugin().inner.api().PJRT_Event_OnReady, args)
        }
    })
}

unsafe extern "C" fn completed(error: *mut PJRT_Error, callback: *mut c_void) {
    boundary::quiet((), || {
        // SAFETY: made by `on_ready`; called once.
        let callback = unsafe { Box::from_raw(callback.cast::<Callback>()) };
        let outer = IN_COMPLETION.replace(true);
        if let Some(function) = callback.function {
            // SAFETY: the framework's own callback with its own argument.
            unsafe { function(error, callback.argument) };
        }
        IN_COMPLETION.set(outer);
    });
}

/// `PJRT_Event_Destroy`
pub unsafe extern "C" fn destroy(args: *mut PJRT_Event_Destroy_Args) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments. Addresses are reused, so forget first.
        unsafe {
            if is_completion((*args).event)
                && let Some(events) = COMPLETIONS.lock().as_mut()
                && events.remove(&((*args).event as usize))
            {
                COUNT.fetch_sub(1, Ordering::Relaxed);
            }
            call(plugin().inner.api().PJRT_Event_Destroy, args)
        }
    })
}
