//! The world: which MPI, who we are in it, and the engine over it.

mod output;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mpi_shim_abi::{Datatype, Kind, Reduction, ShimOp};

use crate::engine::{Engine, EngineOptions};
use crate::error::StartError;
use crate::mpi::communicators::{Communicator, DEFAULT, NAMES, SELF};
use crate::mpi::family::{self, Family};
use crate::mpi::launcher::{self, Launched};
use crate::mpi::shim::{self, MpiError, MpiState, Shim};
use crate::node::rendezvous::Rendezvous;
use crate::node::segment;
use crate::node::shm_ring::ShmRings;
use crate::transfer::choice::{self as transfer, Asked, Aware, Choice, Mode, ProbeResult, Through};
use crate::transfer::probe_result::ProbeResults;

/// How to find the world.
#[derive(Clone, Debug)]
pub struct WorldOptions {
    /// `MPI_CUDA_MPI`.
    pub family: Option<Family>,
    /// Where the shims are.
    pub shim_folders: Vec<PathBuf>,
    /// `MPI_CUDA_SINGLETON`: a world of size 1 is meant, whatever the launcher says.
    pub singleton: bool,
    /// `MPI_CUDA_WARN_AFTER`.
    pub warn_after: Duration,
    /// `MPI_CUDA_PART_BYTES`.
    pub part_bytes: i64,
    /// For devices with memory of their own.
    pub device: Option<DeviceOptions>,
    /// `MPI_CUDA_LOG=debug`: say for each operation what served it.
    pub verbose: bool,
}

