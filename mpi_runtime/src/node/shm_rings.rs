//! The rings of all ranks that share memory: made by their senders, mapped by their receivers.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::node::segment::{Segment, SegmentName};
use crate::node::shm_ring::{LARGEST, SLOTS, ShmRing};

/// The shared-memory rings of the ranks that this one shares memory with.
pub struct ShmRings {
    number: u64,
    rank: usize,
    /// By rank in the world; its own among them, if it could be made.
    all: Vec<Option<ShmRing>>,
    /// Place of the next message in the own one.
    next: AtomicU64,
    /// Why there is no own one, if there should be.
    failure: Option<io::Error>,
}

impl ShmRings {
    /// Makes the shared-memory ring of `rank`, for messages in parts of at most `chunk` bytes. All
    /// ranks of `size` call this with the same number, then, when all have, [`ShmRings::open`], and
    /// then [`ShmRings::unlink`]. A rank that wants none or cannot make one sends its messages
    /// through MPI; it makes one only if those of the `neighbours` ranks of its node take at most
    /// half of the memory that is left for such things.
    pub fn make(
        number: u64,
        rank: usize,
        size: usize,
        neighbours: usize,
        chunk: Option<usize>,
    ) -> ShmRings {
        let mut all: Vec<Option<ShmRing>> = (0..size).map(|_| None).collect();
        let mut failure = None;
        if let Some(chunk) = chunk {
            let slot = chunk.min(LARGEST);
            match create(name(number, rank), size, neighbours, slot) {
                Ok(own) => all[rank] = Some(own),
                Err(error) => failure = Some(error),
            }
        }
        ShmRings {
            number,
            rank,
            all,
            next: AtomicU64::new(0),
            failure,
        }
    }

    /// Maps those of the other ranks of this node, and shows them that it has.
    pub fn open(&mut self) {
        let (size, own) = (self.all.len(), self.rank);
        for rank in 0..size {
            if rank != own {
                let segment =
                    Segment::open(name(self.number, rank), |bytes| ShmRing::fits(bytes, size));
                self.all[rank] = segment.ok().map(|segment| ShmRing::over(segment, size));
            }
            if let Some(shm_ring) = &self.all[rank] {
                shm_ring.seen_by(own).store(1, Ordering::SeqCst);
            }
        }
    }

    /// Takes the name of the own one away, once all ranks have mapped it.
    pub fn unlink(&self) {
        if let Some(own) = &self.all[self.rank] {
            own.segment.unlink();
        }
    }

    /// Why this rank has none, though it wants one.
    pub fn failure(&self) -> Option<&io::Error> {
        self.failure.as_ref()
    }

    /// The ranks that read this one's shared-memory ring.
    pub fn readers(&self) -> usize {
        let reads = |&rank: &usize| rank != self.rank && self.to(rank as i32).is_some();
        (0..self.all.len()).filter(reads).count()
    }

    /// The own shared-memory ring, if `rank` reads it.
    pub(crate) fn to(&self, rank: i32) -> Option<&ShmRing> {
        let own = self.all[self.rank].as_ref()?;
        if own.broken().load(Ordering::SeqCst) != 0 {
            return None;
        }
        let there = usize::try_from(rank).is_ok_and(|rank| rank < self.all.len());
        (there && own.seen_by(rank as usize).load(Ordering::SeqCst) != 0).then_some(own)
    }

    /// The shared-memory ring of `rank`.
    pub(crate) fn of(&self, rank: usize) -> Option<&ShmRing> {
        self.all.get(rank)?.as_ref()
    }

    /// This rank, in the world.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// The first of `count` places for a message; they are nobody else's.
    pub(crate) fn reserve(&self, count: u64) -> u64 {
        self.next.fetch_add(count, Ordering::Relaxed)
    }

    /// The message with the places from `first` on, before `end`, is not sent to its end. If the
    /// receiver knows of it, this rank's messages go through MPI from now on.
    pub(crate) fn give_up(&self, first: u64, end: u64, header_sent: bool) {
        let back = || {
            let next = &self.next;
            next.compare_exchange(end, first, Ordering::Relaxed, Ordering::Relaxed)
        };
        if (header_sent || back().is_err())
            && let Some(own) = &self.all[self.rank]
        {
            own.break_off();
        }
    }
}

fn name(number: u64, rank: usize) -> SegmentName {
    SegmentName {
        number,
        rank: Some(rank),
    }
}

