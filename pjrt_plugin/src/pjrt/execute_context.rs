//! Execution contexts, which carry JAX's host callbacks.

use pjrt_sys::*;

use crate::inner::api;
use crate::inner::handles::{ContextHandle, Owned};
use crate::launch::keep_alive;
use crate::pjrt::entry::entry;

entry! {
    /// `PJRT_ExecuteContext_Destroy`: the framework destroys a context as soon as the launch is
    /// queued, and the inner plugin's launches refer to it until they have ended.
    pub fn destroy(args: PJRT_ExecuteContext_Destroy_Args, context: ContextHandle) {
        // SAFETY: the framework gives it up, and does not use it any more.
        let given_up = unsafe { Owned::taken(context) };
        let Some(unused) = keep_alive::postpone_destroy(given_up) else {
            return Ok(());
        };
        unused.release();
        args.pass_on(api().PJRT_ExecuteContext_Destroy)
    }
}
