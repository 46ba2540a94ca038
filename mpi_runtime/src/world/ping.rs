//! What `python -m mpi_cuda doctor` asks of a world: what the ranks know, and how long messages
//! between two of them take.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use crate::error::MpiError;
use crate::mpi::communicators::DEFAULT;
use crate::mpi::shim::Shim;
use crate::world::World;

/// The tag of the messages; nothing else is on its way meanwhile.
const TAG: i32 = 0;

impl World {
    /// The bytes of all ranks, one after the other, of which each has as many; collective.
    ///
    /// # Errors
    /// If MPI fails.
    pub fn gather(&self, own: &[u8]) -> Result<Vec<u8>, MpiError> {
        let Some((shim, comm)) = self.by_mpi() else {
            return Ok(own.to_vec());
        };
        let mut all = vec![0; own.len() * self.size as usize];
        shim.gather(comm, own, &mut all)?;
        Ok(all)
    }

    /// How long a message of so many bytes takes to `peer`, which calls this too: half of a round
    /// there and back, of which there are `rounds`, and one before them that does not count.
    ///
    /// # Errors
    /// If there is no such other rank, or MPI fails.
    pub fn ping(&self, peer: i32, bytes: usize, rounds: u32) -> Result<Duration, MpiError> {
        let other = (0..self.size).contains(&peer) && peer != self.rank;
        let Some((shim, comm)) = self.by_mpi().filter(|_| other && rounds > 0) else {
            return Err(MpiError(format!("there is no other rank {peer} to ask")));
        };
        // Filled, so that no page is touched for the first time while it counts.
        let (out, mut back) = (vec![1; bytes], vec![2; bytes]);
        let mut round = || match self.rank < peer {
            true => {
                shim.send(comm, peer, TAG, &out)?;
                shim.receive(comm, peer, TAG, &mut back)
            }
            false => {
                shim.receive(comm, peer, TAG, &mut back)?;
                shim.send(comm, peer, TAG, &out)
            }
        };
        round()?;
        let start = Instant::now();
        for _ in 0..rounds {
            round()?;
        }
        Ok(start.elapsed() / (2 * rounds))
    }

    fn by_mpi(&self) -> Option<(Shim, u64)> {
        let comm = self.engine.communicators.get(DEFAULT)?;
        Some((self.shim?, comm.handle))
    }
}
