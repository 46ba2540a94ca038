//! Collectives of ranks of one node, in memory that they share.
//!
//! An array goes through the memory in blocks, and each rank has a few slots for them. Short ones
//! are one block: each rank gives all of it, and reduces those of all ranks for itself. Of longer
//! ones each rank reduces its slice alone:
//!
//! 1. It gives what it has of the others' slices of a block.
//! 2. It reduces its slice of the block before, which the others have given by now.
//! 3. It takes the others' slices of the block before that.
//!
//! So a rank seldom waits, and what crosses between cores is still in their caches. Every slice is
//! reduced in the order of the ranks, and all get the same bits.
//!
//! Blocks have numbers, which go on from one collective to the next. Each rank shows how many
//! blocks it has given, and how many slices it has reduced. A slot is used again without asking,
//! [`SLOTS`] blocks later. It is free then:
//!
//! - What a rank has given for a block was read when the others have reduced that block, which it
//!   waits for two blocks later. Of a short array it was read when the others give the next block.
//! - A slice was taken from its slot when the others give the third block behind it, or one of a
//!   later collective. A rank waits for what they give before it reduces that.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::node::bell::Bell;
use crate::node::combine::Combine;
use crate::node::patience::Patience;
use crate::node::segment::{Atomics, Segment, SegmentName};
use crate::node::streaming;

/// The most ranks that execute a collective so.
pub(crate) const MOST_RANKS: usize = 16;
/// Slots of a rank for what it gives, and for what it has reduced; at least 3.
const SLOTS: usize = 4;
/// The longest block. What a core has in hand must stay in its second cache.
pub(crate) const BLOCK: usize = 256 << 10;
/// Results of so many bytes do not stay in the second cache.
const LONG: usize = 4 << 20;
/// Slices begin at cache lines.
const LINE: usize = 64;
const PAGE: usize = 4096;

/// A counter on cache lines of its own: processors fetch two at once.
#[repr(C, align(128))]
struct Counter(AtomicU64);

/// What a rank shows the others.
#[repr(C, align(128))]
struct Shown {
    /// Blocks that it has given.
    given: Counter,
    /// Blocks of which it has reduced its slice.
    reduced: Counter,
    bell: Bell,
}

// SAFETY: it has only atomics.
unsafe impl Atomics for Shown {}

/// The memory of the ranks of one communicator.
pub(crate) struct ShmCollective {
    segment: Segment,
    rank: usize,
    size: usize,
    /// Blocks of the collectives before.
    blocks: Mutex<u64>,
}

/// One block of a collective: its number, and where it is in the arrays.
#[derive(Clone, Copy)]
struct Block {
    number: u64,
    start: usize,
    length: usize,
}

impl ShmCollective {
    /// Makes the memory for `size` ranks, under a number of [`crate::node::segment::new_number`];
    /// of rank 0. It takes at most half of what is left for such things.
    ///
    /// # Errors
    /// If there is too little.
    pub(crate) fn create(number: u64, size: usize) -> io::Result<ShmCollective> {
        let bytes = Self::bytes(size);
        let segment = Segment::create(name(number), bytes, |left| bytes as u64 <= left / 2)?;
        Ok(Self::over(segment, 0, size))
    }

    /// Maps the memory that rank 0 made.
    ///
    /// # Errors
    /// If it cannot be found or mapped.
    pub(crate) fn open(number: u64, rank: usize, size: usize) -> io::Result<ShmCollective> {
        let segment = Segment::open(name(number), |found| found == Self::bytes(size))?;
        Ok(Self::over(segment, rank, size))
    }

    /// Takes the name away, once everybody has mapped the memory.
    pub(crate) fn unlink(&self) {
        self.segment.unlink();
    }

    fn over(segment: Segment, rank: usize, size: usize) -> ShmCollective {
        ShmCollective {
            segment,
            rank,
            size,
            blocks: Mutex::new(0),
        }
    }

    fn header(size: usize) -> usize {
        (size * size_of::<Shown>()).next_multiple_of(PAGE)
    }

