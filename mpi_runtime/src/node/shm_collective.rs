//! Collectives of ranks of one node, in memory that they share.
//!
//! Arrays go through the memory in blocks ([`crate::node::lane`]). Which rank gives a block, who
//! takes it, and whether the parts of all ranks are placed side by side or reduced, is all that
//! there is to a collective ([`Collective`]). While a rank gives a block, it takes the one before,
//! so it seldom waits, and what crosses between cores is still in their caches.
//!
//! A long reduction of which several ranks are to have the whole result, or which one rank would
//! have to compute alone, takes a second lane. Each rank reduces a slice of every block:
//!
//! 1. It gives what it has of the others' slices of a block.
//! 2. It reduces its slice of the block before, and gives that in the second lane.
//! 3. It takes the others' slices of the block before that.
//!
//! Every element is reduced in the order of the ranks, and all get the same bits.

#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::node::combine::Combine;
use crate::node::lane::Lane;
pub(crate) use crate::node::lane::MOST_RANKS;
use crate::node::segment::{Segment, SegmentName};
use crate::node::streaming;

/// The longest block. What a core has in hand must stay in its second cache.
pub(crate) const BLOCK: usize = 256 << 10;
/// Results of so many bytes do not stay in the second cache.
const LONG: usize = 4 << 20;
/// Parts and slices begin at cache lines.
const LINE: usize = 64;

/// Some of the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    All,
    One(usize),
    AllBut(usize),
}

impl Who {
    #[inline]
    fn has(self, rank: usize) -> bool {
        match self {
            Who::All => true,
            Who::One(one) => rank == one,
            Who::AllBut(one) => rank != one,
        }
    }
}

/// What a collective does; the same on all ranks.
#[derive(Clone, Copy)]
pub(crate) struct Collective {
    /// The ranks that have an operand.
    pub(crate) givers: Who,
    /// The ranks that get a result.
    pub(crate) takers: Who,
    /// An operand has a part for each rank, one behind the other; else all get the same.
    pub(crate) divided: bool,
    /// Bytes of what one rank gives to one.
    pub(crate) length: usize,
    /// How the parts of all ranks become the result; else it has them one behind the other.
    pub(crate) combine: Option<Combine>,
    /// Of a reduction that is not divided: each rank reduces a slice.
    pub(crate) in_slices: bool,
}

/// The memory of the ranks of one communicator.
pub(crate) struct ShmCollective {
    rank: usize,
    size: usize,
    segment: Arc<Segment>,
    lanes: Mutex<Lanes>,
}

/// Those that operands go through, and reduced slices.
struct Lanes {
    operands: Lane,
    reduced: Lane,
}

/// A block of a collective.
struct Block {
    /// In the lane of operands, and in that of reduced slices.
    number: u64,
    reduced: u64,
    /// Where it is in what one rank gives to one.
    place: Range<usize>,
}

impl ShmCollective {
    /// Makes the memory for `size` ranks, under a number of [`crate::node::segment::new_number`];
    /// of rank 0. It takes at most half of what is left for such things.
    ///
    /// # Errors
    /// If there is too little.
    pub(crate) fn create(number: u64, size: usize) -> io::Result<ShmCollective> {
        let bytes = bytes(size);
        let segment = Segment::create(name(number), bytes, |left| bytes as u64 <= left / 2)?;
        Ok(Self::over(segment, 0, size))
    }

    /// Maps the memory that rank 0 made.
    ///
    /// # Errors
    /// If it cannot be found or mapped.
    pub(crate) fn open(number: u64, rank: usize, size: usize) -> io::Result<ShmCollective> {
        let segment = Segment::open(name(number), |found| found == bytes(size))?;
        Ok(Self::over(segment, rank, size))
    }

    /// Takes the name away, once everybody has mapped the memory.
    pub(crate) fn unlink(&self) {
        self.segment.unlink();
    }

    fn over(segment: Segment, rank: usize, size: usize) -> ShmCollective {
        let segment = Arc::new(segment);
        let (slices, longest) = (Lane::bytes(BLOCK, size), longest_slice(BLOCK, size));
        let lanes = Lanes {
            operands: Lane::over(segment.clone(), 0, BLOCK, rank, size),
            reduced: Lane::over(segment.clone(), slices, longest, rank, size),
        };
        ShmCollective {
            rank,
            size,
            segment,
            lanes: Mutex::new(lanes),
        }
    }

