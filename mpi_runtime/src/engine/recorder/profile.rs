//! What a profile has of operations: all of them, from its start to its end, where the ring has the
//! last. Nothing is kept while no profile is taken, which one look at a flag tells.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::mem::take;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::clock::{Moment, Ticks};
use super::layout::Entry;

/// The most operations that a profile has. They are the first; how many were not kept is counted.
pub const MOST: usize = 1 << 18;
/// Operations that are kept in one piece of memory, so that none waits until all have moved.
const PIECE: usize = 4096;

/// That of this process.
pub(super) static PROFILE: Profile = Profile::new(MOST);

thread_local! {
    /// What the operation that this thread executes has waited, from when to when.
    static WAITS: RefCell<Vec<[Ticks; 2]>> = const { RefCell::new(Vec::new()) };
    /// Since when the operation of that number, which this thread executes, waits for nobody.
    static MET: Cell<Option<(u64, Ticks)>> = const { Cell::new(None) };
}

/// Keeps operations while it is taken.
pub(super) struct Profile {
    taken: AtomicBool,
    kept: Mutex<Kept>,
    most: usize,
}

struct Kept {
    start: Option<Moment>,
    pieces: Vec<Vec<Event>>,
    count: usize,
    lost: u64,
}

/// An operation as its entry had it when it ended. Numbers of texts are those of the record.
#[derive(Clone)]
pub(super) struct Event {
    pub(super) start: Ticks,
    /// None if it had not ended when the profile did.
    pub(super) end: Option<Ticks>,
    pub(super) comm: u64,
    pub(super) position: u64,
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) launch_thread: u64,
    pub(super) ranks: u64,
    pub(super) tags: u64,
    pub(super) what: u64,
    pub(super) text: u64,
    pub(super) failed: bool,
    /// The program's name, and the line that launched it.
    pub(super) program: u32,
    pub(super) location: u32,
    pub(super) waits: Vec<[Ticks; 2]>,
    pub(super) met: Option<Ticks>,
}

/// What was kept from the start to the end.
pub(super) struct Taken {
    pub(super) start: Moment,
    pub(super) end: Moment,
    pub(super) events: Vec<Event>,
    /// Operations for which there was no room.
    pub(super) lost: u64,
}

impl Profile {
    pub(super) const fn new(most: usize) -> Profile {
        Profile {
            taken: AtomicBool::new(false),
            kept: Mutex::new(Kept {
                start: None,
                pieces: Vec::new(),
                count: 0,
                lost: 0,
            }),
            most,
        }
    }

    /// Whether a profile is taken now.
    #[inline]
    pub(super) fn is_taken(&self) -> bool {
        self.taken.load(Ordering::Relaxed)
    }

    /// From now on operations are kept; false if they are already.
    pub(super) fn start(&self) -> bool {
        let mut kept = self.kept.lock();
        if kept.start.is_some() {
            return false;
        }
        kept.start = Some(Moment::exact());
        self.taken.store(true, Ordering::Relaxed);
        true
    }

    /// The end. `running` are the operations that have not ended.
    pub(super) fn stop(&self, running: impl FnOnce() -> Vec<Event>) -> Option<Taken> {
        let mut kept = self.kept.lock();
        let start = kept.start.take()?;
        self.taken.store(false, Ordering::Relaxed);
        kept.count = 0;
        let (pieces, lost) = (take(&mut kept.pieces), take(&mut kept.lost));
        drop(kept);
        let mut events: Vec<Event> = pieces.into_iter().flatten().collect();
        events.extend(running());
        let end = Moment::exact();
        Some(Taken {
            start,
            end,
            events,
            lost,
        })
    }

    /// Keeps an operation that has ended.
    #[cold]
    pub(super) fn keep(&self, number: u64, mut event: Event) {
        let since = event.start;
        event.waits = WAITS.take();
        event.waits.retain(|wait| wait[0] >= since);
        event.met = MET.take().filter(|met| met.0 == number).map(|met| met.1);
        let mut kept = self.kept.lock();
        if kept.start.is_none() {
            return;
        }
        if kept.count == self.most {
            kept.lost += 1;
            return;
        }
        if kept.count.is_multiple_of(PIECE) {
            kept.pieces.push(Vec::with_capacity(PIECE));
        }
        kept.count += 1;
        if let Some(piece) = kept.pieces.last_mut() {
            piece.push(event);
        }
    }

    /// The operation that this thread executes has waited for other ranks, from `start` to `end`.
    #[cold]
    pub(super) fn waited(&self, start: Ticks, end: Ticks) {
        WAITS.with_borrow_mut(|waits| waits.push([start, end]));
    }

    /// The operation of that number, which this thread executes, waits for nobody any more. Only
    /// the first time counts: of a message in several pieces, that of the first.
    #[cold]
    pub(super) fn met(&self, number: u64) {
        if MET.get().is_none_or(|met| met.0 != number) {
            MET.set(Some((number, Ticks::now())));
        }
    }
}

impl Event {
    /// What an entry says, of a launch of the program and the line that have these texts.
    pub(super) fn of(entry: &Entry, end: Option<Ticks>, (program, location): (u32, u32)) -> Event {
        let load = |word: &std::sync::atomic::AtomicU64| word.load(Ordering::Relaxed);
        Event {
            start: Ticks(load(&entry.start)),
            end,
            comm: load(&entry.comm),
            position: load(&entry.position),
            sent: load(&entry.sent),
            received: load(&entry.received),
            launch_thread: load(&entry.launch_thread),
            ranks: load(&entry.ranks),
            tags: load(&entry.tags),
            what: load(&entry.what),
            text: load(&entry.text),
            failed: load(&entry.failed) != 0,
            program,
            location,
            waits: Vec::new(),
            met: None,
        }
    }
}
