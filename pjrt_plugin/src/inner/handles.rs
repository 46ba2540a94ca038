//! Handles of the inner plugin that are ours: waiting for them and destroying them.

use pjrt_sys::*;

use crate::error::Error;
use crate::inner::call::{Function, call, new_args};
use crate::plugin::plugin;

/// A buffer that is destroyed when dropped; null is nothing.
pub struct Owned(pub *mut PJRT_Buffer);

// SAFETY: a handle of the inner plugin, which is thread-safe.
unsafe impl Send for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.0.is_null() {
            destroy_buffer(self.0);
        }
    }
}

impl Owned {
    /// Gives the handle up to the framework.
    pub fn into_raw(self) -> *mut PJRT_Buffer {
        let handle = self.0;
        std::mem::forget(self);
        handle
    }
}

/// Waits until a buffer has its content.
pub fn wait_ready(buffer: *mut PJRT_Buffer) -> Result<(), Error> {
    let mut ready = new_args::<PJRT_Buffer_ReadyEvent_Args>();
    ready.buffer = buffer;
    // SAFETY: a live buffer.
    unsafe { call(plugin().inner.api().PJRT_Buffer_ReadyEvent, &mut ready) }?;
    let result = wait(ready.event);
    destroy_event(ready.event);
    result
}

/// Waits for an event, and has its error.
pub fn wait(event: *mut PJRT_Event) -> Result<(), Error> {
    let mut args = new_args::<PJRT_Event_Await_Args>();
    args.event = event;
    // SAFETY: a live event.
    unsafe { call(plugin().inner.api().PJRT_Event_Await, &mut args) }
}

/// Destroys an event; null is nothing.
pub fn destroy_event(event: *mut PJRT_Event) {
    if event.is_null() {
        return;
    }
    discard(plugin().inner.api().PJRT_Event_Destroy, {
        let mut args = new_args::<PJRT_Event_Destroy_Args>();
        args.event = event;
        args
    });
}

/// Destroys a buffer.
pub fn destroy_buffer(buffer: *mut PJRT_Buffer) {
    discard(plugin().inner.api().PJRT_Buffer_Destroy, {
        let mut args = new_args::<PJRT_Buffer_Destroy_Args>();
        args.buffer = buffer;
        args
    });
}

/// Destroys a loaded executable.
pub fn destroy_loaded(loaded: *mut PJRT_LoadedExecutable) {
    discard(plugin().inner.api().PJRT_LoadedExecutable_Destroy, {
        let mut args = new_args::<PJRT_LoadedExecutable_Destroy_Args>();
        args.executable = loaded;
        args
    });
}

/// Calls `look` with the executable behind a loaded one.
///
/// # Safety
/// `loaded` must be live.
pub unsafe fn with_executable<T>(
    loaded: *mut PJRT_LoadedExecutable,
    look: impl FnOnce(*mut PJRT_Executable) -> Result<T, Error>,
) -> Result<T, Error> {
    let mut get = new_args::<PJRT_LoadedExecutable_GetExecutable_Args>();
    get.loaded_executable = loaded;
    // SAFETY: as the caller promises.
    unsafe {
        call(
            plugin().inner.api().PJRT_LoadedExecutable_GetExecutable,
            &mut get,
        )
    }?;
    let result = look(get.executable);
    destroy_executable(get.executable);
    result
}

/// Destroys an executable that is not loaded.
pub fn destroy_executable(executable: *mut PJRT_Executable) {
    discard(plugin().inner.api().PJRT_Executable_Destroy, {
        let mut args = new_args::<PJRT_Executable_Destroy_Args>();
        args.executable = executable;
        args
    });
}

/// Destroys something of ours; a failure would leave nothing to do.
pub fn discard<Args>(destroy: Function<Args>, mut args: Args) {
    // SAFETY: the callers pass a live handle that nobody uses any more.
    let _ = unsafe { call(destroy, &mut args) };
}
