//! Mailboxes: rings of slots in shared memory, through which each rank of a node sends each other
//! one short messages.
//!
//! A message has an envelope and data. Short data lie beside the envelope, so that a message is one
//! cache line; longer ones have a place of their own, and those that exceed it the places of the
//! slots behind theirs too. The sender never waits: a ring that has no room takes nothing, and the
//! message goes another way ([`Envelope::after`]).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::node::segment::{Atomics, Segment, SegmentName};

/// The most ranks of a node that have mailboxes: with 16 they take 17 MiB.
pub(crate) const MOST_RANKS: usize = 16;
/// The longest message: a quarter of a ring.
pub(crate) const MOST_BYTES: usize = 8 * PLACE;
/// Messages that a ring holds, if each needs one place.
const SLOTS: usize = 32;
/// Bytes of the data of a slot.
const PLACE: usize = 2048;
/// Bytes beside an envelope.
const BESIDE: usize = 32;
const PAGE: usize = 4096;

/// What a message says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Envelope {
    /// Its communicator, by a number of 32 bits.
    pub(crate) comm: usize,
    pub(crate) tag: i32,
    /// Code of its element type.
    pub(crate) code: i32,
    /// How many messages the sender had sent another way before, to this rank and on this
    /// communicator.
    pub(crate) after: u64,
    pub(crate) bytes: usize,
}

/// A message, in a cache line of its own.
#[repr(C, align(64))]
struct Slot {
    /// Its number, from 1 on; written last.
    number: AtomicU64,
    /// See [`Envelope::words`].
    envelope: [AtomicU64; 3],
    beside: [AtomicU64; BESIDE / 8],
}

/// On other lines than the slots: only a sender that finds the ring full looks.
#[repr(C, align(128))]
struct Taken(AtomicU64);

/// A ring; the longer data of the slots lie behind it.
#[repr(C, align(128))]
struct Ring {
    taken: Taken,
    slots: [Slot; SLOTS],
}

// SAFETY: it has only atomics.
unsafe impl Atomics for Ring {}

impl Envelope {
    fn words(&self) -> [u64; 3] {
        let low = |number: i32| u64::from(number.cast_unsigned());
        [
            (self.comm as u64) << 32 | self.bytes as u64,
            low(self.tag) << 32 | low(self.code),
            self.after,
        ]
    }

    fn of([first, second, after]: [u64; 3]) -> Envelope {
        Envelope {
            comm: (first >> 32) as usize,
            tag: ((second >> 32) as u32).cast_signed(),
            code: (second as u32).cast_signed(),
            after,
            // Whatever is there, nothing is read behind the slot's data.
            bytes: (first as u32 as usize).min(MOST_BYTES),
        }
    }
}

/// Bytes of a ring with its data.
const RING: usize = (size_of::<Ring>() + SLOTS * PLACE).next_multiple_of(PAGE);

/// The data of a message, in two pieces: they may begin again at the ring's start.
pub(crate) type Data<'a> = [&'a [u8]; 2];

/// The ring from one rank to another, as either of them uses it.
struct End {
    segment: Arc<Segment>,
    start: usize,
    /// Slots that have gone through this end.
    count: u64,
}

impl End {
    fn ring(&self) -> &Ring {
        self.segment.atomics(self.start)
    }

    fn slot(&self) -> &Slot {
        &self.ring().slots[self.count as usize % SLOTS]
    }

    /// Where so many bytes of data lie: the first so many at the first address, the others at the
    /// second one.
    fn data(&self, bytes: usize) -> (usize, [*mut u8; 2]) {
        let place = self.count as usize % SLOTS;
        let first = bytes.min((SLOTS - place) * PLACE);
        let start = self.start + size_of::<Ring>();
        let pieces = [start + place * PLACE, start];
        (first, pieces.map(|offset| self.segment.address(offset)))
    }
}

/// Slots of a message.
#[inline]
fn slots(bytes: usize) -> u64 {
    bytes.div_ceil(PLACE).max(1) as u64
}

/// Where a rank puts messages for another one.
pub(crate) struct Outbox {
    end: End,
    /// How many slots the receiver had taken when this rank last looked.
    taken: u64,
}

