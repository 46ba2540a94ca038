//! Memory that the ranks of a node share, through which long messages go between their devices: the
//! sender's device copies into it and the receiver's copies out of it, and no processor touches the
//! data. Each rank has a shared-memory ring, a ring of slots, and messages use its slots one after
//! the other.
//!
//! MPI carries the rendezvous header of a message, which says at which place of the ring it begins.
//! A slot goes back and forth between the two ranks by its two numbers.

use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::device::{Device, HostMemory};
use crate::log;
use crate::mpi::backoff::pause;
use crate::node::segment::{Atomics, Segment};

/// Slots of a ring: copies down, copies up and what the ranks do in between overlap.
pub(super) const SLOTS: usize = 8;
/// Largest slot: a copy of this size reaches the device's full speed.
pub(super) const LARGEST: usize = 1 << 20;
/// A message goes in at least so many parts, unless they are smaller than that: it takes as long as
/// its bytes and those of its largest part, since the receiver copies a part when the sender has.
const PARTS: usize = 16;
const SMALLEST: usize = 512 << 10;
/// Slots begin at pages.
const PAGE: usize = 4096;

/// Both count places of the ring from 1 on: the last that was filled in this slot, and the last
/// whose data are not needed any more.
#[repr(C, align(64))]
struct RingState {
    filled: AtomicU64,
    freed: AtomicU64,
}

// SAFETY: it has two atomics.
unsafe impl Atomics for RingState {}

/// One rank's slots, mapped by this process.
pub(crate) struct ShmRing {
    pub(super) segment: Segment,
    slot: usize,
    ranks: usize,
    /// The device copies by itself, or it was tried.
    pinned: OnceLock<()>,
}

impl ShmRing {
    pub(super) fn header(ranks: usize) -> usize {
        (SLOTS * size_of::<RingState>() + ranks + 1).next_multiple_of(PAGE)
    }

    /// Whether a segment of so many bytes holds slots for so many ranks.
    pub(super) fn fits(bytes: usize, ranks: usize) -> bool {
        let slots = bytes.saturating_sub(Self::header(ranks));
        slots > 0 && slots.is_multiple_of(SLOTS)
    }

    pub(super) fn over(segment: Segment, ranks: usize) -> ShmRing {
        ShmRing {
            slot: (segment.bytes() - Self::header(ranks)) / SLOTS,
            segment,
            ranks,
            pinned: OnceLock::new(),
        }
    }

    fn state(&self, place: u64) -> &RingState {
        let index = place as usize % SLOTS;
        self.segment.atomics(index * size_of::<RingState>())
    }

    /// Not 0 if the rank with that number has mapped this memory.
    pub(super) fn seen_by(&self, rank: usize) -> &AtomicU8 {
        assert!(rank < self.ranks);
        self.flag(rank)
    }

    /// Not 0 if a message was not sent to its end.
    pub(super) fn broken(&self) -> &AtomicU8 {
        self.flag(self.ranks)
    }

    fn flag(&self, number: usize) -> &AtomicU8 {
        self.segment
            .atomics(SLOTS * size_of::<RingState>() + number)
    }

    /// Bytes of the parts of a message of `bytes`, each of which has a slot; the last may be
    /// shorter.
    pub(crate) fn part(&self, bytes: usize) -> usize {
        let part = (bytes / PARTS).next_multiple_of(PAGE);
        part.clamp(SMALLEST.min(self.slot), self.slot)
    }

    /// How many places that takes.
    pub(crate) fn places(&self, bytes: usize) -> u64 {
        bytes.div_ceil(self.part(bytes)) as u64
    }

    /// The memory of a place.
    pub(crate) fn data(&self, place: u64) -> *mut u8 {
        self.segment
            .address(Self::header(self.ranks) + place as usize % SLOTS * self.slot)
    }

    /// Whether the sender may fill this place.
    pub(crate) fn is_free(&self, place: u64) -> bool {
        let before = (place + 1).saturating_sub(SLOTS as u64);
        self.state(place).freed.load(Ordering::Acquire) >= before
    }

    /// The sender has filled it.
    pub(crate) fn fill(&self, place: u64) {
        self.state(place).filled.store(place + 1, Ordering::Release);
    }

    /// Whether the receiver may read it.
    pub(crate) fn is_filled(&self, place: u64) -> bool {
        self.state(place).filled.load(Ordering::Acquire) == place + 1
    }

    /// The receiver has read it.
    pub(crate) fn free(&self, place: u64) {
        self.state(place).freed.store(place + 1, Ordering::Release);
    }

    /// Takes the places from `first` on, before `end`, out of the way, in their order: slots are
    /// other messages' before they are filled.
    pub(crate) fn drain(&self, first: u64, end: u64) {
        for place in first..end {
            let mut spins = 0;
            while !self.is_filled(place) {
                if self.is_broken(place) {
                    return;
                }
                pause(&mut spins);
            }
            self.free(place);
        }
    }

    /// The sender has sent the header of a message and cannot send the rest of it.
    pub(super) fn break_off(&self) {
        self.broken().store(1, Ordering::SeqCst);
    }

    /// Whether this place is never filled.
    pub(crate) fn is_broken(&self, place: u64) -> bool {
        self.broken().load(Ordering::SeqCst) != 0 && !self.is_filled(place)
    }

    /// Lets the device copy by itself. If it refuses, its copies go through memory of its
    /// library's: slower, and as right.
    pub(crate) fn pin(&self, device: &dyn Device) {
        self.pinned.get_or_init(|| {
            if let Some(data) = NonNull::new(self.segment.address(0)) {
                let bytes = self.segment.bytes();
                // SAFETY: mapped as long as the process lives: shared-memory rings are the world's.
                let pinned = unsafe { device.pin(&HostMemory { data, bytes }) };
                if let Err(error) = pinned {
                    log::line(&format!(
                        "memory shared by ranks is used unpinned, which is slower: {error}"
                    ));
                }
            }
        });
    }
}
