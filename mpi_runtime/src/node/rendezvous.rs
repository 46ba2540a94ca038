//! Which launch the ranks of a node have arrived at. Each writes a mark into memory that all of
//! them share, and sees the others' marks without a message.
//!
//! A rank that sees the same mark from everybody may wait for them on the thread that dispatches,
//! since nobody is still to dispatch what it waits for (`docs/architecture.md`, "Waiting").

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::mpi::backoff;
use crate::node::segment::{Atomics, Segment, SegmentName};

/// How long a rank looks for the others before it takes the slower way; about what that way costs.
const PATIENCE: Duration = Duration::from_micros(200);
/// Ranks run ahead of each other (the root of a broadcast does), so each leaves several marks. A
/// mark is a hash, and its place too: one that is overwritten early costs the slower way, no more.
const MARKS: usize = 16;
/// One rank's marks, on cache lines of its own.
const STRIDE: usize = MARKS * size_of::<Arrival>();
/// Bytes of the words that a rank leaves for the others.
const WORDS: usize = 512;
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

/// What one rank has begun: after the marks of all, likewise.
#[repr(C, align(64))]
struct Begun {
    /// Number of the last launch.
    launch: AtomicU64,
    /// Number of the launch of which `words` are.
    described: AtomicU64,
    /// What the last launches run, each in the place of its number.
    programs: [Arrival; MARKS],
    words: [AtomicU64; WORDS / size_of::<u64>()],
}

// SAFETY: it has atomics, and arrays of them.
unsafe impl Atomics for Begun {}