/// A ring for messages among `size` ranks, of which `neighbours` are on this node. It takes no more
/// than there is to spare: MPI and others need this memory too.
fn create(name: SegmentName, size: usize, neighbours: usize, slot: usize) -> io::Result<ShmRing> {
    let bytes = ShmRing::header(size) + SLOTS * slot;
    let enough = |left: u64| (bytes * neighbours) as u64 <= left / 2;
    let segment = Segment::create(name, bytes, enough)?;
    Ok(ShmRing::over(segment, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::segment::new_number;

    #[test]
    fn places_go_back_and_forth_between_two_ranks() {
        let number = new_number();
        let mut both: Vec<_> = (0..2)
            .map(|rank| ShmRings::make(number, rank, 2, 2, Some(4096)))
            .collect();
        both.iter_mut().for_each(ShmRings::open);
        both.iter().for_each(ShmRings::unlink);
        assert!(!name(number, 0).exists() && both[0].readers() == 1);
        let (sends, receives) = (both[0].to(1).unwrap(), both[1].of(0).unwrap());
        for place in 0..3 * SLOTS as u64 {
            assert!(sends.is_free(place) && !receives.is_filled(place));
            assert!(sends.is_free(place + SLOTS as u64 - 1));
            assert!(!sends.is_free(place + SLOTS as u64));
            // SAFETY: a byte of a slot that is free.
            unsafe { sends.data(place).write(place as u8) };
            sends.fill(place);
            assert!(receives.is_filled(place));
            // SAFETY: a byte of a slot that is filled.
            assert_eq!(unsafe { receives.data(place).read() }, place as u8);
            receives.free(place);
        }
    }

    #[test]
    fn a_message_that_is_refused_leaves_the_one_before_it_alone() {
        let number = new_number();
        let make = |rank| ShmRings::make(number, rank, 3, 3, Some(4096));
        let mut all: Vec<_> = (0..3).map(make).collect();
        all.iter_mut().for_each(ShmRings::open);
        let (sends, slow, refuses) = (all[0].to(1).unwrap(), &all[1], &all[2]);
        let ring = SLOTS as u64;
        // One that fills the ring, and one of two places for another rank, which refuses it first.
        (0..ring).for_each(|place| sends.fill(place));
        std::thread::scope(|scope| {
            let refusing = scope.spawn(|| refuses.of(0).unwrap().drain(ring, ring + 2));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!sends.is_free(ring) && !refusing.is_finished());
            for place in 0..ring {
                assert!(slow.of(0).unwrap().is_filled(place));
                slow.of(0).unwrap().free(place);
            }
            for place in ring..ring + 2 {
                assert!(sends.is_free(place));
                sends.fill(place);
            }
            refusing.join().unwrap();
        });
        assert!(sends.is_free(2 * ring + 1) && !sends.is_free(2 * ring + 2));
    }

    #[test]
    fn what_is_given_up_is_taken_back_or_known_to_the_reader() {
        let number = new_number();
        let mut both: Vec<_> = (0..2)
            .map(|rank| ShmRings::make(number, rank, 2, 2, Some(4096)))
            .collect();
        both.iter_mut().for_each(ShmRings::open);
        let first = both[0].reserve(5);
        both[0].give_up(first, first + 5, false);
        assert_eq!(both[0].reserve(3), first);
        assert!(both[0].to(1).is_some());
        both[0].to(1).unwrap().fill(first);
        both[0].give_up(first, first + 3, true);
        let read = both[1].of(0).unwrap();
        assert!(both[0].to(1).is_none() && !read.is_broken(first) && read.is_broken(first + 1));
        // What is there is taken out of the way, and the rest not waited for.
        read.drain(first, first + 3);
    }

    #[test]
    fn parts_are_whole_elements_and_fit_their_slots() {
        let number = new_number();
        for chunk in [64, 4096, 1 << 20, 1 << 30] {
            let own = ShmRings::make(number, 0, 1, 1, Some(chunk));
            own.unlink();
            let own = own.of(0).unwrap();
            for bytes in [1, 100, chunk + 1, 4 << 20, 5_000_001, 64 << 20] {
                let part = own.part(bytes);
                assert!(part <= chunk.min(LARGEST) && part.is_multiple_of(16));
                assert_eq!(own.places(bytes), bytes.div_ceil(part) as u64);
            }
        }
    }

    #[test]
    fn a_rank_that_did_not_map_it_is_sent_to_by_mpi() {
        let number = new_number();
        let mut own = ShmRings::make(number, 1, 3, 3, Some(4096));
        own.open();
        own.unlink();
        assert!(own.to(0).is_none() && own.to(2).is_none() && own.to(7).is_none());
        assert_eq!(own.readers(), 0);
        assert!(own.failure().is_none());
        // Too large for what there is.
        let many = ShmRings::make(number, 1, 3, 1 << 40, Some(4096));
        assert!(many.failure().is_some() && many.of(1).is_none());
        assert!(create(name(number, 1), 3, 1, 1 << 50).is_err());
        assert!(!name(number, 1).exists());
    }
}
