//! What the parts of a launch on several devices of this rank have in common: the ticket, and the
//! meetings at which they wait for each other. The last to come to one executes it for all.

use std::collections::HashMap;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use mpi_runtime::Ticket;
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};

use crate::error::Error;
use crate::launch::meeting_call::Call;
use crate::launch::ticket::{RunId, TicketGuard};
use crate::plugin::world;

/// After so long the report of what waits has a part that waits for others of its rank.
const SOON: Duration = Duration::from_millis(50);

/// A launch on several devices of this rank.
pub struct Several {
    /// What its parts have in common with other launches.
    run: RunId,
    /// Retires its own ticket, if it has one, when the last part has ended.
    _guard: Option<TicketGuard>,
    /// The numbers of its devices.
    ids: Vec<i64>,
    /// The run id of the first part; the others follow.
    first_id: i64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The parts that have come to the meeting.
    calls: Vec<Option<Call>>,
    present: usize,
    /// All have come, and the last one executes it with the memory of the others.
    executing: bool,
    /// How many meetings have ended, and the outcome of the last.
    round: u64,
    outcome: Result<(), String>,
    /// Parts that have ended.
    ended: Vec<usize>,
    /// Why no meeting will end any more.
    failed: Option<String>,
}

/// Run ids below this are of parts; those of other launches without a ticket are above.
const HIGHEST: i64 = -NUMBERS;
/// Run ids of parts: the lower half of the negative ones of 32 bits.
const NUMBERS: i64 = 1 << 30;

/// The numbers that have been given to parts.
static LAST: AtomicU32 = AtomicU32::new(0);

/// So many numbers in a row, of which this is the first; they begin again when they are used up.
fn numbers(last: &AtomicU32, count: u32) -> u32 {
    let first = |last: u32| match i64::from(last) + i64::from(count) > NUMBERS {
        true => 0,
        false => last,
    };
    let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
    let taken = last.fetch_update(set, fetch, |last| Some(first(last) + count));
    first(taken.unwrap_or_default())
}

/// The launches in flight, and the places of parts in them, by the run ids of these.
type Launches = HashMap<i64, (Arc<Several>, usize)>;

static KNOWN: LazyLock<RwLock<Launches>> = LazyLock::new(RwLock::default);

/// The launch that a run id is of, and the place of the part.
pub fn find(run_id: i64) -> Option<(Arc<Several>, usize)> {
    (run_id < HIGHEST)
        .then(|| KNOWN.read().get(&run_id).cloned())
        .flatten()
}

impl Several {
    /// A launch on those devices, of which `guard` has the ticket.
    pub fn new(run: RunId, guard: Option<TicketGuard>, ids: &[i64], parts: usize) -> Arc<Several> {
        let first_id = HIGHEST - NUMBERS + i64::from(numbers(&LAST, parts as u32));
        let several = Arc::new(Several {
            run,
            _guard: guard,
            ids: ids.to_vec(),
            first_id,
            state: Mutex::new(State {
                calls: (0..parts).map(|_| None).collect(),
                present: 0,
                executing: false,
                round: 0,
                outcome: Ok(()),
                ended: Vec::new(),
                failed: None,
            }),
            changed: Condvar::new(),
        });
        let mut known = KNOWN.write();
        for place in 0..parts {
            known.insert(first_id + place as i64, (several.clone(), place));
        }
        several
    }

    /// What all its parts belong to.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// The ticket of all its parts, if they communicate.
    pub fn ticket(&self) -> Option<Ticket> {
        match self.run {
            RunId::Ticket(ticket) => Some(ticket),
            RunId::By(_) => None,
        }
    }

    /// Its parts, by their places.
    pub fn parts(self: &Arc<Several>) -> Vec<Part> {
        let part = |place| Part {
            several: self.clone(),
            place,
        };
        (0..self.devices().len()).map(part).collect()
    }

    /// The devices of this rank that it runs on, in the program's order.
    pub fn devices(&self) -> &[i64] {
        &self.ids
    }

