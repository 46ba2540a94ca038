//! Launches that may wait for their peers on the calling thread: all of them have dispatched it,
//! and nothing that it waits for here needs more than this rank's own arithmetic.

use std::sync::atomic::{AtomicUsize, Ordering};

use mpi_runtime::{Ticket, World};

use crate::inner::execute_args::ExecuteArgs;
use crate::launch::donation;
use crate::launch::executables::ProgramInfo;

/// Launches that ran on the calling thread because all ranks were there.
static ON_CALLERS: AtomicUsize = AtomicUsize::new(0);

/// Launches in flight of programs with callbacks, which may wait for anything.
static WITH_CALLBACKS: AtomicUsize = AtomicUsize::new(0);

/// Whether this launch may run on the calling thread.
pub fn is_possible(
    world: &World,
    ticket: Ticket,
    program: &ProgramInfo,
    args: &ExecuteArgs<'_>,
) -> bool {
    let Some(uniform) = program.uniform else {
        return false;
    };
    // XLA:GPU runs every launch on a thread of its own, and no program there is cheap.
    program.cheap
        && !program.long
        && WITH_CALLBACKS.load(Ordering::Acquire) == 0
        // With an error in an input XLA would run nothing, and the others would wait.
        && args.inputs.iter().all(|input| input.has_content())
        // Nor if it is refused, and others see by then that this rank has arrived.
        && !donation::is_refused(args)
        && world.engine.all_have_arrived(ticket, uniform)
}

/// Counts a launch that ran there.
pub fn count() {
    ON_CALLERS.fetch_add(1, Ordering::Relaxed);
}

/// How many launches of operations ran on the thread that dispatched them.
pub fn launches_on_callers() -> usize {
    ON_CALLERS.load(Ordering::Relaxed)
}

/// Counts a launch of a program with callbacks until it is dropped.
pub struct WithCallbacks(());

impl WithCallbacks {
    /// Call with the order of launches locked if there are several ranks: not while another thread
    /// makes sure that there are none.
    pub fn new() -> WithCallbacks {
        WITH_CALLBACKS.fetch_add(1, Ordering::AcqRel);
        WithCallbacks(())
    }
}

impl Drop for WithCallbacks {
    fn drop(&mut self) {
        WITH_CALLBACKS.fetch_sub(1, Ordering::AcqRel);
    }
}
