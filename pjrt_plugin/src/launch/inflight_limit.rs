//! How many launches the inner plugin still takes without making the dispatching thread wait.
//!
//! XLA:CPU holds 32 launches of a device in flight (`xla/pjrt/cpu/cpu_client.cc`,
//! `max_inflight_computations`); the next dispatch waits until one has ended. That keeps a program
//! from running far ahead of its device, and is what we want while launches do end. But if they
//! wait for a peer that waits for this very thread, none ever ends: then the launch is deferred
//! (`deferred.rs`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::launch::queue_entrance::BehindPeers;

/// Launches of the first thread that we let the inner plugin hold; the rest is for those that are
/// not counted, and for other threads, each of which has one with operations in flight.
const SLOTS: usize = 26;
/// A dispatch waits this long for any launch to end, before it is deferred.
const PATIENCE: Duration = Duration::from_millis(100);
/// So many launches are deferred without waiting again, if none has ended meanwhile.
const MANY: usize = 1024;
/// Beyond them every dispatch waits this long, since what is deferred holds its inputs.
const LONG_PATIENCE: Duration = Duration::from_secs(1);

/// Launches that are deferred, of all threads.
static DEFERRED: Mutex<usize> = Mutex::new(0);
static NONE_DEFERRED: Condvar = Condvar::new();

/// How many launches of a thread are in flight or deferred.
#[derive(Default)]
pub struct Limit {
    state: Mutex<InFlight>,
    changed: Condvar,
}

#[derive(Default)]
struct InFlight {
    /// Launches of the inner plugin in flight.
    in_flight: usize,
    /// Launches that it has not got yet.
    deferred: usize,
    /// How many have ended.
    ended: u64,
    /// What `ended` was when waiting for it was in vain.
    stalled_at: Option<u64>,
    /// Threads that wait for a change.
    waiting: usize,
}

impl InFlight {
    fn has_slots(&self, launches: usize) -> bool {
        self.deferred == 0 && self.in_flight + launches <= SLOTS
    }
}

/// Waits until no launch of any thread is deferred.
pub fn wait_none_deferred() {
    let mut deferred = DEFERRED.lock();
    while *deferred > 0 {
        NONE_DEFERRED.wait(&mut deferred);
    }
}

/// What a launch takes until it has ended.
pub struct InFlightSlot {
    limit: Arc<Limit>,
    launches: usize,
    behind_peers: Option<BehindPeers>,
}

impl InFlightSlot {
    /// Takes the slots of a launch; `waits` if it may wait for a peer.
    pub fn new(limit: &Arc<Limit>, launches: usize, waits: bool) -> InFlightSlot {
        limit.state.lock().in_flight += launches;
        InFlightSlot {
            limit: limit.clone(),
            launches,
            behind_peers: waits.then(BehindPeers::new),
        }
    }
}

impl Drop for InFlightSlot {
    fn drop(&mut self) {
        self.behind_peers = None;
        self.limit.change(|state| {
            state.in_flight -= self.launches;
            state.ended += 1;
        });
    }
}

/// Counts a launch as deferred until dropped.
pub struct Deferred {
    limit: Arc<Limit>,
    #[expect(dead_code, reason = "held for its drop")]
    behind_peers: BehindPeers,
}

impl Deferred {
    /// One more.
    pub fn new(limit: &Arc<Limit>) -> Deferred {
        let behind_peers = BehindPeers::new();
        *DEFERRED.lock() += 1;
        limit.state.lock().deferred += 1;
        Deferred {
            limit: limit.clone(),
            behind_peers,
        }
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        self.limit.change(|state| state.deferred -= 1);
        let mut deferred = DEFERRED.lock();
        *deferred -= 1;
        if *deferred == 0 {
            NONE_DEFERRED.notify_all();
        }
    }
}

impl Limit {
    fn change(&self, how: impl FnOnce(&mut InFlight)) {
        let mut state = self.state.lock();
        how(&mut state);
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Whether there are slots for `launches` more, after those already deferred. Waits for it as
    /// long as launches end.
    pub fn wait_for(&self, launches: usize) -> bool {
        let mut state = self.state.lock();
        loop {
            if state.has_slots(launches) {
                return true;
            }
            let many = state.deferred >= MANY;
            if state.stalled_at == Some(state.ended) && !many {
                return false;
            }
            let before = state.ended;
            let deadline = Instant::now() + if many { LONG_PATIENCE } else { PATIENCE };
            while state.ended == before && !state.has_slots(launches) {
                if self.wait(&mut state, deadline) {
                    state.stalled_at = Some(before);
                    return false;
                }
            }
        }
    }

    /// Waits until no launch is deferred, but not without end; how many still are.
    pub fn wait_none_deferred_for(&self, patience: Duration) -> usize {
        let deadline = Instant::now() + patience;
        let mut state = self.state.lock();
        while state.deferred > 0 {
            if self.wait(&mut state, deadline) {
                break;
            }
        }
        state.deferred
    }

    /// Whether the time is over.
    fn wait(&self, state: &mut MutexGuard<'_, InFlight>, deadline: Instant) -> bool {
        state.waiting += 1;
        let over = self.changed.wait_until(state, deadline).timed_out();
        state.waiting -= 1;
        over
    }
}
