//! What is said of a long message before it comes.

#![forbid(unsafe_code)]

use crate::node::shm_ring::ShmRing;
use crate::transfer::staging::run::StagingResources;

/// A rendezvous header begins with this. Of arrays only one of 25 bytes that begin so could be
/// taken for one.
const MAGIC: [u8; 5] = *b"MPIc\x02";
/// Then come the message's bytes, and the sender's rank in the world and the place in its
/// shared-memory ring.
pub(crate) const HEADER_BYTES: usize =
    MAGIC.len() + size_of::<u64>() + size_of::<u32>() + size_of::<u64>();
/// In place of a rank: the data come as messages.
pub(super) const BY_MPI: u32 = u32::MAX;

/// What is said of a message before it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RendezvousHeader {
    pub(crate) bytes: usize,
    pub(super) sender: u32,
    pub(super) place: u64,
}

impl RendezvousHeader {
    pub(super) fn text(self) -> [u8; HEADER_BYTES] {
        let bytes = (self.bytes as u64).to_le_bytes();
        let (sender, place) = (self.sender.to_le_bytes(), self.place.to_le_bytes());
        let all = MAGIC.into_iter().chain(bytes).chain(sender).chain(place);
        let mut text = [0; HEADER_BYTES];
        text.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        text
    }

    /// The rendezvous header that a message in `memory` is, if it is one.
    pub(crate) fn read(memory: &[u8]) -> Option<RendezvousHeader> {
        let text = memory.strip_prefix(&MAGIC)?;
        let (bytes, text) = text.split_first_chunk()?;
        let (sender, text) = text.split_first_chunk()?;
        Some(RendezvousHeader {
            bytes: usize::try_from(u64::from_le_bytes(*bytes)).ok()?,
            sender: u32::from_le_bytes(*sender),
            place: u64::from_le_bytes(text.try_into().ok()?),
        })
    }
}

impl RendezvousHeader {
    /// Where the message comes from, and its places: from the first to behind the last. None if it
    /// comes by MPI.
    pub(super) fn slots<'s>(
        &self,
        staging: &'s StagingResources,
    ) -> Option<Result<(&'s ShmRing, u64, u64), ()>> {
        if self.sender == BY_MPI {
            return None;
        }
        let shm_rings = staging.shm_rings.as_ref();
        let shm_ring = shm_rings.and_then(|shm_rings| shm_rings.of(self.sender as usize));
        Some(shm_ring.ok_or(()).map(|shm_ring| {
            let end = self.place + shm_ring.places(self.bytes);
            (shm_ring, self.place, end)
        }))
    }

    /// Nobody receives the message.
    pub(crate) fn refuse(&self, staging: &StagingResources) {
        if let Some(Ok((shm_ring, first, end))) = self.slots(staging) {
            shm_ring.drain(first, end);
        }
    }
}
