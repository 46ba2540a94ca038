//! Errors of the engine: each says what failed, where, and what the user can do.

#![forbid(unsafe_code)]

use std::borrow::Cow;

use thiserror::Error;

use crate::device::DeviceError;

/// An operation that could not be done.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("mpi_cuda: {operation} failed on rank {rank} of {comm} ({size} ranks): {reason}")]
pub struct OperationError {
    /// What was asked for, with dtype, shape, peer and tag.
    pub operation: String,
    /// Rank of this process in the communicator; −1 if the communicator is unknown.
    pub rank: i32,
    /// Name of the communicator.
    pub comm: String,
    /// Its number of ranks.
    pub size: i32,
    /// What went wrong, and the remedy.
    pub reason: Failure,
}

/// Why something could not be done, on its way to an [`OperationError`]. It is one pointer: results
/// that are moved through memory cost each operation more than all of its checks.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(transparent)]
pub struct Failure(Box<Cause>);

#[derive(Clone, Debug, Error, PartialEq, Eq)]
enum Cause {
    /// MPI failed.
    #[error(transparent)]
    Mpi(MpiError),
    /// The device failed.
    #[error(transparent)]
    Device(DeviceError),
    /// What is wrong with what was asked for, or with what came of it.
    #[error("{0}")]
    Refused(Cow<'static, str>),
}

impl From<MpiError> for Failure {
    fn from(error: MpiError) -> Failure {
        Failure(Box::new(Cause::Mpi(error)))
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Failure {
        Failure(Box::new(Cause::Device(error)))
    }
}

impl From<String> for Failure {
    fn from(text: String) -> Failure {
        Failure(Box::new(Cause::Refused(text.into())))
    }
}

/// With the dynamic loader's own words, which the error keeps apart.
impl From<libloading::Error> for Failure {
    fn from(error: libloading::Error) -> Failure {
        match std::error::Error::source(&error) {
            Some(source) => source.to_string().into(),
            None => error.to_string().into(),
        }
    }
}

impl From<&'static str> for Failure {
    fn from(text: &'static str) -> Failure {
        Failure(Box::new(Cause::Refused(text.into())))
    }
}

/// A failed MPI call: MPI's own text.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct MpiError(pub String);

/// The world could not be set up.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum StartError {
    #[error(
        "this process is one of {launched} by its launcher ({launcher}), but {library} ({file}: \
         {by}) sees a world of size 1: start the job with the launcher of that MPI (`srun \
         --mpi=pmix` for Open MPI, `--mpi=pmi2` for MPICH), or choose the launcher's MPI; \
         MPI_CUDA_SINGLETON=1 runs {launched} separate worlds of size 1 on purpose"
    )]
    WrongLauncher {
        launched: usize,
        launcher: &'static str,
        library: String,
        file: String,
        by: &'static str,
    },
    #[error(
        "this process is one of {launched} that srun started without a process management for MPI, \
         so Open MPI would end it: use `srun --mpi=pmix` (for MPICH `--mpi=pmi2`); \
         MPI_CUDA_SINGLETON=1 runs {launched} separate worlds of size 1 on purpose"
    )]
    WithoutPmi { launched: usize },
    #[error("there is no MPI for this process, {launched}: tried {tried}. {remedy}")]
    NoMpi {
        launched: String,
        tried: String,
        remedy: String,
    },
    #[error(
        "cannot load the MPI shim for {family}: {reason}; install mpi_cuda again, in a \
         checkout run scripts/setup, or set MPI_CUDA_SHIM_DIR to the folder of \
         libmpi_cuda_shim_{family}.so"
    )]
    Shim {
        family: &'static str,
        reason: Failure,
    },
    #[error(
        "two MPI libraries are loaded in this process, {first} and {second}: one process can use \
         only one; unset MPI4PY_LIBMPI and MPI4PY_MPIABI, or set MPI_CUDA_LIBMPI and MPI4PY_LIBMPI \
         to the one whose launcher you use"
    )]
    TwoLibraries { first: String, second: String },
    #[error(
        "MPI_CUDA_MPI={wanted}, but {loaded} is already loaded in this process (by mpi4py?): \
         unset MPI_CUDA_MPI or make both agree"
    )]
    OtherLibrary {
        wanted: &'static str,
        loaded: String,
    },
    #[error(
        "MPI was initialised with thread level {level}, and mpi_cuda needs MPI_THREAD_MULTIPLE: \
         before `from mpi4py import MPI` write `import mpi4py; mpi4py.rc.thread_level = \
         'multiple'`, or let mpi_cuda initialise MPI"
    )]
    ThreadLevel { level: &'static str },
    #[error(
        "{variable} is {own} on rank {rank} and differs between ranks ({smallest} to {largest}): \
         set it to one value for the whole job"
    )]
    Disagree {
        variable: &'static str,
        rank: i32,
        smallest: u64,
        largest: u64,
        own: u64,
    },
    #[error(transparent)]
    NotDirect(#[from] NotDirect),
    #[error("MPI has already been finalized in this process: create the JAX backend before that")]
    Finalized,
    #[error(
        "this process (pid {pid}) is a child of rank process {parent}: a second copy of that rank \
         cannot join the MPI job. Set JAX_PLATFORMS=cpu in the child (before it imports jax), or \
         do the work with ranks of the job"
    )]
    Child { pid: u32, parent: u32 },
    #[error(
        "this process (pid {pid}) was forked from rank process {parent}, which has imported JAX: a \
         second copy of that rank cannot join the MPI job. Start worker processes with the spawn \
         method and JAX_PLATFORMS=cpu; if the child is to be the rank, import JAX after the fork"
    )]
    Forked { pid: u32, parent: u32 },
    #[error(
        "process {pid} has joined the MPI job as this rank already, a program that this process \
         has started, or one that ran before it: a rank is one process. Set JAX_PLATFORMS=cpu in \
         that program (before it imports jax), or use JAX here first: then that program is refused"
    )]
    JoinedByOther { pid: u32 },
    #[error(
        "this process has the environment of a rank, and not the connection to the launcher \
         (PMI_FD={fd} is no socket here): it is a child of a rank, and cannot join the MPI job. \
         Set JAX_PLATFORMS=cpu in it (before it imports jax), or do the work with ranks of the job"
    )]
    NotConnected { fd: i32 },
    #[error("{call} failed at start: {error}")]
    Mpi { call: &'static str, error: MpiError },
}

/// `direct` was asked for, and would end in a segmentation fault or wrong data.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "direct transfer was asked for (MPI_CUDA_TRANSFER or MPI4JAX_USE_CUDA_MPI), but {why}: use \
     MPI_CUDA_TRANSFER=staged, or {remedy}"
)]
pub struct NotDirect {
    /// What is against it.
    pub why: String,
    /// How to get it all the same.
    pub remedy: &'static str,
}
