//! Execution contexts carry JAX's host callbacks. The framework destroys a context as soon as the
//! launch is queued, and the inner plugin's launches refer to it until they have ended; so its
//! destruction waits for them.

use pjrt_sys::*;

use crate::boundary;
use crate::error::Error;
use crate::inner::call::{call, new_args};
use crate::pjrt::keep_alive::KeepAlive;
use crate::plugin::plugin;

static CONTEXTS: KeepAlive = KeepAlive::new();

/// Keeps a context until dropped; null contexts need no keeping.
pub struct KeptContext(*mut PJRT_ExecuteContext);

// SAFETY: only an address, given back to the thread-safe inner plugin.
unsafe impl Send for KeptContext {}

/// Keeps `context` for one launch.
pub fn keep(context: *mut PJRT_ExecuteContext) -> KeptContext {
    if !context.is_null() {
        CONTEXTS.keep(context as usize);
    }
    KeptContext(context)
}

impl Drop for KeptContext {
    fn drop(&mut self) {
        if !self.0.is_null() && CONTEXTS.release(self.0 as usize).destroy {
            // A failure would leave nothing to do but leak it.
            let _ = destroy_inner(self.0);
        }
    }
}

fn destroy_inner(context: *mut PJRT_ExecuteContext) -> Result<(), Error> {
    let mut args = new_args::<PJRT_ExecuteContext_Destroy_Args>();
    args.context = context;
    // SAFETY: the framework gave the context up, and no launch refers to it.
    unsafe { call(plugin().inner.api().PJRT_ExecuteContext_Destroy, &mut args) }
}

/// `PJRT_ExecuteContext_Destroy`
pub unsafe extern "C" fn destroy(args: *mut PJRT_ExecuteContext_Destroy_Args) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        let context = unsafe { (*args).context };
        if CONTEXTS.postpone(context as usize, |postponed| postponed.destroy = true) {
            return Ok(());
        }
        destroy_inner(context)
    })
}
