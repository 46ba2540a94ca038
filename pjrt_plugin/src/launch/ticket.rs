//! Tickets: each launch with operations has one, which its operations find again through the run
//! id. And which launch the calling thread is inside of.

use std::cell::Cell;

use mpi_runtime::Ticket;
use mpi_runtime::node::process::is_main_thread;

use crate::launch::meeting;
use crate::launch::thread_order::{self, ThreadOrder};
use crate::plugin::world;

/// What a launch says to its operations and host callbacks, as its run id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunId {
    /// The launch has operations, or belongs to one that has them.
    Ticket(Ticket),
    /// It has no ticket.
    By(Dispatcher),
}

/// The thread that has dispatched a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dispatcher {
    /// The number of its order.
    pub order: u32,
    /// It is the main thread of this process.
    pub is_main: bool,
}

impl RunId {
    /// Of what the calling thread launches in that order without a ticket of its own: in a host
    /// callback it belongs to the launch whose callback that is.
    pub fn of(order: &ThreadOrder) -> RunId {
        let by_this_thread = || {
            RunId::By(Dispatcher {
                order: order.number,
                is_main: is_main_thread() || thread_order::is_one(),
            })
        };
        CALLBACK_OF.get().unwrap_or_else(by_this_thread)
    }

    /// As PJRT's `launch_id`: tickets are above 0.
    pub fn launch_id(self) -> i32 {
        match self {
            RunId::Ticket(ticket) => ticket.0 as i32,
            RunId::By(thread) => -((thread.order as i32) << 1 | i32::from(thread.is_main)),
        }
    }

    /// What a run id of XLA's says.
    fn read(run_id: i64) -> RunId {
        if let Some((several, _)) = meeting::find(run_id) {
            return several.run();
        }
        match ticket_of(run_id) {
            Some(ticket) => RunId::Ticket(ticket),
            None => RunId::By(Dispatcher {
                order: (-run_id >> 1) as u32,
                is_main: run_id & 1 == 1,
            }),
        }
    }
}

thread_local! {
    /// The launch whose host callback this thread is running; what it launches belongs to it.
    static CALLBACK_OF: Cell<Option<RunId>> = const { Cell::new(None) };
    /// Launches of programs with callbacks or operations that this thread is inside of.
    static LAUNCHES_HERE: Cell<u32> = const { Cell::new(0) };
    /// This thread runs a host callback of a program that XLA runs in the background.
    static IN_BACKGROUND: Cell<bool> = const { Cell::new(false) };
}

/// The ticket that a run id carries.
pub fn ticket_of(run_id: i64) -> Option<Ticket> {
    match u32::try_from(run_id) {
        Ok(id) => (id != 0).then_some(Ticket(id)),
        Err(_) => meeting::find(run_id).and_then(|(several, _)| several.ticket()),
    }
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
    let outer = CALLBACK_OF.replace(Some(RunId::read(run_id)));
    let outer_background = IN_BACKGROUND.replace(LAUNCHES_HERE.get() == 0);
    let result = body();
    IN_BACKGROUND.set(outer_background);
    CALLBACK_OF.set(outer);
    result
}

/// The launch whose host callback this thread is running, if it has a ticket.
pub fn callback_of() -> Option<Ticket> {
    match CALLBACK_OF.get() {
        Some(RunId::Ticket(ticket)) => Some(ticket),
        _ => None,
    }
}

/// The launch whose host callback this thread is running, if XLA runs that in the background. What
/// the callback launches would wait in XLA's queue for its own program.
pub fn callback_in_background() -> Option<RunId> {
    CALLBACK_OF.get().filter(|_| is_in_background())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_id_says_which_launch_it_is() {
        let by = |order, is_main| RunId::By(Dispatcher { order, is_main });
        let ids = [
            RunId::Ticket(Ticket(1)),
            RunId::Ticket(Ticket(i32::MAX as u32)),
            by(0, false),
            by(0, true),
            by(1, false),
            by(77, false),
            by(77, true),
        ];
        for id in ids {
            assert_eq!(RunId::read(i64::from(id.launch_id())), id);
        }
        assert_eq!(ticket_of(i64::from(by(5, false).launch_id())), None);
    }
}