    /// The part in that place comes to a collective. The last part to come executes it for all, in
    /// the order of their places; the others wait for it.
    pub fn meet(
        &self,
        place: usize,
        call: Call,
        execute: impl FnOnce(&[Call]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut state = self.state.lock();
        let words = call.words();
        if state.failed.is_none() {
            state.failed = self.differs(&state, place, &call);
        }
        if let Some(reason) = &state.failed {
            let error = self.error(&words, place, reason);
            self.changed.notify_all();
            return Err(error);
        }
        state.calls[place] = Some(call);
        state.present += 1;
        if state.present < state.calls.len() {
            return self.wait(state, place, &words);
        }
        state.executing = true;
        let calls: Vec<Call> = state.calls.iter_mut().filter_map(Option::take).collect();
        drop(state);
        // The others must hear of the end, whatever it is.
        let executed = panic::catch_unwind(AssertUnwindSafe(|| execute(&calls)));
        let bug = |_| {
            Err(Error::internal(format!(
                "a bug of mpi_cuda's in XLA's {words}"
            )))
        };
        let result = executed.unwrap_or_else(bug);
        drop(calls);
        let mut state = self.state.lock();
        state.outcome = result.as_ref().map_err(ToString::to_string).copied();
        state.present = 0;
        state.executing = false;
        state.round += 1;
        self.changed.notify_all();
        result
    }

    /// Why a part that comes to that cannot meet the others.
    fn differs(&self, state: &State, place: usize, call: &Call) -> Option<String> {
        let remedy = "the devices of a rank execute their collectives together, so each must come \
                      to the same one: use a predicate or a loop condition that is the same on all \
                      devices of a rank, or start a rank for each device (without \
                      MPI_CUDA_LOCAL_DEVICES)";
        if let Some(&ended) = state.ended.first() {
            let ended = self.devices()[ended];
            return Some(format!(
                "device {ended} of this rank has ended its program without it; {remedy}"
            ));
        }
        let mut others = state.calls.iter().enumerate();
        let other = others.find_map(|(place, other)| Some((place, other.as_ref()?)));
        let (other, theirs) = other.filter(|(_, theirs)| !theirs.is_like(call))?;
        Some(format!(
            "device {} of this rank is at {}, and device {} at {}; {remedy}",
            self.devices()[place],
            call.words(),
            self.devices()[other],
            theirs.words()
        ))
    }

    /// Waits for the others, and for the outcome.
    fn wait(
        &self,
        mut state: MutexGuard<'_, State>,
        place: usize,
        words: &str,
    ) -> Result<(), Error> {
        let round = state.round;
        // Its arrays are in the meeting: this returns when nobody uses them, whatever happens.
        let shown = AssertUnwindSafe(|| self.wait_shown(&mut state, place, words));
        if panic::catch_unwind(shown).is_err() {
            let failed = &mut state.failed;
            failed.get_or_insert_with(|| format!("a bug of mpi_cuda's in XLA's {words}"));
            self.changed.notify_all();
        }
        while state.executing {
            self.changed.wait(&mut state);
        }
        if state.round != round {
            return state.outcome.clone().map_err(Error::internal);
        }
        state.calls[place] = None;
        state.present -= 1;
        let reason = state.failed.clone().unwrap_or_default();
        Err(self.error(words, place, &reason))
    }

    /// Waits until the meeting has ended or will not, and has the report of what waits say so.
    fn wait_shown(&self, state: &mut MutexGuard<'_, State>, place: usize, words: &str) {
        let round = state.round;
        let mut shown = None;
        while state.round == round && (state.failed.is_none() || state.executing) {
            let timed_out = self.changed.wait_for(state, SOON).timed_out();
            match world().filter(|_| timed_out && !state.executing && state.round == round) {
                Some(world) => {
                    let missing = self.missing(state);
                    shown.get_or_insert_with(|| {
                        world.engine.enter_waiting(&format!(
                            "XLA's {words} on device {} of rank {}, which waits for device(s) \
                             {missing} of the same rank",
                            self.devices()[place],
                            world.rank
                        ))
                    });
                }
                None => shown = None,
            }
        }
    }

    fn missing(&self, state: &State) -> String {
        let places = state.calls.iter().zip(self.devices());
        let missing = places.filter(|(call, _)| call.is_none());
        let names: Vec<String> = missing.map(|(_, id)| id.to_string()).collect();
        names.join(", ")
    }

    fn error(&self, words: &str, place: usize, reason: &str) -> Error {
        let rank = world().map_or(0, |world| world.rank);
        let device = self.devices()[place];
        Error::internal(format!(
            "XLA's {words} on device {device} of rank {rank}: {reason}"
        ))
    }

    /// No meeting will end any more.
    pub fn fail(&self, reason: String) {
        let mut state = self.state.lock();
        state.failed.get_or_insert(reason);
        self.changed.notify_all();
    }
}

/// One part of a launch, until it has ended.
pub struct Part {
    several: Arc<Several>,
    place: usize,
}

impl Part {
    /// The ticket of the whole launch.
    pub fn ticket(&self) -> Option<Ticket> {
        self.several.ticket()
    }

    /// The launch id by which what runs in it finds it.
    pub fn launch_id(&self) -> i32 {
        (self.several.first_id + self.place as i64) as i32
    }

    /// It has failed: the others must not wait for it, nor other ranks.
    pub fn fail(&self, error: &str) {
        let several = &self.several;
        let first = several.state.lock().failed.is_none();
        several.fail(format!(
            "device {} of this rank has failed: {error}",
            several.devices()[self.place]
        ));
        if let (Some(ticket), Some(world)) = (several.ticket(), world().filter(|_| first)) {
            world.engine.launch_failed(ticket, error);
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let several = &self.several;
        KNOWN
            .write()
            .remove(&(several.first_id + self.place as i64));
        let mut state = several.state.lock();
        state.ended.push(self.place);
        if state.present > 0 && !state.executing && state.failed.is_none() {
            let ended = several.devices()[self.place];
            state.failed = Some(format!(
                "device {ended} of this rank has ended its program without it: the devices of a \
                 rank execute their collectives together, so all of them must come to each; start \
                 a rank for each device (without MPI_CUDA_LOCAL_DEVICES)"
            ));
        }
        several.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_begin_again_where_not_all_are_left() {
        let last = AtomicU32::new(NUMBERS as u32 - 5);
        assert_eq!(numbers(&last, 3), NUMBERS as u32 - 5);
        assert_eq!(numbers(&last, 2), NUMBERS as u32 - 2);
        assert_eq!(numbers(&last, 1), 0);
        last.store(NUMBERS as u32 - 1, Ordering::Relaxed);
        assert_eq!(numbers(&last, 2), 0);
        assert_eq!(numbers(&last, 2), 2);
    }
}
