//! The end of a process whose framework does not end the world, as the Python package does by
//! `mpi_cuda_shutdown`: whoever has initialised MPI finalizes it.

use std::ffi::{c_int, c_void};
use std::sync::Once;

use mpi_runtime::engine::recorder::file;
use mpi_runtime::log;

use crate::boundary::quiet;
use crate::fork;
use crate::plugin::{config, world};

unsafe extern "C" {
    /// Of glibc: has `function` called at the end of the process, with its status.
    fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
}

/// Ends the world when this process ends by `exit`, or returns from `main`.
///
/// Handlers run in the reverse order of their registration. So this one comes before the inner
/// plugin's and MPI's, if both have been loaded.
pub fn watch() {
    static ONCE: Once = Once::new();
    // SAFETY: the handler stays, since this library is never unloaded, and it takes no argument.
    ONCE.call_once(|| unsafe {
        on_exit(end, std::ptr::null_mut());
    });
}

extern "C" fn end(status: c_int, _: *mut c_void) {
    quiet((), || {
        let Some(world) = world().filter(|world| !fork::is_child() && !world.is_leaving()) else {
            return;
        };
        if status != 0 {
            file::failed(status, b"it has ended with that status");
            world.abort(status);
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