    /// What all ranks take of the memory.
    fn bytes(size: usize) -> usize {
        Self::header(size) + size * SLOTS * (BLOCK + longest_slice(BLOCK, size))
    }

    fn shown(&self, rank: usize) -> &Shown {
        assert!(rank < self.size);
        self.segment.atomics(rank * size_of::<Shown>())
    }

    /// Where `rank` gives that block, and where it puts its slice of it.
    fn slots(&self, rank: usize, number: u64) -> [*mut u8; 2] {
        assert!(rank < self.size);
        let slot = BLOCK + longest_slice(BLOCK, self.size);
        let place = rank * SLOTS + number as usize % SLOTS;
        let start = Self::header(self.size) + place * slot;
        [start, start + BLOCK].map(|offset| self.segment.address(offset))
    }

    /// What `rank` has given of that block, from byte `start` on.
    ///
    /// # Safety
    /// It must have given these bytes, and this rank must not have said that it is done with them.
    unsafe fn given(&self, rank: usize, number: u64, start: usize, length: usize) -> &[u8] {
        assert!(start + length <= BLOCK);
        let [given, _] = self.slots(rank, number);
        // SAFETY: inside the slot. Nobody writes there meanwhile, as the caller says.
        unsafe { std::slice::from_raw_parts(given.wrapping_add(start), length) }
    }

    /// The slice of that block that `rank` has reduced.
    ///
    /// # Safety
    /// It must have, and this rank must not have said that it is done with it.
    unsafe fn reduced(&self, rank: usize, number: u64, length: usize) -> &[u8] {
        assert!(length <= longest_slice(BLOCK, self.size));
        let [_, reduced] = self.slots(rank, number);
        // SAFETY: inside the slot. Nobody writes there meanwhile, as the caller says.
        unsafe { std::slice::from_raw_parts(reduced, length) }
    }

