//! Operations on device memory through the host: copies down, MPI, copies up.
//!
//! A large operation goes in chunks, each of which is an operation on pinned memory of its own.
//! While MPI moves one, the next are copied down and the ones before are copied up. The chunks are
//! the same on all ranks, since they follow from the operation and [`Staging::chunk`], which ranks
//! agree on.
//!
//! Collectives are cut between the elements of a block (`plan`), messages by their bytes
//! (`message/`). Those whose blocks differ in length or number are not cut (`whole`). The launching
//! thread waits for MPI and for the copies down, never for the last copies up: the stream of the
//! program does.

mod collective;
mod message;
mod plan;
mod pool;
mod run;
mod whole;

use std::sync::Arc;

use mpi_shim_abi::Kind;

use crate::device::{Device, DeviceError, Stream};
use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::node::shm_rings::ShmRings;
use crate::operation::Operation;
use crate::transfer::transport::{Done, Transport};
use pool::Pool;
use run::{Run, StagingResources};

/// Operations of at most so many bytes are copied in the program's own stream: there is nothing to
/// overlap, and streams that wait for each other take longer than the copies.
const SHORT: usize = 64 << 10;

/// A device with what staging keeps for it.
pub struct Staging(StagingResources);

impl Staging {
    /// Staging for `device` in chunks of `chunk` bytes.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn new(
        device: Arc<dyn Device>,
        chunk: usize,
        shm_rings: Option<Arc<ShmRings>>,
    ) -> Result<Staging, DeviceError> {
        Ok(Staging(StagingResources {
            down: device.stream()?,
            up: device.stream()?,
            pool: Pool::new(device.clone(), chunk),
            device,
            chunk,
            shm_rings,
        }))
    }

    /// Bytes of a chunk; the same on all ranks.
    pub fn chunk(&self) -> usize {
        self.0.chunk
    }

    /// Executes `op`, whose memory is the device's, in the place of `main` where the program is:
    /// what is in `main` now comes before it, and what comes into it later sees the result.
    pub(crate) fn execute(
        &self,
        op: &Operation<'_>,
        comm: &Communicator,
        main: Stream,
        mpi: &mut dyn Transport,
    ) -> Result<Done, Failure> {
        let is_short = op.send.bytes() + op.recv.bytes() <= SHORT.min(self.0.chunk);
        let run = match is_short {
            true => Ok(Run::within(&self.0, main)),
            false => Run::begin(&self.0, main),
        };
        let run = run?;
        let done = match op.kind {
            Kind::Barrier => {
                // It says that everything before has happened.
                run.drain()?;
                mpi.perform(op)
            }
            Kind::Ibarrier => {
                run.drain()?;
                whole::execute(&run, op, comm, mpi)
            }
            kind if kind.is_message() => message::execute(&run, op, mpi),
            kind if kind.has_counts() || kind.has_neighbors() => {
                whole::execute(&run, op, comm, mpi)
            }
            kind if kind.is_collective() && !kind.is_start() => {
                collective::execute(&run, op, comm, mpi).map(|()| Done::default())
            }
            _ => whole::execute(&run, op, comm, mpi),
        };
        // Also after a failure: memory that copies use must not be given to others before.
        let ended = run.end();
        let done = done?;
        ended?;
        Ok(done)
    }
}

#[cfg(test)]
mod tests;