    /// Executes a collective, which all ranks call alike. Who gives nothing has no operand, and who
    /// takes nothing no result.
    pub(crate) fn execute(&self, what: &Collective, send: &[u8], recv: &mut [u8]) {
        let parts = |divided: bool| if divided { self.size } else { 1 };
        let sent = if what.givers.has(self.rank) {
            parts(what.divided)
        } else {
            0
        };
        let side_by_side = what.combine.is_none() && what.givers == Who::All;
        let taken = if what.takers.has(self.rank) {
            parts(side_by_side)
        } else {
            0
        };
        assert_eq!(
            [send.len(), recv.len()],
            [sent, taken].map(|parts| parts * what.length)
        );
        let call = Call {
            what,
            rank: self.rank,
            size: self.size,
            is_long: recv.len() >= LONG,
            block: match what.divided {
                true => BLOCK / self.size / LINE * LINE,
                false => BLOCK,
            },
        };
        let mut lanes = self.lanes.lock();
        match what.combine {
            Some(combine) if what.in_slices => call.in_slices(&mut lanes, combine, send, recv),
            _ => call.whole(&mut lanes.operands, send, recv),
        }
        if call.is_long {
            streaming::finish();
        }
    }
}

/// A collective that one rank executes.
struct Call<'a> {
    what: &'a Collective,
    rank: usize,
    size: usize,
    /// The result does not stay in the caches.
    is_long: bool,
    /// Bytes of what one rank gives to one in a block.
    block: usize,
}

