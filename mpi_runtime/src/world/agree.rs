//! What the ranks agree on before the first operation: how they wait, how large parts are, and how
//! data in device memory travel.

#![forbid(unsafe_code)]

use crate::engine::recorder::clock;
use crate::error::{MpiError, StartError};
use crate::mpi::communicators::Communicator;
use crate::mpi::shim::Shim;
use crate::transfer::choice::{self as transfer, Choice, Mode, ProbeResult, Through};
use crate::world::join::{Joined, mpi_error};
use crate::world::options::{DeviceOptions, WorldOptions};

/// What they agree on, and what follows from where they run.
pub(super) struct Agreed {
    /// Which of the nodes that ranks pretend to be on; 0 if they do not.
    pub(super) pretended: u64,
    pub(super) node_rank: i32,
    pub(super) node_size: i32,
    /// There are more ranks than cores on some node.
    pub(super) oversubscribed: bool,
    pub(super) transfer: Option<Choice>,
    /// The last rank's start in nanoseconds since 1970, which names the job.
    pub(super) job: u64,
}

impl Agreed {
    /// The number for what the ranks of this node share, from one of the whole job.
    pub(super) fn of_node(&self, number: u64) -> u64 {
        number.wrapping_add(self.pretended)
    }
}

/// Agrees, or says what differs. Collective.
pub(super) fn agree(
    ranks: &AllRanks<'_>,
    options: &WorldOptions,
    joined: &Joined,
) -> Result<Agreed, StartError> {
    let shim = ranks.shim;
    let (mut node_rank, mut node_size, cores) = shim
        .node(shim.comm_world())
        .map_err(mpi_error("MPI_Comm_split_type"))?;
    // All ranks must wait in the same way, since nonblocking collectives do not match blocking
    // ones (MPI 4.0, section 6.12).
    let oversubscribed = ranks.most(u64::from(node_size > cores))? != 0;
    let mut pretended = 0;
    if let Some(nodes) = options.pretend_nodes {
        let node = |rank: i32| i64::from(rank) * i64::from(nodes) / i64::from(joined.size);
        let own = node(joined.rank);
        let of_node = (0..joined.size).filter(|&rank| node(rank) == own);
        node_size = of_node.clone().count() as i32;
        node_rank = of_node.filter(|&rank| rank < joined.rank).count() as i32;
        pretended = own as u64;
    }
    ranks.same("MPI_CUDA_PART_BYTES", options.part_bytes as u64)?;
    ranks.same("MPI_CUDA_CHECK", options.check.into())?;
    ranks.same("MPI_CUDA_SHM_COLLECTIVES", options.shm_collectives.into())?;
    ranks.same("MPI_CUDA_SHM_MESSAGES", options.shm_messages.into())?;
    ranks.same("MPI_CUDA_OVERLAP (0, 1 nodes, 2 always)", options.overlap)?;
    ranks.same(
        "MPI_CUDA_TOPOLOGY (0 global, 1 local)",
        options.local_topology.into(),
    )?;
    ranks.same("MPI_CUDA_LOCAL_DEVICES", options.local_devices as u64)?;
    ranks.same(
        "the memory of arrays (MPI_CUDA_DEVICE: 0 the host's, 1 a GPU's)",
        u64::from(options.device.is_some()),
    )?;
    let device = options.device.as_ref();
    Ok(Agreed {
        pretended,
        node_rank,
        node_size,
        oversubscribed,
        transfer: device
            .map(|device| agree_on_transfer(ranks, device, &joined.library))
            .transpose()?,
        job: ranks.most(clock::first().wall)?,
    })
}

fn agree_on_transfer(
    ranks: &AllRanks<'_>,
    device: &DeviceOptions,
    library: &str,
) -> Result<Choice, StartError> {
    ranks.same("MPI_CUDA_CHUNK_BYTES", device.chunk_bytes as u64)?;
    let own = match device.trying {
        Some(through) => ProbeResult::Works(through),
        None => device.probe_results.read(library),
    };
    let probe_result = weakest(ranks, own)?;
    let aware = device.aware.unwrap_or_else(|| ranks.shim.cuda_aware());
    let choice = transfer::choose(device.asked, library, aware, &probe_result);
    // A rank that cannot go on must not leave the others waiting.
    let mode = choice.as_ref().map_or(2, |choice| match choice.mode {
        Mode::Direct(_) => 0,
        Mode::Staged => 1,
    });
    ranks.same(
        "the transfer (MPI_CUDA_TRANSFER: 0 direct, 1 staged, 2 not possible)",
        mode,
    )?;
    Ok(choice?)
}

/// What is known on all ranks: nodes may have files of their own.
fn weakest(ranks: &AllRanks<'_>, own: ProbeResult) -> Result<ProbeResult, StartError> {
    let doubt = match own {
        ProbeResult::Works(Through::Arrays) => 0,
        ProbeResult::Works(Through::Copies) => 1,
        ProbeResult::None => 2,
        ProbeResult::Fails(_) => 3,
    };
    Ok(match ranks.most(doubt)? {
        most if most == doubt => own,
        1 => ProbeResult::Works(Through::Copies),
        2 => ProbeResult::None,
        _ => ProbeResult::Fails("on another rank".into()),
    })
}

/// All ranks of the world, asked for numbers.
pub(super) struct AllRanks<'a> {
    pub(super) shim: &'a Shim,
    pub(super) comm: Communicator,
}

impl AllRanks<'_> {
    /// The largest of the ranks' numbers; collective.
    pub(super) fn largest(&self, own: u64) -> Result<u64, MpiError> {
        let [largest] = self.largest_of(&[own])?;
        Ok(largest)
    }

    /// The same of several numbers, each by itself.
    pub(super) fn largest_of<const COUNT: usize>(
        &self,
        own: &[u64; COUNT],
    ) -> Result<[u64; COUNT], MpiError> {
        let mut largest = [0; COUNT];
        self.shim.largest(self.comm.handle, own, &mut largest)?;
        Ok(largest)
    }

    /// The same at start.
    pub(super) fn most(&self, own: u64) -> Result<u64, StartError> {
        self.largest(own).map_err(mpi_error("MPI_Allreduce"))
    }

    /// Refuses a value that differs between ranks.
    fn same(&self, variable: &'static str, own: u64) -> Result<(), StartError> {
        let largest = self.most(own)?;
        let smallest = u64::MAX - self.most(u64::MAX - own)?;
        if smallest == largest {
            return Ok(());
        }
        Err(StartError::Disagree {
            variable,
            rank: self.comm.rank,
            smallest,
            largest,
            own,
        })
    }
}
