//! Tickets: each launch with operations has one, which its operations find again through the run
//! id. And which launch the calling thread is inside of.

use std::cell::Cell;

use mpi_runtime::Ticket;

use crate::plugin::world;

thread_local! {
    /// The launch whose host callback this thread is running; what it launches belongs to it.
    static CALLBACK_OF: Cell<Option<Ticket>> = const { Cell::new(None) };
    /// Launches of programs with callbacks or operations that this thread is inside of.
    static LAUNCHES_HERE: Cell<u32> = const { Cell::new(0) };
    /// This thread runs a host callback of a program that XLA runs in the background.
    static IN_BACKGROUND: Cell<bool> = const { Cell::new(false) };
}

/// The ticket that a run id carries.
pub fn ticket_of(run_id: i64) -> Option<Ticket> {
    Some(Ticket(run_id as u32)).filter(|ticket| ticket.0 != 0)
}

/// Retires its ticket when dropped, so that no path forgets it.
pub struct TicketGuard(pub Ticket);

impl Drop for TicketGuard {
    fn drop(&mut self) {
        if let Some(world) = world() {
            world.engine.retire(self.0);
        }
    }
}

/// Runs `body` as a host callback of the launch with `run_id`.
pub fn in_callback_of<T>(run_id: i64, body: impl FnOnce() -> T) -> T {
    let outer = CALLBACK_OF.replace(ticket_of(run_id));
    let outer_background = IN_BACKGROUND.replace(LAUNCHES_HERE.get() == 0);
    let result = body();
    IN_BACKGROUND.set(outer_background);
    CALLBACK_OF.set(outer);
    result
}

/// The launch whose host callback this thread is running.
pub fn callback_of() -> Option<Ticket> {
    CALLBACK_OF.get()
}

/// Whether this thread runs a host callback of a program that XLA runs in the background.
pub fn is_in_background() -> bool {
    IN_BACKGROUND.get()
}

/// Whether this thread runs a host callback that must not wait for launches: its own has
/// operations, or is in the background with others queued behind it.
pub fn is_in_callback() -> bool {
    callback_of().is_some() || is_in_background()
}

/// Runs `body`, which launches a program with callbacks or operations on this thread.
pub fn inside_launch<T>(body: impl FnOnce() -> T) -> T {
    LAUNCHES_HERE.set(LAUNCHES_HERE.get() + 1);
    let result = body();
    LAUNCHES_HERE.set(LAUNCHES_HERE.get() - 1);
    result
}

/// Whether this thread is inside of such a launch.
pub fn is_inside_launch() -> bool {
    LAUNCHES_HERE.get() > 0
}
