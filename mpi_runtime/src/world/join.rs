//! Joining the world of an MPI: which library, who this process is in it, and communicators of our
//! own.

#![forbid(unsafe_code)]

use mpi_shim_abi::CODE_BITS;

use crate::engine::{ByMpi, Series};
use crate::error::{MpiError, StartError};
use crate::mpi::communicators::{COLLECTIVES, Communicator, Communicators, DEFAULT, NAMES, SELF};
use crate::mpi::family::Family;
use crate::mpi::launcher::Launched;
use crate::mpi::shim::{MpiState, Shim};
use crate::world::environment;
use crate::world::library::MpiLibrary;
use crate::world::options::WorldOptions;

/// This process in the world of its MPI.
pub(super) struct Joined {
    pub(super) rank: i32,
    pub(super) size: i32,
    pub(super) library: String,
    pub(super) thread_level: &'static str,
    /// We initialised MPI.
    pub(super) owns_mpi: bool,
}

/// Initialises MPI, if nobody has, and looks who this process is.
pub(super) fn join(
    shim: &Shim,
    mpi: &MpiLibrary,
    options: &WorldOptions,
    launched: Option<&Launched>,
) -> Result<Joined, StartError> {
    let library = shim.library_version();
    let owns_mpi = match shim.state() {
        MpiState::NotStarted => {
            init(shim, options, launched)?;
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
    match launched {
        Some(launched) if size == 1 && launched.size > 1 && !options.singleton => {
            Err(StartError::WrongLauncher {
                launched: launched.size,
                launcher: launched.launcher,
                library,
                file: mpi.file.display().to_string(),
                by: mpi.by,
            })
        }
        _ => Ok(Joined {
            rank,
            size,
            library,
            thread_level,
            owns_mpi,
        }),
    }
}

/// Initialises MPI.
fn init(
    shim: &Shim,
    options: &WorldOptions,
    launched: Option<&Launched>,
) -> Result<(), StartError> {
    // Alone, Open MPI 4 starts a daemon, and ends the process if it finds no program that could
    // reach other nodes. The other variables choose a way too.
    let named = ["OMPI_MCA_plm_rsh_agent", "OMPI_MCA_ess_singleton_isolated"];
    let isolated = launched.is_none()
        && shim.family == Family::OpenMpi
        && !environment::has_program(&["ssh", "rsh"])
        && named.iter().all(|name| std::env::var_os(name).is_none());
    let init = || shim.init().map_err(mpi_error("MPI_Init_thread"));
    match launched.filter(|launched| launched.without_pmi && shim.family == Family::OpenMpi) {
        Some(&Launched { size, .. }) if size > 1 && !options.singleton => {
            Err(StartError::WithoutPmi { launched: size })
        }
        // It takes any task of Slurm's for a rank of a job, and ends it if it finds no PMI.
        Some(_) => environment::without("SLURM_NODELIST", init),
        None if isolated => environment::with("OMPI_MCA_plm", "isolated", init),
        None => init(),
    }
}

/// Makes the communicators that always exist, as private duplicates; that of all ranks. Collective.
pub(super) fn duplicate(
    shim: &Shim,
    joined: &Joined,
    communicators: &Communicators,
) -> Result<Communicator, StartError> {
    let mut everybody = None;
    for (name, number) in NAMES {
        let (of, rank, size) = match number {
            SELF => (shim.comm_self(), 0, 1),
            _ => (shim.comm_world(), joined.rank, joined.size),
        };
        let row = Communicator {
            name,
            handle: shim.comm_dup(of).map_err(mpi_error("MPI_Comm_dup"))?,
            user_handle: of,
            rank,
            size,
            members: &[],
            largest_tag: match number {
                COLLECTIVES => 0,
                // A communicator of our own: nobody else sees its tags.
                _ => shim.largest_tag() >> CODE_BITS,
            },
            freed: false,
        };
        communicators.add(number, row);
        if number == DEFAULT {
            everybody = Some(row);
        }
    }
    Ok(everybody.unwrap_or_else(|| unreachable!("it is one of them")))
}

/// Communicators for what ranks of several nodes tell each other, one for each [`Series`].
/// Collective.
pub(super) fn duplicates_to_compare(shim: &Shim, joined: &Joined) -> Result<ByMpi, StartError> {
    let duplicate = |_| shim.comm_dup(shim.comm_world());
    let comms = Series::ALL.map(duplicate).into_iter();
    Ok(ByMpi {
        shim: *shim,
        comms: comms
            .collect::<Result<_, _>>()
            .map_err(mpi_error("MPI_Comm_dup"))?,
        size: joined.size as usize,
    })
}

pub(super) fn mpi_error(call: &'static str) -> impl Fn(MpiError) -> StartError {
    move |error| StartError::Mpi { call, error }
}