    /// Gives `bytes` of that block, from byte `start` on. The slot is free (see the module).
    fn give(&self, number: u64, start: usize, bytes: &[u8]) {
        assert!(start + bytes.len() <= BLOCK);
        let [given, _] = self.slots(self.rank, number);
        let to = given.wrapping_add(start);
        // SAFETY: inside this rank's slot, which nobody reads now, and where no array is.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Shows that the blocks before `number` are given, or reduced.
    fn show(&self, what: impl Fn(&Shown) -> &Counter, number: u64) {
        let own = self.shown(self.rank);
        what(own).0.store(number, Ordering::SeqCst);
        own.bell.ring_if_heard();
    }

    /// Waits until `rank` shows as much. If it has died, the watch ends the job.
    fn wait(&self, rank: usize, what: impl Fn(&Shown) -> &Counter, number: u64) {
        let shown = self.shown(rank);
        let is_there = || what(shown).0.load(Ordering::Acquire) >= number;
        if is_there() {
            return;
        }
        let mut patience = Patience::in_step();
        while !is_there() {
            patience.wait(&shown.bell, is_there);
        }
    }

    /// The reduction of the arrays `send` of all ranks, in their order, to `recv`. All ranks call
    /// this with as many bytes, the same elements and the same way: `whole` if each reduces all of
    /// a block for itself, which has at most [`BLOCK`] bytes then.
    pub(crate) fn allreduce(&self, combine: Combine, whole: bool, send: &[u8], recv: &mut [u8]) {
        assert_eq!(send.len(), recv.len());
        let mut blocks = self.blocks.lock();
        if whole {
            self.reduce_whole(combine, *blocks, send, recv);
            *blocks += 1;
            return;
        }
        let (first, count) = (*blocks, send.len().div_ceil(BLOCK));
        let block = |index: usize| {
            let start = index * BLOCK;
            Block {
                number: first + index as u64,
                start,
                length: BLOCK.min(send.len() - start),
            }
        };
        let is_long = recv.len() >= LONG;
        for step in 0..count + 2 {
            if step < count {
                self.give_others(block(step), send);
            }
            if (1..=count).contains(&step) {
                self.reduce_slice(combine, block(step - 1), is_long, send, recv);
            }
            if step >= 2 {
                self.take_others(block(step - 2), is_long, recv);
            }
        }
        if is_long {
            streaming::finish();
        }
        *blocks += count as u64;
    }

    fn reduce_whole(&self, combine: Combine, number: u64, send: &[u8], recv: &mut [u8]) {
        self.give(number, 0, send);
        self.show(|shown| &shown.given, number + 1);
        let mut parts: [&[u8]; MOST_RANKS] = [&[]; MOST_RANKS];
        for (rank, part) in parts.iter_mut().enumerate().take(self.size) {
            *part = match rank == self.rank {
                true => send,
                false => {
                    self.wait(rank, |shown| &shown.given, number + 1);
                    // SAFETY: given; this rank is done with it when it gives the next block.
                    unsafe { self.given(rank, number, 0, send.len()) }
                }
            };
        }
        combine.all(&parts[..self.size], recv, None);
    }

    /// Step 1.
    fn give_others(&self, block: Block, send: &[u8]) {
        let (from, to) = slice(block.length, self.size, self.rank);
        let own = &send[block.start..block.start + block.length];
        self.give(block.number, 0, &own[..from]);
        self.give(block.number, to, &own[to..]);
        self.show(|shown| &shown.given, block.number + 1);
    }

    /// Step 2.
    fn reduce_slice(
        &self,
        combine: Combine,
        block: Block,
        is_long: bool,
        send: &[u8],
        recv: &mut [u8],
    ) {
        let (from, to) = slice(block.length, self.size, self.rank);
        let place = block.start + from..block.start + to;
        let mut parts: [&[u8]; MOST_RANKS] = [&[]; MOST_RANKS];
        for (rank, part) in parts.iter_mut().enumerate().take(self.size) {
            *part = match rank == self.rank {
                true => &send[place.clone()],
                false => {
                    self.wait(rank, |shown| &shown.given, block.number + 1);
                    // SAFETY: given; this rank is done with it when it shows its slice.
                    unsafe { self.given(rank, block.number, from, to - from) }
                }
            };
        }
        let [_, reduced] = self.slots(self.rank, block.number);
        // SAFETY: this rank's slot, which is free (see the module), and as long as any slice.
        let copy = unsafe { std::slice::from_raw_parts_mut(reduced, to - from) };
        let (parts, result) = (&parts[..self.size], &mut recv[place]);
        if is_long {
            combine.all(parts, copy, None);
            self.show(|shown| &shown.reduced, block.number + 1);
            streaming::copy(copy, result);
        } else {
            combine.all(parts, result, Some(copy));
            self.show(|shown| &shown.reduced, block.number + 1);
        }
    }

    /// Step 3.
    fn take_others(&self, block: Block, is_long: bool, recv: &mut [u8]) {
        // Each begins with another one, so that they do not all read the same memory.
        for rank in (1..self.size).map(|step| (self.rank + step) % self.size) {
            let (from, to) = slice(block.length, self.size, rank);
            self.wait(rank, |shown| &shown.reduced, block.number + 1);
            // SAFETY: reduced; this rank is done with it when it gives the next but one.
            let reduced = unsafe { self.reduced(rank, block.number, to - from) };
            let result = &mut recv[block.start + from..block.start + to];
            match is_long {
                true => streaming::copy(reduced, result),
                false => result.copy_from_slice(reduced),
            }
        }
    }
}

/// The longest slice of a block of so many bytes: whole cache lines.
fn longest_slice(length: usize, size: usize) -> usize {
    length.div_ceil(size).next_multiple_of(LINE)
}

/// From where to where the slice of `rank` is in a block of so many bytes; maybe empty.
fn slice(length: usize, size: usize, rank: usize) -> (usize, usize) {
    let longest = longest_slice(length, size);
    let start = (rank * longest).min(length);
    (start, (start + longest).min(length))
}

fn name(number: u64) -> SegmentName {
    SegmentName { number, rank: None }
}

#[cfg(test)]
mod tests {
    use mpi_shim_abi::{Datatype, Reduction};

