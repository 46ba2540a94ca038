//! The end of a process whose framework does not end the world, as the Python package does by
//! `mpi_cuda_shutdown`: whoever has initialised MPI finalizes it.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use mpi_runtime::engine::recorder::file;
use mpi_runtime::log;
use mpi_runtime::node::process::is_main_thread;
use mpi_runtime::world::note_exit;

use crate::boundary::quiet;
use crate::fork;
use crate::launch::ticket;
use crate::plugin::{config, world};

unsafe extern "C" {
    /// Of glibc: has `function` called at the end of the process, with its status.
    fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
}

/// Why this rank fails is known.
static KNOWN: AtomicBool = AtomicBool::new(false);

/// Somebody has noted why this rank fails.
pub fn note_failure() {
    KNOWN.store(true, Ordering::SeqCst);
}

/// Ends the world when this process ends by `exit`, or returns from `main`.
///
/// Handlers run in the reverse order of their registration. So this is called again when a client
/// has been made: what XLA and MPI have registered by then is still there when the world ends.
pub fn watch() {
    // SAFETY: the handler stays, since the library is linked so that it is never unloaded, and it
    // takes no argument.
    unsafe { on_exit(end, std::ptr::null_mut()) };
}

extern "C" fn end(status: c_int, _: *mut c_void) {
    quiet((), || {
        let Some(world) = world().filter(|world| !fork::is_child() && !world.is_leaving()) else {
            return;
        };
        note_exit();
        if status != 0 {
            if !KNOWN.load(Ordering::SeqCst) {
                file::failed(status, b"it has ended with that status");
            }
            // Alone there is nobody to be told.
            if world.size > 1 {
                world.abort(status);
            }
            return;
        }
        // MPI is finalized by the thread that has initialised it, and a callback cannot wait for
        // the launch that it belongs to.
        if !is_main_thread() || ticket::is_in_callback() {
            return;
        }
        world.watch_end(config().exit_timeout);
        world.engine.wait_idle();
        if let Some(error) = world.engine.take_unread_error(None) {
            log::line(&error.to_string());
            world.abort(1);
        }
        world.shutdown();
    });
}
