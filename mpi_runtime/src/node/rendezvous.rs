//! Which launch the ranks of a node have arrived at. Each writes a mark into memory that all of
//! them share, and sees the others' marks without a message.
//!
//! A rank that sees the same mark from everybody may wait for them on the thread that dispatches,
//! since nobody is still to dispatch what it waits for (`docs/waiting.md`).

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::node::segment::{Atomics, Segment, SegmentName};

/// How long a rank looks for the others before it takes the slower way; about what that way costs.
const PATIENCE: Duration = Duration::from_micros(200);
/// Ranks run ahead of each other (the root of a broadcast does), so each leaves several marks. A
/// mark is a hash, and its place too: one that is overwritten early costs the slower way, no more.
const MARKS: usize = 16;
/// One rank's marks, on cache lines of its own.
const STRIDE: usize = MARKS * size_of::<Arrival>();
/// Who looked in vain does not look again before the clock shows the next multiple of this, in
/// nanoseconds: all ranks then begin again at the same moment, and so at the same launch. Each
/// further failure doubles it.
const PAUSE: u64 = 1 << 18;
/// At most so often: 34 ms, of which looking in vain takes less than a hundredth.
const MOST_DOUBLINGS: u32 = 7;

/// One rank's arrival at one launch; all zero bytes mean none.
#[repr(C)]
struct Arrival {
    mark: AtomicU64,
    balance: AtomicU64,
}

// SAFETY: it has two atomics.
unsafe impl Atomics for Arrival {}

impl Arrival {
    fn write(&self, mark: u64, balance: u64) {
        // Who reads meanwhile sees no mark, or the old one with its balance.
        self.mark.store(0, Ordering::SeqCst);
        self.balance.store(balance, Ordering::SeqCst);
        self.mark.store(mark, Ordering::SeqCst);
    }

    /// The balance, if this is the arrival at `mark`.
    fn read(&self, mark: u64) -> Option<u64> {
        let is_there = || self.mark.load(Ordering::SeqCst) == mark;
        let balance = is_there().then(|| self.balance.load(Ordering::SeqCst))?;
        is_there().then_some(balance)
    }
}

/// What all ranks take of the memory.
fn bytes(size: usize) -> usize {
    size * STRIDE
}

fn name(number: u64) -> SegmentName {
    SegmentName { number, rank: None }
}

/// The marks of all ranks of this node.
pub struct Rendezvous {
    segment: Segment,
    rank: usize,
    size: usize,
    /// When this rank looks again, by [`now`]; 0 if it always looks.
    paused_until: AtomicU64,
    /// Failures in a row.
    failures: AtomicU32,
}

impl Rendezvous {
    /// Makes the memory for `size` ranks, under a number of [`crate::node::segment::new_number`];
    /// of rank 0.
    pub fn create(number: u64, size: usize) -> io::Result<Rendezvous> {
        let segment = Segment::create(name(number), bytes(size), |_| true)?;
        Ok(Self::over(segment, 0, size))
    }

    /// Maps the memory that rank 0 made.
    pub fn open(number: u64, rank: usize, size: usize) -> io::Result<Rendezvous> {
        let segment = Segment::open(name(number), |found| found == bytes(size))?;
        Ok(Self::over(segment, rank, size))
    }

    /// Takes the name away, once everybody has mapped the memory.
    pub fn unlink(&self) {
        self.segment.unlink();
    }

    fn over(segment: Segment, rank: usize, size: usize) -> Rendezvous {
        Rendezvous {
            segment,
            rank,
            size,
            paused_until: AtomicU64::new(0),
            failures: AtomicU32::new(0),
        }
    }

    fn slot(&self, rank: usize, mark: u64) -> &Arrival {
        assert!(rank < self.size);
        let index = rank * MARKS + mark as usize % MARKS;
        self.segment.atomics(index * size_of::<Arrival>())
    }

    /// Says that this rank has arrived at a mark, which is not 0, with a balance, once it is
    /// `free`; true if everybody else has too, soon, and all balances add up to 0. `arrival` has
    /// both, or none if this rank cannot tell where it is.
    pub fn meet(&self, free: impl Fn() -> bool, arrival: impl Fn() -> Option<(u64, u64)>) -> bool {
        let patient = self.may_look();
        let arrived = (free() || patient && soon(&free)).then(arrival).flatten();
        let met = arrived.is_some_and(|(mark, balance)| {
            self.slot(self.rank, mark).write(mark, balance);
            patient && self.look(mark)
        });
        if met {
            self.failures.store(0, Ordering::Relaxed);
        } else if patient {
            self.pause(now());
        }
        met
    }

    /// Takes this rank's marks back: a launch that it has arrived at will not run.
    pub fn withdraw(&self) {
        for place in 0..MARKS as u64 {
            self.slot(self.rank, place).write(0, 0);
        }
    }

    fn may_look(&self) -> bool {
        let until = self.paused_until.load(Ordering::Relaxed);
        until == 0 || {
            let over = now() >= until;
            if over {
                self.paused_until.store(0, Ordering::Relaxed);
            }
            over
        }
    }

    /// Who looked in vain looks less often.
    fn pause(&self, now: u64) {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed);
        let pause = PAUSE << failures.min(MOST_DOUBLINGS);
        self.paused_until
            .store((now / pause + 1) * pause, Ordering::Relaxed);
    }

    fn look(&self, mark: u64) -> bool {
        // An earlier arrival may have the same mark, but then the sum is wrong, so far.
        soon(|| {
            let sum = (0..self.size).try_fold(0u64, |sum, rank| {
                Some(sum.wrapping_add(self.slot(rank, mark).read(mark)?))
            });
            sum == Some(0)
        })
    }
}

/// Nanoseconds by a clock that all processes of a node share.
fn now() -> u64 {
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    time.map_or(0, |time| time.as_nanos() as u64)
}

/// Whether `true_at_last` becomes true before this rank's patience ends.
fn soon(mut true_at_last: impl FnMut() -> bool) -> bool {
    if true_at_last() {
        return true;
    }
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        std::thread::yield_now();
        if true_at_last() {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests;
