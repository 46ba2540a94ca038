//! What a world is started with.

#![forbid(unsafe_code)]

use std::time::Duration;

use crate::engine::EngineOptions;
use crate::engine::recorder::file::RecordOptions;
use crate::mpi::shim::Aware;
use crate::transfer::choice::{Asked, Through};
use crate::transfer::probe_result::ProbeResults;
use crate::world::library::LibraryOptions;

/// How to find the world.
#[derive(Clone, Debug)]
pub struct WorldOptions {
    /// Which MPI, and where the shims are.
    pub library: LibraryOptions,
    /// `MPI_CUDA_SINGLETON`: a world of size 1 is meant, whatever the launcher says.
    pub singleton: bool,
    /// `MPI_CUDA_WARN_AFTER`.
    pub warn_after: Duration,
    /// `MPI_CUDA_ABORT_AFTER`.
    pub abort_after: Option<Duration>,
    /// `MPI_CUDA_PART_BYTES`.
    pub part_bytes: i64,
    /// `MPI_CUDA_TOPOLOGY=local`: each rank shows its own device alone.
    pub local_topology: bool,
    /// `MPI_CUDA_LOCAL_DEVICES`: how many devices each rank has.
    pub local_devices: i32,
    /// `MPI_CUDA_SHM_COLLECTIVES`: ranks of a node execute collectives in memory that they share.
    pub shm_collectives: bool,
    /// `MPI_CUDA_SHM_MESSAGES`: they send each other short messages in such memory.
    pub shm_messages: bool,
    /// `MPI_CUDA_OVERLAP`, as a number that the ranks compare.
    pub overlap: u64,
    /// `MPI_CUDA_CHECK`: compare every operation between nodes.
    pub check: bool,
    /// Where the last operations are written.
    pub record: Option<RecordOptions>,
    /// For devices with memory of their own.
    pub device: Option<DeviceOptions>,
    /// `MPI_CUDA_PRETEND_NODES`: ranks behave as if they were on so many nodes (tests).
    pub pretend_nodes: Option<i32>,
    /// `MPI_CUDA_LOG=debug`: say for each operation what served it.
    pub verbose: bool,
}

impl WorldOptions {
    /// Those of the engine.
    pub(super) fn engine(&self) -> EngineOptions {
        EngineOptions {
            verbose: self.verbose,
            part_bytes: self.part_bytes,
        }
    }
}

/// What ranks with device memory agree on.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// `MPI_CUDA_TRANSFER`.
    pub asked: Asked,
    /// `MPI_CUDA_CHUNK_BYTES`.
    pub chunk_bytes: usize,
    /// `MPI_CUDA_SHM_RING`.
    pub shm_ring: bool,
    /// What MPI is taken to say of its support for CUDA, if not asked (tests).
    pub aware: Option<Aware>,
    /// Where to look up what is known of direct transfer.
    pub probe_results: ProbeResults,
    /// Tried now, so taken for proven.
    pub trying: Option<Through>,
}
