//! What a rank does while it waits for a message: it sleeps, and sees whether the sender is still
//! there.

use std::cell::Cell;
use std::ffi::c_int;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use mpi_shim_abi::ShimOp;

use crate::link::Link;
use crate::link::gone::Gone;
use crate::mpi::shim::{Shim, give_up};
use crate::node::board::Board;
use crate::node::patience;

/// How long a rank looks for a message before it sleeps between looks, in microseconds.
const AWAKE: u64 = 1_000;
/// The sleeps of a rank that has waited for less than [`LONG`] microseconds, and of others. A
/// sender of the same node wakes it; messages of other nodes are found when it looks.
const NAP: Duration = Duration::from_micros(50);
const SLEEP: Duration = Duration::from_millis(1);
const LONG: u64 = 20_000;
/// How often it looks whether the sender is there, in microseconds.
const EXAMINE: u64 = 100_000;
/// A sender that has gone may have sent before: its message has so long to come.
const GRACE: Duration = Duration::from_secs(1);

struct Context {
    shim: Shim,
    board: Option<Arc<Board>>,
    link: Option<Arc<Link>>,
}

static CONTEXT: OnceLock<Context> = OnceLock::new();

/// Says over what this rank waits; before the first operation.
pub(crate) fn start(shim: Shim, board: Option<Arc<Board>>, link: Option<Arc<Link>>) {
    // Only the first counts: there is one world.
    let _ = CONTEXT.set(Context { shim, board, link });
}

/// Has MPI move on what the program has started, while this rank waits for others outside of MPI.
pub(crate) fn progress() {
    if let Some(context) = CONTEXT.get() {
        context.shim.progress();
    }
}

/// Why a rank of the world does nothing any more, if that is known; of any node.
pub(crate) fn gone(rank: usize) -> Option<&'static str> {
    let context = CONTEXT.get()?;
    match context.board.as_ref().filter(|board| board.sees(rank)) {
        Some(board) => board.gone(rank),
        None => context.link.as_ref()?.gone(rank).map(Gone::words),
    }
}

/// Whether an operation of another node waits for long while this rank has not come to its end.
pub(crate) fn is_awaited_elsewhere() -> bool {
    let link = CONTEXT.get().and_then(|context| context.link.as_ref());
    link.is_some_and(|link| link.is_awaited())
}

/// How long that is still said when it is over: the watches of three ranks pass it on.
pub(crate) fn shown_elsewhere() -> Duration {
    let link = CONTEXT.get().and_then(|context| context.link.as_ref());
    link.map_or(Duration::ZERO, |_| Duration::from_millis(500))
}

/// See [`mpi_shim_abi::Idle`].
pub(crate) extern "C" fn idle(op: *const ShimOp, microseconds: u64) -> c_int {
    idle_for(op, microseconds).map_or(0, |reason| {
        give_up(reason);
        1
    })
}

fn idle_for(op: *const ShimOp, microseconds: u64) -> Option<String> {
    if microseconds < AWAKE {
        return None;
    }
    // SAFETY: the shim passes the operation that it executes.
    let op = unsafe { &*op };
    sleep(Duration::from_micros(microseconds), || false);
    // The time of the sleep is not known here; about every tenth of a second is enough.
    let looks = if microseconds < LONG { NAP } else { SLEEP };
    if microseconds % EXAMINE >= 2 * looks.as_micros() as u64 {
        return None;
    }
    thread_local! {
        static GONE: Cell<GoneSince> = const {
            Cell::new(GoneSince {
                waited: 0,
                since: None,
            })
        };
    }
    let mut gone = GONE.get();
    if microseconds < gone.waited {
        // That was another message.
        gone.since = None;
    }
    gone.waited = microseconds;
    let reason = sender_gone(op, &mut gone.since);
    GONE.set(gone);
    reason
}

/// Since when the sender of the message that a thread waits for is known to have gone.
#[derive(Clone, Copy)]
struct GoneSince {
    /// How long the thread had waited when it last looked.
    waited: u64,
    since: Option<Instant>,
}

/// Sleeps until a message may be there, of somebody who has waited for so long. It never yields
/// instead: a thread that wakes up is let in by one that computes, and a thread that yielded waits
/// for its time slice.
/// `is_there` says that there is one already.
pub(crate) fn sleep(waited: Duration, is_there: impl FnMut() -> bool) {
    let long = waited.as_micros() as u64 >= LONG;
    let time = if long { SLEEP } else { NAP };
    let board = CONTEXT.get().and_then(|context| context.board.as_ref());
    match board {
        Some(board) => board.messages().sleep(time, is_there),
        None => std::thread::sleep(time),
    }
}

/// Looks of a [`MessageWait`] before the core is given up between them; with fewer cores than ranks
/// one counts as 16.
const LOOKS: u32 = 64;

/// A wait for a message that the engine receives itself.
#[derive(Default)]
pub(crate) struct MessageWait {
    looks: u32,
    since: Option<Instant>,
    gone_since: Option<Instant>,
}

impl MessageWait {
    /// Between two looks; `is_there` says that something may have come since the last one.
    pub(crate) fn pause(&mut self, is_there: impl FnMut() -> bool) {
        if self.looks < LOOKS {
            // A look takes long enough. With fewer cores than ranks, the sender may wait for this
            // one.
            let step = if patience::is_oversubscribed() { 16 } else { 1 };
            self.looks += step;
            return;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        let waited = since.elapsed();
        if (waited.as_micros() as u64) < AWAKE {
            std::thread::yield_now();
        } else {
            sleep(waited, is_there);
        }
    }

    /// Why the message of `op` will never come, if that is known.
    pub(crate) fn given_up(&mut self, op: &ShimOp) -> Option<String> {
        let waited = self.since?.elapsed().as_micros() as u64;
        if waited < AWAKE || waited % EXAMINE >= 2 * SLEEP.as_micros() as u64 {
            return None;
        }
        sender_gone(op, &mut self.gone_since)
    }
}

/// Why the message of `op` will never come, if its sender has gone and what it sent would have
/// come.
fn sender_gone(op: &ShimOp, since: &mut Option<Instant>) -> Option<String> {
    let source = usize::try_from(op.source_in_world).ok()?;
    let Some(gone) = gone(source) else {
        // It may have been lost for a while.
        *since = None;
        return None;
    };
    if since.get_or_insert_with(Instant::now).elapsed() < GRACE {
        return None;
    }
    Some(format!(
        "rank {source} of the world, which this waits for, {gone}; look for an error of that rank, \
         or for a message that it does not send"
    ))
}