impl Outbox {
    /// Sends a message, if there is room; whether there was.
    #[inline]
    pub(crate) fn push(&mut self, envelope: &Envelope, data: &[u8]) -> bool {
        let end = &mut self.end;
        if data.len() > MOST_BYTES {
            return false;
        }
        let slots = slots(data.len());
        if end.count - self.taken + slots > SLOTS as u64 {
            self.taken = end.ring().taken.0.load(Ordering::Acquire);
            if end.count - self.taken + slots > SLOTS as u64 {
                return false;
            }
        }
        let slot = end.slot();
        if data.len() <= BESIDE {
            for (word, part) in slot.beside.iter().zip(data.chunks(8)) {
                let mut bytes = [0; 8];
                bytes[..part.len()].copy_from_slice(part);
                word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
            }
        } else {
            let (first, pieces) = end.data(data.len());
            let parts = data.split_at(first);
            for (piece, part) in pieces.into_iter().zip(<[&[u8]; 2]>::from(parts)) {
                // SAFETY: inside the segment, behind the ring, and where no array is. The receiver
                // has taken what was here, and reads this one after its number is stored.
                let place = unsafe { std::slice::from_raw_parts_mut(piece, part.len()) };
                place.copy_from_slice(part);
            }
        }
        let bytes = data.len();
        let words = Envelope { bytes, ..*envelope }.words();
        for (word, value) in slot.envelope.iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
        // After the rest for the receiver, and before the sender looks whether it sleeps.
        slot.number.store(end.count + 1, Ordering::SeqCst);
        end.count += slots;
        true
    }
}

/// Where a rank finds the messages of another one.
pub(crate) struct Inbox {
    end: End,
}

impl Inbox {
    /// The first message that was not taken.
    #[inline]
    pub(crate) fn first(&self) -> Option<Envelope> {
        let slot = self.end.slot();
        if slot.number.load(Ordering::Acquire) != self.end.count + 1 {
            return None;
        }
        let words = slot.envelope.each_ref();
        Some(Envelope::of(words.map(|word| word.load(Ordering::Relaxed))))
    }