/// What all ranks take of the memory.
fn bytes(size: usize) -> usize {
    size * (STRIDE + size_of::<Begun>())
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

    fn begun(&self, rank: usize) -> &Begun {
        assert!(rank < self.size);
        self.segment
            .atomics(self.size * STRIDE + rank * size_of::<Begun>())
    }

    /// Says that this rank has begun launch number `launch`, which runs `program`; `words` tell of
    /// it.
    pub fn begin(&self, launch: u64, program: u64, words: Option<&str>) {
        let own = self.begun(self.rank);
        if let Some(words) = words {
            own.described.store(0, Ordering::SeqCst);
            let mut text = words.bytes().chain(std::iter::repeat(0));
            for word in &own.words {
                let bytes = std::array::from_fn(|_| text.next().unwrap_or(0));
                word.store(u64::from_le_bytes(bytes), Ordering::SeqCst);
            }
            own.described.store(launch, Ordering::SeqCst);
        }
        own.programs[launch as usize % MARKS].write(launch, program);
        own.launch.store(launch, Ordering::Release);
    }

    /// Waits, asleep, until all ranks have begun launch number `launch`.
    pub fn wait_begun(&self, launch: u64) {
        let has_begun = |rank| self.begun(rank).launch.load(Ordering::Acquire) >= launch;
        backoff::until(|| (0..self.size).all(has_begun).then_some(()));
    }

    /// The first of `ranks` of which this rank sees that its launch number `launch` runs something
    /// other than `program`, and what.
    pub fn other_program(
        &self,
        launch: u64,
        program: u64,
        ranks: impl IntoIterator<Item = usize>,
    ) -> Option<(usize, u64)> {
        ranks.into_iter().find_map(|rank| {
            let theirs = self.begun(rank).programs[launch as usize % MARKS].read(launch)?;
            (theirs != program).then_some((rank, theirs))
        })
    }

    /// All ranks that share the memory.
    pub fn ranks(&self) -> std::ops::Range<usize> {
        0..self.size
    }

    /// The ranks beside this one: of ranks that differ, two are beside each other.
    pub fn neighbours(&self) -> [usize; 2] {
        [
            (self.rank + self.size - 1) % self.size,
            (self.rank + 1) % self.size,
        ]
    }

    /// The words that `rank` has left of launch number `launch`.
    pub fn words(&self, rank: usize, launch: u64) -> Option<String> {
        let begun = self.begun(rank);
        let is_there = || begun.described.load(Ordering::SeqCst) == launch;
        if !is_there() {
            return None;
        }
        let words = begun.words.iter();
        let bytes: Vec<u8> = words
            .flat_map(|word| word.load(Ordering::SeqCst).to_le_bytes())
            .take_while(|&byte| byte != 0)
            .collect();
        is_there().then(|| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Says that this rank has arrived at `mark`, which is not 0, once it is `free`; true if
    /// everybody else has too, soon, and all balances add up to 0.
    pub fn meet(&self, free: impl Fn() -> bool, arrival: impl Fn() -> (u64, u64)) -> bool {
        let patient = self.may_look();
        let met = (free() || patient && soon(&free)) && {
            let (mark, balance) = arrival();
            self.slot(self.rank, mark).write(mark, balance);
            patient && self.look(mark)
        };
        if met {
            self.failures.store(0, Ordering::Relaxed);
        } else if patient {
            self.pause(now());
        }
        met
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
mod tests {
    use super::*;
    use crate::node::segment::new_number;
    use std::sync::Barrier;

    fn three() -> Vec<Rendezvous> {
        let name = new_number();
        let first = Rendezvous::create(name, 3).unwrap();
        assert!(Rendezvous::create(name, 3).is_err());
        assert!(Rendezvous::open(name, 1, 4).is_err());
        let others = (1..3).map(|rank| Rendezvous::open(name, rank, 3).unwrap());
        let all: Vec<Rendezvous> = std::iter::once(first).chain(others).collect();
        all[0].unlink();
        assert!(Rendezvous::open(name, 1, 3).is_err());
        all
    }

    fn meet(rank: &Rendezvous, mark: u64) -> bool {
        rank.meet(|| true, || (mark, 0))
    }

    #[test]
    fn who_is_not_free_does_not_arrive() {
        let ranks = three();
        for rank in &ranks[1..] {
            rank.slot(rank.rank, 9).write(9, 0);
        }
        assert!(!ranks[0].meet(|| false, || (9, 0)));
        assert!(ranks[0].slot(0, 9).read(9).is_none());
        assert_ne!(ranks[0].paused_until.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn who_waits_for_all_to_begin_waits_for_the_last() {
        let ranks = three();
        ranks[0].begin(3, 0, None);
        ranks[1].begin(4, 0, None);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| ranks[0].wait_begun(3));
            std::thread::sleep(Duration::from_millis(5));
            assert!(!waiting.is_finished());
            ranks[2].begin(3, 0, None);
        });
        ranks[2].wait_begun(3);
    }

    #[test]
    fn another_program_is_seen_where_it_begins() {
        let ranks = three();
        for launch in 1..40 {
            ranks[0].begin(launch, 7, None);
            ranks[1].begin(launch, 7, None);
        }
        ranks[2].begin(39, 8, Some("all-reduce of 2 \u{b5}s"));
        let see = |rank: usize, launch| ranks[rank].other_program(launch, 7, ranks[rank].ranks());
        assert_eq!(see(0, 39), Some((2, 8)));
        assert_eq!(
            ranks[1].other_program(39, 7, ranks[1].neighbours()),
            Some((2, 8))
        );
        assert_eq!(
            ranks[2].other_program(39, 8, ranks[2].neighbours()),
            Some((1, 7))
        );
        // What nobody has begun, and what is overwritten, is not seen.
        assert_eq!((see(0, 40), see(2, 3)), (None, None));
        assert_eq!(ranks[0].words(2, 39).unwrap(), "all-reduce of 2 \u{b5}s");
        assert_eq!((ranks[0].words(1, 39), ranks[0].words(2, 38)), (None, None));
    }

    #[test]
    fn nobody_meets_those_who_have_not_come() {
        let ranks = three();
        assert!(!meet(&ranks[0], 5));
        assert!(!ranks[1].look(5));
        ranks[1].slot(1, 5).write(5, 0);
        assert!(!ranks[0].look(5));
        assert!(meet(&ranks[2], 5));
        // The others see it now, and nobody is at another mark, even in the same slot.
        assert!(ranks[0].look(5) && ranks[1].look(5));
        assert!(!ranks[0].look(5 + MARKS as u64));
    }

    #[test]
    fn who_runs_ahead_is_still_seen() {
        let ranks = three();
        for rank in &ranks[1..] {
            for mark in 1..8 {
                rank.slot(rank.rank, mark).write(mark, 0);
            }
        }
        for mark in 1..8 {
            assert!(meet(&ranks[0], mark));
        }
    }

    #[test]
    fn balances_must_add_up_to_nothing() {
        let ranks = three();
        ranks[0].slot(0, 7).write(7, 5);
        ranks[1].slot(1, 7).write(7, 2u64.wrapping_neg());
        assert!(!meet(&ranks[2], 7));
        assert!(ranks[1].slot(2, 7).read(7) == Some(0) && ranks[1].slot(2, 7).read(8).is_none());
        ranks[2].slot(2, 7).write(7, 3u64.wrapping_neg());
        assert!(ranks[0].look(7) && ranks[1].look(7));
    }

    #[test]
    fn an_earlier_arrival_with_the_same_mark_is_waited_out() {
        let ranks = three();
        for rank in &ranks[1..] {
            rank.slot(rank.rank, 3).write(3, 4);
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for rank in &ranks[1..] {
                    rank.slot(rank.rank, 3).write(3, 0);
                }
            });
            // However late that thread comes.
            while !ranks[0].look(3) {
                ranks[0].slot(0, 3).write(3, 0);
            }
        });
    }

    #[test]
    fn after_failures_all_look_again_at_the_same_moment() {
        let ranks = three();
        for (failures, rank) in ranks.iter().enumerate() {
            for _ in 0..=failures {
                rank.pause(1000 * PAUSE + 17 * failures as u64);
            }
        }
        let until = |rank: &Rendezvous| rank.paused_until.load(Ordering::Relaxed);
        assert_eq!(until(&ranks[0]), 1001 * PAUSE);
        assert_eq!(until(&ranks[1]), 1002 * PAUSE);
        assert_eq!(until(&ranks[2]), 1004 * PAUSE);
        for _ in 0..40 {
            ranks[0].pause(1000 * PAUSE);
        }
        assert_eq!(until(&ranks[0]), 1024 * PAUSE);
    }

    #[test]
    fn who_looked_in_vain_waits_and_looks_again() {
        let ranks = three();
        assert!(ranks[0].may_look() && !meet(&ranks[0], 1));
        ranks[0].pause(now() + 3_600_000_000_000);
        assert!(!ranks[0].may_look());
        ranks[0].paused_until.store(now(), Ordering::Relaxed);
        assert!(ranks[0].may_look() && ranks[0].may_look());
    }

    #[test]
    fn ranks_in_step_meet_every_time() {
        let (ranks, barrier) = (three(), Barrier::new(3));
        std::thread::scope(|scope| {
            for rank in &ranks {
                let barrier = &barrier;
                scope.spawn(move || {
                    for mark in 1..50 {
                        rank.slot(rank.rank, mark).write(mark, 0);
                        barrier.wait();
                        assert!(rank.look(mark));
                        barrier.wait();
                    }
                });
            }
        });
    }
}
