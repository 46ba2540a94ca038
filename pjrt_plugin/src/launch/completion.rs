//! The end of a launch: what is held until then, and who reads its error.
//!
//! The framework looks at the completion of every launch as a matter of course, and a user only if
//! they wait for a result. Errors seen by the first alone stay unread, and are raised later
//! (`mpi_runtime::Engine::take_unread_error`).

use std::cell::Cell;
use std::collections::HashSet;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};

use mpi_runtime::{OperationError, Ticket};
use parking_lot::Mutex;

use crate::boundary::quiet;
use crate::error::Error;
use crate::inner::handles::{BufferHandle, ContextHandle, EventHandle, Handle};
use crate::launch::alias_buffer::End;
use crate::launch::inflight_limit::InFlightSlot;
use crate::launch::keep_alive::Kept;
use crate::launch::meeting::Part;
use crate::launch::on_caller::WithCallbacks;
use crate::launch::ticket::TicketGuard;
use crate::plugin::world;

/// What a launch holds until it has ended.
pub struct Completion {
    /// Held for their drop.
    pub inputs: Vec<Kept<BufferHandle>>,
    #[expect(dead_code, reason = "held for its drop")]
    pub context: Option<Kept<ContextHandle>>,
    #[expect(dead_code, reason = "held for its drop")]
    pub callbacks: Option<WithCallbacks>,
    /// Of a launch with operations that is no other's callback's.
    pub ticket: Option<TicketGuard>,
    /// Of a launch on several devices of this rank, which has the ticket.
    pub part: Option<Part>,
    #[expect(dead_code, reason = "held for its drop")]
    pub slot: Option<InFlightSlot>,
    /// What the framework waits for, if the launch was deferred.
    pub ends: Vec<End>,
    /// The framework has its results already.
    pub deferred: bool,
}

impl Completion {
    /// The ticket of a launch that is no other's callback's.
    pub fn ticket(&self) -> Option<Ticket> {
        let of_part = || self.part.as_ref().and_then(Part::ticket);
        self.ticket.as_ref().map(|guard| guard.0).or_else(of_part)
    }

    /// The inner plugin has refused the launch with this error; what its results are to say. Of one
    /// that was deferred nobody may read them: then the error is raised later.
    pub fn failed(&self, error: Error) -> Error {
        let Some(world) = world().filter(|_| self.deferred) else {
            return error;
        };
        let error = Box::new(OperationError {
            operation: "a launch that was dispatched behind others which wait for their peers"
                .into(),
            rank: world.rank,
            comm: "COMM_WORLD".into(),
            size: world.size,
            reason: error.to_string().into(),
        });
        let ticket = self.ticket();
        let thread = ticket.and_then(|ticket| world.engine.thread(ticket));
        world.engine.note_unread(&error.to_string(), thread);
        Error::from(error)
    }

    /// The launch has ended, or failed.
    pub fn reach(mut self, error: Option<&str>) {
        let ends = std::mem::take(&mut self.ends);
        if let Some(error) = error {
            if let (Some(TicketGuard(ticket)), Some(world)) = (&self.ticket, world()) {
                world.engine.launch_failed(*ticket, error);
            }
            if let Some(part) = &self.part {
                part.fail(error);
            }
            release_elsewhere(std::mem::take(&mut self.inputs));
        }
        drop(self);
        for end in ends {
            end.reach(error);
        }
    }
}

/// Lets go of the inputs of a launch that failed. XLA:CPU tells of the failure before it lets go of
/// what was donated, and on the same thread, which would wait for itself if it destroyed that.
fn release_elsewhere(inputs: Vec<Kept<BufferHandle>>) {
    static INPUTS: LazyLock<Mutex<Sender<Vec<Kept<BufferHandle>>>>> = LazyLock::new(|| {
        let (sender, receiver) = mpsc::channel::<Vec<_>>();
        let drop_all = move || {
            receiver
                .into_iter()
                .for_each(|inputs| quiet((), || drop(inputs)))
        };
        let thread = std::thread::Builder::new().name("mpi_cuda release".into());
        // Without a thread there is no receiver, and they are dropped below.
        let _ = thread.spawn(drop_all);
        Mutex::new(sender)
    });
    if !inputs.is_empty() {
        let unsent = INPUTS.lock().send(inputs).err();
        drop(unsent);
    }
}

/// Completion events of launches with operations, and of their tokens, while the framework holds
/// them.
static WATCHED: Mutex<Option<HashSet<usize>>> = Mutex::new(None);
/// How many there are; spares the lock where there are none.
static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// This thread runs the framework's callback for the completion of a launch.
    static IN_COMPLETION: Cell<bool> = const { Cell::new(false) };
}

/// Notes the completion event of a launch with operations.
pub fn watch(event: EventHandle) {
    if WATCHED
        .lock()
        .get_or_insert_with(HashSet::new)
        .insert(event.address())
    {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether an event is the completion of a launch with operations.
pub fn is_watched(event: EventHandle) -> bool {
    COUNT.load(Ordering::Relaxed) > 0
        && WATCHED
            .lock()
            .as_ref()
            .is_some_and(|events| events.contains(&event.address()))
}

/// The framework destroys an event.
pub fn forget(event: EventHandle) {
    if COUNT.load(Ordering::Relaxed) > 0
        && let Some(events) = WATCHED.lock().as_mut()
        && events.remove(&event.address())
    {
        COUNT.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs the framework's callback for the completion of a launch.
pub fn as_completion(callback: impl FnOnce()) {
    let outer = IN_COMPLETION.replace(true);
    callback();
    IN_COMPLETION.set(outer);
}

/// Notes that an operation failed, also before the engine saw it, until somebody reads the error.
pub fn noted(result: Result<(), Error>) -> Result<(), Error> {
    result.inspect_err(|error| {
        if let Some(world) = world() {
            world.engine.note_unread(&error.to_string(), None);
        }
    })
}

/// The framework has read the message of an error of the inner plugin.
pub fn message_was_read(message: &[u8]) {
    if !IN_COMPLETION.get()
        && let Some(world) = world()
    {
        world.engine.mark_read(&String::from_utf8_lossy(message));
    }
}