    /// Takes it, with its data.
    #[inline]
    pub(crate) fn take<T>(&mut self, envelope: &Envelope, read: impl FnOnce(Data<'_>) -> T) -> T {
        let end = &mut self.end;
        let slot = end.slot();
        assert!(envelope.bytes <= MOST_BYTES);
        let result = if envelope.bytes <= BESIDE {
            let mut bytes = [0; BESIDE];
            for (part, word) in bytes.chunks_exact_mut(8).zip(&slot.beside) {
                part.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
            }
            read([&bytes[..envelope.bytes], &[]])
        } else {
            let (first, pieces) = end.data(envelope.bytes);
            let lengths = [first, envelope.bytes - first];
            // SAFETY: inside the segment, behind the ring. Its sender writes there again when it
            // sees that this message was taken, which is shown below.
            let piece = |place: usize| unsafe {
                std::slice::from_raw_parts(pieces[place].cast_const(), lengths[place])
            };
            read([piece(0), piece(1)])
        };
        end.count += slots(envelope.bytes);
        end.ring().taken.0.store(end.count, Ordering::Release);
        result
    }
}

/// The mailboxes of a rank: from and to every rank of its node, itself among them.
pub(crate) struct Mailboxes {
    number: u64,
    /// The ranks of the node in the world, in order.
    ranks: Vec<usize>,
    /// Which of them this one is.
    place: usize,
    /// What each of them has made: the rings from all of them to it, in order.
    segments: Vec<Option<Arc<Segment>>>,
}

/// The mailboxes with one rank.
pub(crate) struct Boxes {
    /// It, in the world.
    pub(crate) rank: usize,
    pub(crate) inbox: Inbox,
    pub(crate) outbox: Outbox,
}

impl Mailboxes {
    /// Makes those of messages to `rank`, from `ranks`. All of them call this with the same number;
    /// then, when all have, [`Mailboxes::open`]; then [`Mailboxes::unlink`].
    pub(crate) fn make(number: u64, rank: usize, ranks: Vec<usize>) -> io::Result<Mailboxes> {
        let place = ranks.iter().position(|&one| one == rank);
        let place = place.ok_or(io::ErrorKind::InvalidInput)?;
        if ranks.len() > MOST_RANKS {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let bytes = ranks.len() * RING;
        // MPI and others need this memory too.
        let enough = |left: u64| (ranks.len() * bytes) as u64 <= left / 2;
        let own = Segment::create(name(number, rank), bytes, enough)?;
        let mut segments = vec![None; ranks.len()];
        segments[place] = Some(Arc::new(own));
        Ok(Mailboxes {
            number,
            ranks,
            place,
            segments,
        })
    }

    /// Maps those of the others.
    ///
    /// # Errors
    /// If one of them is not there.
    pub(crate) fn open(&mut self) -> io::Result<()> {
        for (&rank, segment) in self.ranks.iter().zip(&mut self.segments) {
            if segment.is_none() {
                let fits = |bytes| bytes == self.ranks.len() * RING;
                *segment = Some(Arc::new(Segment::open(name(self.number, rank), fits)?));
            }
        }
        Ok(())
    }

    /// Takes the name of the own ones away, once all ranks have mapped them.
    pub(crate) fn unlink(&self) {
        if let Some(own) = &self.segments[self.place] {
            own.unlink();
        }
    }

    /// The boxes with each of them, once all have been mapped.
    pub(crate) fn boxes(self) -> Vec<Boxes> {
        let end = |segment: &Option<Arc<Segment>>, place: usize| {
            Some(End {
                segment: segment.clone()?,
                start: place * RING,
                count: 0,
            })
        };
        let all = self.ranks.iter().zip(&self.segments).enumerate();
        let boxes = all.filter_map(|(place, (&rank, segment))| {
            Some(Boxes {
                rank,
                inbox: Inbox {
                    end: end(&self.segments[self.place], place)?,
                },
                outbox: Outbox {
                    end: end(segment, self.place)?,
                    taken: 0,
                },
            })
        });
        boxes.collect()
    }
}

fn name(number: u64, rank: usize) -> SegmentName {
    SegmentName {
        number,
        rank: Some(rank),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::node::segment::new_number;

    /// Those of some ranks, which have mapped each other's.
    pub(crate) fn mailboxes(ranks: &[usize]) -> Vec<Mailboxes> {
        let number = new_number();
        let make = |&rank: &usize| Mailboxes::make(number, rank, ranks.to_vec()).unwrap();
        let mut all: Vec<_> = ranks.iter().map(make).collect();
        all.iter_mut().for_each(|one| one.open().unwrap());
        all.iter().for_each(Mailboxes::unlink);
        assert!(ranks.iter().all(|&rank| !name(number, rank).exists()));
        all
    }

    /// Those of the first rank with the second, and of the second with the first.
    fn two(first: usize, second: usize) -> [Boxes; 2] {
        let mut all = mailboxes(&[first, second])
            .into_iter()
            .map(Mailboxes::boxes);
        let [mut ones, mut others] = [all.next().unwrap(), all.next().unwrap()];
        [ones.remove(1), others.remove(0)]
    }

    fn of_length(bytes: usize, seed: usize) -> (Envelope, Vec<u8>) {
        let data = (0..bytes).map(|place| (place * 31 + seed) as u8).collect();
        let envelope = Envelope {
            comm: seed % 2,
            tag: i32::MAX - seed as i32,
            code: 30 - seed as i32 % 30,
            after: seed as u64,
            bytes,
        };
        (envelope, data)
    }

    #[test]
    fn messages_of_all_lengths_arrive_in_order() {
        let [mut sends, mut receives] = two(3, 5);
        assert_eq!((sends.rank, receives.rank), (5, 3));
        let places = [PLACE - 1, PLACE, PLACE + 1, 3 * PLACE + 5];
        let lengths = [0, 1, 8, 31, 32, 33, 1000, MOST_BYTES - 1, MOST_BYTES];
        let lengths = [&places[..], &lengths].concat();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..200 {
                    let (envelope, data) = of_length(lengths[round % lengths.len()], round);
                    while !sends.outbox.push(&envelope, &data) {
                        std::thread::yield_now();
                    }
                }
            });
            for round in 0..200 {
                let (envelope, data) = of_length(lengths[round % lengths.len()], round);
                let found = loop {
                    match receives.inbox.first() {
                        Some(found) => break found,
                        None => std::thread::yield_now(),
                    }
                };
                assert_eq!(found, envelope);
                assert_eq!(receives.inbox.take(&found, |data| data.concat()), data);
            }
        });
        assert!(receives.inbox.first().is_none());
    }

    #[test]
    fn a_full_ring_and_a_long_message_are_refused() {
        let [sends, receives] = two(0, 1);
        let (mut outbox, mut inbox) = (sends.outbox, receives.inbox);
        let (envelope, data) = of_length(MOST_BYTES + 1, 1);
        assert!(!outbox.push(&envelope, &data));
        let (envelope, data) = of_length(8, 1);
        for _ in 0..SLOTS {
            assert!(outbox.push(&envelope, &data));
        }
        assert!(!outbox.push(&envelope, &data));
        inbox.take(&envelope, |found| assert_eq!(found.concat(), data));
        assert!(outbox.push(&envelope, &data) && !outbox.push(&envelope, &data));
        // A message of two slots needs two.
        let (longer, long_data) = of_length(PLACE + 1, 2);
        inbox.take(&envelope, |_| ());
        assert!(!outbox.push(&longer, &long_data));
        inbox.take(&envelope, |_| ());
        assert!(outbox.push(&longer, &long_data));
    }

    #[test]
    fn who_cannot_map_all_has_none() {
        let number = new_number();
        let mut one = Mailboxes::make(number, 0, vec![0, 1]).unwrap();
        assert!(one.open().is_err());
        assert!(Mailboxes::make(new_number(), 0, (0..=MOST_RANKS).collect()).is_err());
        assert!(Mailboxes::make(new_number(), 7, vec![0, 1]).is_err());
    }
}