impl WorldOptions {
    fn engine(&self) -> EngineOptions {
        EngineOptions {
            warn_after: self.warn_after,
            verbose: self.verbose,
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

/// What is known on all ranks: nodes may have files of their own.
fn weakest(
    own: ProbeResult,
    largest: &dyn Fn(u64) -> Result<u64, StartError>,
) -> Result<ProbeResult, StartError> {
    let doubt = match own {
        ProbeResult::Works(Through::Arrays) => 0,
        ProbeResult::Works(Through::Copies) => 1,
        ProbeResult::None => 2,
        ProbeResult::Fails(_) => 3,
    };
    Ok(match largest(doubt)? {
        most if most == doubt => own,
        1 => ProbeResult::Works(Through::Copies),
        2 => ProbeResult::None,
        _ => ProbeResult::Fails("on another rank".into()),
    })
}

/// This process's place among the ranks.
pub struct World {
    /// Rank in `COMM_WORLD`.
    pub rank: i32,
    /// Size of `COMM_WORLD`.
    pub size: i32,
    /// Number of lower ranks on this node.
    pub node_rank: i32,
    /// Number of ranks on this node.
    pub node_size: i32,
    /// MPI library and version, or "no MPI".
    pub library: String,
    /// MPI's thread level.
    pub thread_level: &'static str,
    /// How data in device memory travel; none where the host has them.
    pub transfer: Option<Choice>,
    /// There are more ranks than cores on some node.
    pub oversubscribed: bool,
    /// Memory shared by the ranks of this node, where they stage.
    pub shm_rings: Option<Arc<ShmRings>>,
    /// The engine.
    pub engine: Engine,
    shim: Option<Shim>,
    /// We initialised MPI, so we finalize it.
    owns_mpi: bool,
}

/// Marks the environment of a rank, so that its children know that they are none. Holds the
/// process id and the rank's identity by its launcher.
const RANK_MARK: &str = "MPI_CUDA_RANK_PROCESS";

impl World {
    /// Finds the MPI, joins its world, and duplicates the communicators we need. Collective.
    pub fn start(options: &WorldOptions) -> Result<World, StartError> {
        let launched = launcher::detect(|name| std::env::var(name).ok());
        refuse_child(launched.as_ref())?;
        let launched_size = launched.as_ref().map_or(1, |launched| launched.size);
        let shim = load_shim(options, launched.as_ref(), launched_size)?;
        let Some(shim) = shim else {
            return Ok(Self::single_rank(options));
        };
        let library = shim.library_version();
        let owns_mpi = match shim.state() {
            MpiState::NotStarted => {
                shim.init().map_err(mpi_error("MPI_Init_thread"))?;
                true
            }
            MpiState::Running => false,
            MpiState::Finalized => return Err(StartError::Finalized),
        };
        let thread_level = shim.thread_level();
        if thread_level != "multiple" {
            return Err(StartError::ThreadLevel {
                level: thread_level,
            });
        }
        let (rank, size, _) = shim
            .comm_info(shim.comm_world())
            .map_err(mpi_error("MPI_Comm_rank"))?;
        if size == 1 && launched_size > 1 && !options.singleton {
            let launcher = launched.map_or("", |launched| launched.launcher);
            return Err(StartError::WrongLauncher {
                launched: launched_size,
                launcher,
                library,
            });
        }
        let mut engine = Engine::new(Some(shim), rank, options.engine());
        for (name, number) in NAMES {
            let of = if number == SELF {
                shim.comm_self()
            } else {
                shim.comm_world()
            };
            let private = shim.comm_dup(of).map_err(mpi_error("MPI_Comm_dup"))?;
            let (rank, size) = if number == SELF { (0, 1) } else { (rank, size) };
            let row = Communicator {
                name,
                handle: private,
                user_handle: of,
                rank,
                size,
                freed: false,
            };
            engine.communicators.add(number, row);
        }
        let Some(everybody) = engine.communicators.get(DEFAULT) else {
            unreachable!("added above");
        };
        let (node_rank, node_size, cores) = shim
            .node(shim.comm_world())
            .map_err(mpi_error("MPI_Comm_split_type"))?;
        // All ranks must wait in the same way, since nonblocking collectives do not match blocking
        // ones (MPI 4.0, section 6.12).
        let agree = mpi_error("MPI_Allreduce");
        let oversubscribed =
            max_over_ranks(&shim, &everybody, u64::from(node_size > cores)).map_err(&agree)? != 0;
        let same = |variable: &'static str, own: u64| {
            let largest = max_over_ranks(&shim, &everybody, own).map_err(&agree)?;
            let smallest =
                u64::MAX - max_over_ranks(&shim, &everybody, u64::MAX - own).map_err(&agree)?;
            if smallest == largest {
                return Ok(());
            }
            Err(StartError::Disagree {
                variable,
                rank,
                smallest,
                largest,
                own,
            })
        };
        same("MPI_CUDA_PART_BYTES", options.part_bytes as u64)?;
        same(
            "the memory of arrays (MPI_CUDA_DEVICE: 0 the host's, 1 a GPU's)",
            u64::from(options.device.is_some()),
        )?;
        let transfer = match &options.device {
            Some(device) => {
                same("MPI_CUDA_CHUNK_BYTES", device.chunk_bytes as u64)?;
                let own = match device.trying {
                    Some(through) => ProbeResult::Works(through),
                    None => device.probe_results.read(&library),
                };
                let probe_result = weakest(own, &|number| {
                    max_over_ranks(&shim, &everybody, number).map_err(&agree)
                })?;
                let aware = device.aware.unwrap_or_else(|| shim.cuda_aware());
                let choice = transfer::choose(device.asked, &library, aware, &probe_result);
                // A rank that cannot go on must not leave the others waiting.
                let mode = choice.as_ref().map_or(2, |choice| match choice.mode {
                    Mode::Direct(_) => 0,
                    Mode::Staged => 1,
                });
                same(
                    "the transfer (MPI_CUDA_TRANSFER: 0 direct, 1 staged, 2 not possible)",
                    mode,
                )?;
                Some(choice?)
            }
            None => None,
        };
        shim.configure(oversubscribed, options.part_bytes);
        let stages = transfer
            .as_ref()
            .is_some_and(|choice| choice.mode == Mode::Staged);
        let shm_rings = match &options.device {
            // The ranks agree on the transfer, and all of them or none come here.
            Some(device) if size > 1 && stages => {
                let chunk = device.shm_ring.then_some(device.chunk_bytes);
                let shm_rings = share_shm_rings(&shim, &everybody, [rank, size, node_size], chunk);
                Some(Arc::new(shm_rings.map_err(&agree)?))
            }
            _ => None,
        };
        if size > 1 && node_size == size {
            engine.rendezvous = share_rendezvous(&shim, &everybody, rank as usize, size as usize)
                .map_err(&agree)?;
        }
        mark_rank(launched.as_ref());
        Ok(World {
            rank,
            size,
            node_rank,
            node_size,
            library,
            thread_level,
            transfer,
            oversubscribed,
            shm_rings,
            engine,
            shim: Some(shim),
            owns_mpi,
        })
    }

    /// The largest of the ranks' numbers; collective, and of nothing but memory of the host.
    ///
    /// # Errors
    /// If MPI fails.
    pub fn largest(&self, own: u64) -> Result<u64, MpiError> {
        match (&self.shim, self.engine.communicators.get(DEFAULT)) {
            (Some(shim), Some(everybody)) => max_over_ranks(shim, &everybody, own),
            _ => Ok(own),
        }
    }

    /// A world of size 1 without MPI.
    fn single_rank(options: &WorldOptions) -> World {
        let engine = Engine::new(None, 0, options.engine());
        for (name, number) in NAMES {
            engine.communicators.add(
                number,
                Communicator {
                    name,
                    handle: 0,
                    user_handle: 0,
                    rank: 0,
                    size: 1,
                    freed: false,
                },
            );
        }
        World {
            rank: 0,
            size: 1,
            node_rank: 0,
            node_size: 1,
            library: "no MPI".into(),
            thread_level: "none",
            oversubscribed: false,
            shm_rings: None,
            transfer: options.device.as_ref().map(|_| Choice {
                mode: Mode::Staged,
                reason: "there is no MPI".into(),
            }),
            engine,
            shim: None,
            owns_mpi: false,
        }
    }

    /// The MPI family in use.
    pub fn family(&self) -> Option<Family> {
        self.shim.map(|shim| shim.family)
    }

    /// Ends the whole job, once the launcher has read what this rank printed.
    pub fn abort(&self, code: i32) -> ! {
        output::wait_until_read();
        if let Some(shim) = &self.shim
            && shim.state() == MpiState::Running
        {
            shim.abort(code);
        }
        std::process::exit(code)
    }

    /// Waits for everything dispatched and, if we initialised MPI, finalizes it. Call once, last.
    pub fn shutdown(&self) {
        self.engine.wait_idle();
        let Some(shim) = &self.shim else { return };
        if shim.state() == MpiState::Running {
            self.engine.finish_messages();
        }
        if self.owns_mpi && shim.state() == MpiState::Running {
            // An error here has no one left to hear it but the user at the terminal.
            if let Err(error) = shim.finalize() {
                eprintln!(
                    "mpi_cuda: MPI_Finalize failed on rank {}: {}",
                    self.rank, error.0
                );
            }
        }
    }
}

/// The largest `mine` of all ranks.
fn max_over_ranks(shim: &Shim, comm: &Communicator, mine: u64) -> Result<u64, MpiError> {
    let mut largest = 0u64;
    shim.execute(&ShimOp {
        kind: Kind::Allreduce,
        datatype: Datatype::U64,
        recv_datatype: Datatype::U64,
        reduction: Reduction::Max,
        user_reduction: 0,
        comm: comm.handle,
        count: 1,
        recv_count: 1,
        dest: 0,
        source: 0,
        send_tag: 0,
        recv_tag: 0,
        send: std::ptr::from_ref(&mine).cast(),
        recv: std::ptr::from_mut(&mut largest).cast(),
        status: std::ptr::null_mut(),
    })?;
    Ok(largest)
}

/// Memory in which the ranks meet, or none if they cannot share any. Collective.
fn share_rendezvous(
    shim: &Shim,
    comm: &Communicator,
    rank: usize,
    size: usize,
) -> Result<Option<Rendezvous>, MpiError> {
    let own = if rank == 0 { segment::new_number() } else { 0 };
    let made = (rank == 0).then(|| Rendezvous::create(own, size));
    let number = max_over_ranks(shim, comm, own)?;
    let rendezvous = made.unwrap_or_else(|| Rendezvous::open(number, rank, size));
    // In containers of their own, ranks of one node have nothing to share.
    let failed = max_over_ranks(shim, comm, u64::from(rendezvous.is_err()))? != 0;
    if let Ok(rendezvous) = &rendezvous {
        rendezvous.unlink();
    }
    Ok(rendezvous.ok().filter(|_| !failed))
}

/// The shared-memory rings of this node's ranks; a rank makes one for messages in parts of `chunk` bytes, if any.
/// Collective.
fn share_shm_rings(
    shim: &Shim,
    comm: &Communicator,
    [rank, size, node_size]: [i32; 3],
    chunk: Option<usize>,
) -> Result<ShmRings, MpiError> {
    let own = if rank == 0 { segment::new_number() } else { 0 };
    let number = max_over_ranks(shim, comm, own)?;
    let mut shm_rings = ShmRings::make(
        number,
        rank as usize,
        size as usize,
        node_size as usize,
        chunk,
    );
    max_over_ranks(shim, comm, 0)?;
    shm_rings.open();
    max_over_ranks(shim, comm, 0)?;
    shm_rings.unlink();
    Ok(shm_rings)
}

fn mpi_error(call: &'static str) -> impl Fn(MpiError) -> StartError {
    move |error| StartError::Mpi {
        call,
        text: error.0,
    }
}

/// The first shim that loads; none is an error only if there should be more than one rank.
fn load_shim(
    options: &WorldOptions,
    launched: Option<&Launched>,
    launched_size: usize,
) -> Result<Option<Shim>, StartError> {
    let families = family::candidates(
        &shim::loaded_libraries(),
        launched.and_then(|launched| launched.family),
        options.family,
    )?;
    let mut first_error = None;
    for &family in &families {
        match Shim::load(family, &options.shim_folders) {
            Ok(shim) => return Ok(Some(shim)),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    let Some(error) = first_error else {
        return Ok(None);
    };
    match launched {
        Some(launched) if launched_size > 1 && !options.singleton => Err(StartError::NoShim {
            launched: launched_size,
            launcher: launched.launcher,
            family: families[0].name(),
            reason: error.to_string(),
        }),
        _ if options.family.is_some() => Err(error),
        _ => Ok(None),
    }
}

fn identity(launched: Option<&Launched>) -> &str {
    launched.map_or("", |launched| launched.identity.as_str())
}

/// A child of a rank inherits the launcher's variables; as a second copy of that rank it would
/// hang or corrupt the job.
fn refuse_child(launched: Option<&Launched>) -> Result<(), StartError> {
    let Ok(mark) = std::env::var(RANK_MARK) else {
        return Ok(());
    };
    let Some((pid, marked)) = mark.split_once(' ') else {
        return Ok(());
    };
    let (pid, own) = (pid.parse().unwrap_or(0), std::process::id());
    if launched.is_some() && marked == identity(launched) && pid != own {
        return Err(StartError::Child {
            pid: own,
            parent: pid,
        });
    }
    Ok(())
}

fn mark_rank(launched: Option<&Launched>) {
    let mark = format!("{} {}", std::process::id(), identity(launched));
    // SAFETY: Rust and Python read the environment under locks of their own; this runs while one
    // thread creates the backend, as `MPI_Init` itself (which also sets variables) does.
    unsafe { std::env::set_var(RANK_MARK, mark) };
}
