//! Execution contexts carry JAX's host callbacks. The framework destroys a context as soon as the
//! launch is queued, and the inner plugin's launches refer to it until they have ended; so its
//! destruction waits for them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use pjrt_sys::*;

use crate::boundary;
use crate::call::{call, new_args};
use crate::error::Error;
use crate::plugin::plugin;

#[derive(Default)]
struct Use {
    launches: usize,
    destroy: bool,
}

/// How many contexts are held; spares the lock where none is (JAX makes one for every launch).
static COUNT: AtomicUsize = AtomicUsize::new(0);
static USES: Mutex<Option<HashMap<usize, Use>>> = Mutex::new(None);

/// Keeps a context until dropped; null contexts need no keeping.
pub struct Held(*mut PJRT_ExecuteContext);

// SAFETY: only an address, given back to the thread-safe inner plugin.
unsafe impl Send for Held {}

/// Keeps `context` for one launch.
pub fn hold(context: *mut PJRT_ExecuteContext) -> Held {
    if !context.is_null() {
        let mut uses = USES.lock();
        let uses = uses.get_or_insert_with(HashMap::new);
        let found = uses.entry(context as usize).or_default();
        found.launches += 1;
        if found.launches == 1 {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
    }
    Held(context)
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.0.is_null() {
            return;
        }
        let mut uses = USES.lock();
        let Some(uses) = uses.as_mut() else { return };
        let Some(found) = uses.get_mut(&(self.0 as usize)) else {
            return;
        };
        found.launches -= 1;
        if found.launches > 0 {
            return;
        }
        let destroy_now = found.destroy;
        COUNT.fetch_sub(1, Ordering::Relaxed);
        uses.remove(&(self.0 as usize));
        if destroy_now {
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
        if COUNT.load(Ordering::Relaxed) > 0
            && let Some(uses) = USES.lock().as_mut()
            && let Some(found) = uses.get_mut(&(context as usize))
        {
            found.destroy = true;
            return Ok(());
        }
        destroy_inner(context)
    })
}
