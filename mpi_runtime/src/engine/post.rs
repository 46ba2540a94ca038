//! Messages in which ranks tell each other about operations.

#![forbid(unsafe_code)]

use mpi_shim_abi::{Kind, ShimOp};

use crate::error::MpiError;
use crate::mpi::backoff;
use crate::mpi::shim::Shim;

/// Messages between ranks that wait with backoff.
pub(super) struct Post<'a> {
    pub(super) shim: &'a Shim,
    /// Handle of a communicator of our own.
    pub(super) comm: u64,
}

impl Post<'_> {
    /// Sends a few bytes to a rank.
    pub(super) fn send(&self, peer: i32, tag: i32, bytes: &[u8]) -> Result<(), MpiError> {
        // Short enough for every MPI's eager protocol, so it does not wait for the receiver.
        self.shim.send(self.comm, peer, tag, bytes)
    }

    /// Receives what a rank has sent.
    pub(super) fn receive(&self, peer: i32, tag: i32) -> Result<Vec<u8>, MpiError> {
        let wanted = ShimOp {
            source: peer,
            recv_tag: tag,
            ..ShimOp::new(Kind::Recv, self.comm)
        };
        let message = backoff::until(|| self.shim.take(&wanted).transpose())?;
        self.shim.receive_bytes(message)
    }
}

/// Tags of messages that belong to one thing among many, each known by a number of 64 bits: two of
/// them at the same time must not have the same tags. On the communicator of all ranks, whose
/// other tags are lower.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tags {
    /// The largest tag of MPI's, the same on all ranks.
    largest: i32,
}

/// Tags of a channel.
const EACH: i32 = 4;
/// Below them are those that mean one thing only.
const FIRST: i32 = 16;
/// Where MPI has no more tags than every MPI (MPI 4.0, section 9.1.2: 32767).
const FEW: i32 = 8000;
/// Places in programs that have tags of their own at least, where MPI has many tags.
const FEW_PLACES: i32 = 1 << 16;

impl Tags {
    /// Those of an MPI, which runs.
    pub(super) fn of(shim: &Shim) -> Tags {
        Tags::up_to(shim.largest_tag())
    }

    /// Those of an MPI whose largest tag is that.
    pub(super) fn up_to(largest: i32) -> Tags {
        Tags { largest }
    }

    /// How many channels and how many places have tags of their own: all tags above the few, half
    /// of them for each.
    fn many(self) -> Option<(i32, i32)> {
        let half = (self.largest - 2 * FEW_PLACES) / 2;
        (half / EACH > FEW && half > FEW_PLACES).then_some((half / EACH, half))
    }

    /// The first of four tags of a channel.
    pub(super) fn of_channel(self, channel: u64) -> i32 {
        match self.many() {
            Some((channels, _)) => 2 * FEW_PLACES + EACH * spread(channel, channels),
            None => FIRST + EACH * spread(channel, FEW),
        }
    }

    /// The tag of messages of a collective at that place: those of ranks that are at different
    /// places do not match.
    pub(super) fn of_place(self, place: u64) -> i32 {
        match self.many() {
            Some((_, places)) => 2 * FEW_PLACES + places + spread(place, places),
            None => {
                let above_channels = FIRST + EACH * FEW;
                above_channels + spread(place, (self.largest - above_channels).max(1))
            }
        }
    }
}

/// One of `count` numbers: numbers that differ little get different ones.
fn spread(number: u64, count: i32) -> i32 {
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16;
    (mixed % count as u64) as i32
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::{DefaultHasher, Hash, Hasher};

    use super::*;

    /// As those of programs are.
    fn channels(count: u64) -> impl Iterator<Item = u64> {
        (0..count).map(|number| {
            let mut hasher = DefaultHasher::new();
            number.hash(&mut hasher);
            hasher.finish()
        })
    }

    #[test]
    fn channels_have_tags_of_their_own() {
        // MPICH 4.0 and Open MPI 4.1.
        for largest in [(1 << 28) - 1, i32::MAX] {
            let tags = Tags::up_to(largest);
            let mut all = HashSet::new();
            for channel in channels(300) {
                let first = tags.of_channel(channel);
                assert!((2 * FEW_PLACES..=largest - EACH).contains(&first));
                assert!((first..first + EACH).all(|tag| all.insert(tag)), "{first}");
                let place = tags.of_place(channel);
                assert!((2 * FEW_PLACES..=largest).contains(&place));
                assert!(all.insert(place), "{place}");
            }
        }
    }

    #[test]
    fn where_there_are_few_tags_they_fit() {
        for largest in [32767, 2 * FEW_PLACES, 3 * FEW_PLACES] {
            let tags = Tags::up_to(largest);
            let fit = |channel| (FIRST..=32767 - EACH).contains(&tags.of_channel(channel));
            assert!(channels(1000).all(fit));
            let places = FIRST + EACH * FEW..=largest;
            assert!(channels(1000).all(|place| places.contains(&tags.of_place(place))));
        }
    }
}