impl Call<'_> {
    /// At least one: to barriers too, everybody comes.
    fn count(&self) -> usize {
        self.what.length.div_ceil(self.block).max(1)
    }

    fn block(&self, first: [u64; 2], index: usize) -> Block {
        let start = index * self.block;
        let [number, reduced] = first.map(|first| first + index as u64);
        Block {
            number,
            reduced,
            place: start..self.what.length.min(start + self.block),
        }
    }

    /// All other ranks, from the next one on, so that they do not all read the same memory.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, size) = (self.rank, self.size);
        (rank + 1..size).chain(0..rank)
    }

    /// Where a block is in the operand of a rank, in the part for `taker`.
    fn sent(&self, taker: usize, block: &Block) -> Range<usize> {
        let start = if self.what.divided {
            taker * self.what.length
        } else {
            0
        };
        start + block.place.start..start + block.place.end
    }

    /// Where it is in a slot.
    fn passed(&self, taker: usize, block: &Block) -> Range<usize> {
        let start = if self.what.divided {
            taker * self.block
        } else {
            0
        };
        start..start + block.place.len()
    }

    /// Where what `giver` gives of it is in the result.
    fn placed(&self, giver: usize, block: &Block) -> Range<usize> {
        let start = if self.what.givers == Who::All {
            giver * self.what.length
        } else {
            0
        };
        start + block.place.start..start + block.place.end
    }

    fn copy(&self, from: &[u8], to: &mut [u8]) {
        match self.is_long {
            true => streaming::copy(from, to),
            false => to.copy_from_slice(from),
        }
    }

    /// Who takes a block takes all of it.
    fn whole(&self, lane: &mut Lane, send: &[u8], recv: &mut [u8]) {
        let count = self.count();
        let first = [lane.begin(count), 0];
        for step in 0..count + 1 {
            if step < count {
                self.give(lane, &self.block(first, step), send, recv);
            }
            if step >= 1 {
                self.take(lane, &self.block(first, step - 1), send, recv);
            }
        }
    }

    /// Whether this rank gives others something.
    fn gives(&self) -> bool {
        self.what.givers.has(self.rank) && self.what.takers != Who::One(self.rank)
    }

    fn give(&self, lane: &mut Lane, block: &Block, send: &[u8], recv: &mut [u8]) {
        let takes = self.what.takers.has(self.rank);
        if self.gives() {
            let slot = lane.slot(block.number);
            if self.what.divided {
                for taker in self.others() {
                    let from = &send[self.sent(taker, block)];
                    slot[self.passed(taker, block)].copy_from_slice(from);
                }
            } else {
                slot[self.passed(0, block)].copy_from_slice(&send[self.sent(0, block)]);
            }
            lane.give(block.number);
        }
        if takes && self.what.combine.is_none() && self.what.givers.has(self.rank) {
            let own = &send[self.sent(self.rank, block)];
            self.copy(own, &mut recv[self.placed(self.rank, block)]);
        }
    }

    fn take(&self, lane: &mut Lane, block: &Block, send: &[u8], recv: &mut [u8]) {
        if self.what.takers.has(self.rank) {
            let passed = self.passed(self.rank, block);
            if let Some(combine) = self.what.combine {
                let own = &send[self.sent(self.rank, block)];
                let parts = self.parts(lane, block, own, passed);
                combine.all(&parts[..self.size], &mut recv[block.place.clone()], None);
            } else {
                for giver in self.others().filter(|&giver| self.what.givers.has(giver)) {
                    lane.wait_given(giver, block.number);
                    let given = lane.given(giver, block.number, passed.clone());
                    self.copy(given, &mut recv[self.placed(giver, block)]);
                }
            }
        }
        lane.done(block.number);
        if !self.gives() {
            lane.show_done();
        }
    }

    /// Those bytes of all ranks' parts of a block, in their order.
    fn parts<'a>(
        &self,
        lane: &'a mut Lane,
        block: &Block,
        own: &'a [u8],
        passed: Range<usize>,
    ) -> [&'a [u8]; MOST_RANKS] {
        for rank in self.others() {
            lane.wait_given(rank, block.number);
        }
        let lane = &*lane;
        let mut parts: [&[u8]; MOST_RANKS] = [&[]; MOST_RANKS];
        for (rank, part) in parts.iter_mut().enumerate().take(self.size) {
            *part = match rank == self.rank {
                true => own,
                false => lane.given(rank, block.number, passed.clone()),
            };
        }
        parts
    }

    /// Each rank reduces its slice of every block.
    fn in_slices(&self, lanes: &mut Lanes, combine: Combine, send: &[u8], recv: &mut [u8]) {
        let count = self.count();
        let first = [lanes.operands.begin(count), lanes.reduced.begin(count)];
        for step in 0..count + 2 {
            if step < count {
                self.give_others(&mut lanes.operands, &self.block(first, step), send);
            }
            if (1..=count).contains(&step) {
                self.reduce_slice(lanes, combine, &self.block(first, step - 1), send, recv);
            }
            if step >= 2 {
                self.take_others(&mut lanes.reduced, &self.block(first, step - 2), recv);
            }
        }
    }

    /// Step 1.
    fn give_others(&self, lane: &mut Lane, block: &Block, send: &[u8]) {
        let own = &send[block.place.clone()];
        let slice = slice(own.len(), self.size, self.rank);
        let slot = lane.slot(block.number);
        slot[..slice.start].copy_from_slice(&own[..slice.start]);
        slot[slice.end..own.len()].copy_from_slice(&own[slice.end..]);
        lane.give(block.number);
    }

    /// Step 2.
    fn reduce_slice(
        &self,
        lanes: &mut Lanes,
        combine: Combine,
        block: &Block,
        send: &[u8],
        recv: &mut [u8],
    ) {
        let slice = slice(block.place.len(), self.size, self.rank);
        let place = block.place.start + slice.start..block.place.start + slice.end;
        let copy = &mut lanes.reduced.slot(block.reduced)[..slice.len()];
        let parts = self.parts(&mut lanes.operands, block, &send[place.clone()], slice);
        let parts = &parts[..self.size];
        let takes = self.what.takers.has(self.rank);
        if takes && !self.is_long {
            combine.all(parts, &mut recv[place], Some(copy));
            lanes.reduced.give(block.reduced);
        } else {
            combine.all(parts, copy, None);
            lanes.reduced.give(block.reduced);
            if takes {
                let own = lanes
                    .reduced
                    .given(self.rank, block.reduced, 0..place.len());
                self.copy(own, &mut recv[place]);
            }
        }
        lanes.operands.done(block.number);
    }

    /// Step 3.
    fn take_others(&self, lane: &mut Lane, block: &Block, recv: &mut [u8]) {
        if self.what.takers.has(self.rank) {
            for rank in self.others() {
                let slice = slice(block.place.len(), self.size, rank);
                let place = block.place.start + slice.start..block.place.start + slice.end;
                lane.wait_given(rank, block.reduced);
                self.copy(
                    lane.given(rank, block.reduced, 0..slice.len()),
                    &mut recv[place],
                );
            }
        }
        lane.done(block.reduced);
    }
}

/// What all ranks take of the memory.
fn bytes(size: usize) -> usize {
    Lane::bytes(BLOCK, size) + Lane::bytes(longest_slice(BLOCK, size), size)
}

/// The longest slice of a block of so many bytes: whole cache lines.
fn longest_slice(length: usize, size: usize) -> usize {
    length.div_ceil(size).next_multiple_of(LINE)
}

/// Where the slice of `rank` is in a block of so many bytes; maybe empty.
fn slice(length: usize, size: usize, rank: usize) -> Range<usize> {
    let longest = longest_slice(length, size);
    let start = (rank * longest).min(length);
    start..(start + longest).min(length)
}

fn name(number: u64) -> SegmentName {
    SegmentName { number, rank: None }
}

#[cfg(test)]
mod tests;
