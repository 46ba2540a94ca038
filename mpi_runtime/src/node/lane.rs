//! A lane: slots in memory that the ranks of a communicator share, through which blocks pass.
//!
//! Each rank has [`SLOTS`] slots of its own. It puts a block there and shows that it has given it;
//! others wait for that and read it. Blocks have numbers, which all ranks count alike, from one
//! collective to the next, and block `n` goes through slot `n % SLOTS` of whoever gives it. Each
//! rank also shows up to which block it needs nothing of anybody any more. Who gives a block waits
//! until all others are done with what was in its slot, so nobody is ever overtaken, whatever
//! collectives follow each other.
//!
//! The compiler sees to the rest: what is read borrows the lane, and a rank can only be done with a
//! block, or fill a slot, when nothing borrows it.
//!
//! A rank that gives shows both in one, which costs nothing. Who only takes has to say so
//! ([`Lane::show_done`]). Every rank gives or takes each block, and gives it at most two blocks
//! before it is done with one. So of any rank that has begun block `n` the others see that it is
//! done with block `n - 2`, and nobody waits for a rank that waits for it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::node::bell::Bell;
use crate::node::patience::Patience;
use crate::node::segment::{Atomics, Segment};

/// The most ranks that share a lane.
pub(crate) const MOST_RANKS: usize = 16;
/// Slots of a rank: it gives up to two blocks more before it is done with one, and the others may
/// be a block behind.
const SLOTS: usize = 4;
const PAGE: usize = 4096;

/// What a rank shows the others. It has cache lines of its own: processors fetch two at once.
#[repr(C, align(128))]
struct Shown {
    /// It has given the blocks before this one, as far as they are its own to give.
    given: AtomicU64,
    /// It needs nothing of the blocks before this one.
    done: AtomicU64,
    bell: ApartBell,
}

/// On other lines than the numbers, since those that sleep write to it.
#[repr(C, align(128))]
struct ApartBell(Bell);

// SAFETY: it has only atomics.
unsafe impl Atomics for Shown {}

/// What a rank has shown.
#[derive(Clone, Copy, Default)]
struct Progress {
    given: u64,
    done: u64,
}

/// A lane, as one rank uses it.
pub(crate) struct Lane {
    segment: Arc<Segment>,
    /// Where it begins in the segment.
    start: usize,
    slot_bytes: usize,
    rank: usize,
    size: usize,
    /// The number of the next collective's first block.
    next: u64,
    own: Progress,
    /// What each of the others had shown when this rank last looked.
    seen: [Progress; MOST_RANKS],
}

impl Lane {
    /// Bytes of a lane.
    pub(crate) fn bytes(slot_bytes: usize, size: usize) -> usize {
        Self::header(size) + size * SLOTS * slot_bytes
    }

    /// The lane that begins at byte `start` of the segment, which is zero there at first.
    pub(crate) fn over(
        segment: Arc<Segment>,
        start: usize,
        slot_bytes: usize,
        rank: usize,
        size: usize,
    ) -> Lane {
        assert!(start + Self::bytes(slot_bytes, size) <= segment.bytes());
        assert!(rank < size && size <= MOST_RANKS);
        Lane {
            segment,
            start,
            slot_bytes,
            rank,
            size,
            next: 0,
            own: Progress::default(),
            seen: [Progress::default(); MOST_RANKS],
        }
    }

    fn header(size: usize) -> usize {
        (size * size_of::<Shown>()).next_multiple_of(PAGE)
    }

    /// The numbers of the next `count` blocks begin with this one. All ranks ask alike.
    #[inline]
    pub(crate) fn begin(&mut self, count: usize) -> u64 {
        let first = self.next;
        self.next += count as u64;
        first
    }

    #[inline]
    fn shown(&self, rank: usize) -> &Shown {
        assert!(rank < self.size);
        let offset = self.start + rank * size_of::<Shown>();
        self.segment.atomics(offset)
    }

    #[inline]
    fn slot_of(&self, rank: usize, number: u64) -> *mut u8 {
        assert!(rank < self.size);
        let place = rank * SLOTS + number as usize % SLOTS;
        let offset = self.start + Self::header(self.size) + place * self.slot_bytes;
        self.segment.address(offset)
    }