    use super::*;
    use crate::node::segment::new_number;

    fn memories(size: usize) -> Vec<ShmCollective> {
        let number = new_number();
        let first = ShmCollective::create(number, size).unwrap();
        let others = (1..size).map(|rank| ShmCollective::open(number, rank, size).unwrap());
        let all = std::iter::once(first).chain(others).collect::<Vec<_>>();
        all[0].unlink();
        all
    }

    /// What rank `rank` has in the collective of that number.
    fn operand(rank: usize, number: usize, length: usize) -> Vec<u8> {
        let value = |i: usize| ((i * 7 + rank * 3 + number) % 1000) as f32 * 0.37;
        (0..length).flat_map(|i| value(i).to_ne_bytes()).collect()
    }

    fn sum(size: usize, number: usize, length: usize) -> Vec<u8> {
        let rows: Vec<_> = (0..size)
            .map(|rank| operand(rank, number, length))
            .collect();
        let number = |row: &Vec<u8>, i: usize| f32::from_ne_bytes(row.as_chunks().0[i]);
        (0..length)
            .flat_map(|i| {
                let first = number(&rows[0], i);
                let sum = rows[1..]
                    .iter()
                    .fold(first, |sum, row| sum + number(row, i));
                sum.to_ne_bytes()
            })
            .collect()
    }

    #[test]
    fn all_ranks_get_the_same_bits_in_any_sequence_of_lengths() {
        let combine = Combine::of(Reduction::Sum, Datatype::F32).unwrap();
        for size in [2, 3, 5, MOST_RANKS] {
            let lengths = [
                1, 3, 400_000, 16, 17, 5, 65_536, 65_537, 1, 2, 1_050_001, 131_073, 15, 1, 1, 1, 1,
            ];
            let memories = memories(size);
            std::thread::scope(|scope| {
                for (rank, memory) in memories.iter().enumerate() {
                    scope.spawn(move || {
                        for (number, &length) in lengths.iter().enumerate() {
                            let send = operand(rank, number, length);
                            let mut recv = vec![0; send.len()];
                            // Both ways, also of short arrays.
                            let whole = length < 1000 && !number.is_multiple_of(3);
                            memory.allreduce(combine, whole, &send, &mut recv);
                            assert!(recv == sum(size, number, length), "{size} {number}");
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn a_rank_that_is_late_or_ahead_reads_and_writes_what_is_meant() {
        let combine = Combine::of(Reduction::Max, Datatype::I64).unwrap();
        let memories = memories(3);
        std::thread::scope(|scope| {
            for (rank, memory) in memories.iter().enumerate() {
                scope.spawn(move || {
                    for number in 0..200usize {
                        if (number + rank).is_multiple_of(17) {
                            std::thread::sleep(std::time::Duration::from_millis(2));
                        }
                        let length = if number.is_multiple_of(2) { 3 } else { 40_000 };
                        let value = |rank: usize| (rank * 1000 + number) as i64;
                        let send = value(rank).to_ne_bytes().repeat(length);
                        let mut recv = vec![0; send.len()];
                        memory.allreduce(combine, length == 3, &send, &mut recv);
                        assert!(recv == value(2).to_ne_bytes().repeat(length));
                    }
                });
            }
        });
    }

    #[test]
    fn slices_are_the_whole_block() {
        for size in 2..=MOST_RANKS {
            for length in [0, 4, 63, 64, 65, 1000, BLOCK - 8, BLOCK] {
                let slices: Vec<_> = (0..size).map(|rank| slice(length, size, rank)).collect();
                assert_eq!(slices[0].0, 0);
                assert_eq!(slices[size - 1].1, length);
                assert!(slices.windows(2).all(|pair| pair[0].1 == pair[1].0));
                let longest = longest_slice(BLOCK, size);
                assert!(slices.iter().all(|(from, to)| to - from <= longest));
            }
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        assert!(ShmCollective::open(new_number(), 1, 2).is_err());
        assert!(ShmCollective::create(new_number(), 1 << 40).is_err());
    }
}