    /// This rank's slot for that block, which it is about to give, once the others are done with
    /// what was there.
    #[inline]
    pub(crate) fn slot(&mut self, number: u64) -> &mut [u8] {
        assert!(number >= self.own.given);
        let done = (number + 1).saturating_sub(SLOTS as u64);
        for rank in 0..self.size {
            if rank != self.rank {
                self.wait(rank, |progress| progress.done >= done);
            }
        }
        let slot = self.slot_of(self.rank, number);
        // SAFETY: inside the segment, and where no array is. The others are done with the blocks
        // that were here, and do not read this one before `give`; this rank borrows the lane.
        unsafe { std::slice::from_raw_parts_mut(slot, self.slot_bytes) }
    }

    /// Shows that this rank's part of that block is in its slot, and what it is done with.
    #[inline]
    pub(crate) fn give(&mut self, number: u64) {
        self.own.given = number + 1;
        self.seen[self.rank] = self.own;
        let shown = self.shown(self.rank);
        shown.done.store(self.own.done, Ordering::Release);
        shown.given.store(self.own.given, Ordering::SeqCst);
        shown.bell.0.ring_if_heard();
    }

    /// Waits until `rank` has given that block. If it has died, the watch ends the job.
    #[inline]
    pub(crate) fn wait_given(&mut self, rank: usize, number: u64) {
        self.wait(rank, |progress| progress.given > number);
    }

    /// Those bytes of what `rank` has given of that block: this rank itself, or one for which it
    /// has waited.
    #[inline]
    pub(crate) fn given(&self, rank: usize, number: u64, bytes: Range<usize>) -> &[u8] {
        assert!(self.seen[rank].given > number && self.own.done <= number);
        assert!(bytes.start <= bytes.end && bytes.end <= self.slot_bytes);
        let first = self.slot_of(rank, number).wrapping_add(bytes.start);
        // SAFETY: inside the slot. Its rank fills it again when this one has shown that it is done
        // with the block, which it cannot while this borrows the lane.
        unsafe { std::slice::from_raw_parts(first, bytes.len()) }
    }

    /// This rank needs nothing of that block, nor of those before it; the others see that when it
    /// gives the next one.
    #[inline]
    pub(crate) fn done(&mut self, number: u64) {
        self.own.done = number + 1;
    }

    /// Shows it now.
    #[inline]
    pub(crate) fn show_done(&self) {
        let shown = self.shown(self.rank);
        shown.done.store(self.own.done, Ordering::SeqCst);
        shown.bell.0.ring_if_heard();
    }

    #[inline]
    fn wait(&mut self, rank: usize, is_enough: impl Fn(Progress) -> bool) {
        if is_enough(self.seen[rank]) {
            return;
        }
        let shown = self.shown(rank);
        // In this order: what it was done with when it gave that.
        let look = || Progress {
            given: shown.given.load(Ordering::Acquire),
            done: shown.done.load(Ordering::Acquire),
        };
        let mut progress = look();
        if !is_enough(progress) {
            let mut patience = Patience::in_step();
            while !is_enough(progress) {
                patience.wait(&shown.bell.0, || is_enough(look()));
                progress = look();
            }
        }
        self.seen[rank] = progress;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::segment::{SegmentName, new_number};

    fn lanes(size: usize) -> Vec<Lane> {
        let bytes = Lane::bytes(8, size);
        let (number, rank) = (new_number(), None);
        let name = SegmentName { number, rank };
        let segment = Arc::new(Segment::create(name, bytes, |_| true).unwrap());
        segment.unlink();
        let lane = |rank| Lane::over(segment.clone(), 0, 8, rank, size);
        (0..size).map(lane).collect()
    }

    #[test]
    fn a_rank_that_is_ahead_waits_until_its_slots_are_free() {
        let mut lanes = lanes(2);
        let mut slow = lanes.pop().unwrap();
        let mut fast = lanes.pop().unwrap();
        let late = std::time::Duration::from_millis(1);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for number in 0..50u64 {
                    fast.slot(number)[..8].copy_from_slice(&number.to_ne_bytes());
                    fast.give(number);
                }
            });
            for number in 0..50u64 {
                slow.wait_given(0, number);
                std::thread::sleep(late);
                assert_eq!(slow.given(0, number, 0..8), number.to_ne_bytes());
                slow.done(number);
                slow.show_done();
            }
        });
    }

    #[test]
    #[should_panic(expected = "given > number")]
    fn nobody_reads_what_was_not_given() {
        lanes(2)[0].given(1, 0, 0..8);
    }
}
