//! What a user can set, as typed values with their defaults.

use std::path::PathBuf;
use std::time::Duration;

use mpi_runtime::engine::recorder::file::Keep;
use mpi_runtime::mpi::family::Family;
use mpi_runtime::transfer::choice::Asked;

/// What MPI surely takes in one call: some products of it still fit a C `int`.
pub const LARGEST_PART: i64 = 1 << 30;

/// Which XLA plugin to wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DeviceKind {
    Auto,
    Cpu,
    Cuda,
}

/// Which devices the framework sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Topology {
    Global,
    Local,
}

/// What launches of several threads are ordered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Orders {
    /// Each thread has an order of its own.
    Each,
    /// All threads share one, in which their launches come.
    One,
}

/// What to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Log {
    Warn,
    Info,
    Debug,
}

/// Whether the host's memory is taken for a device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Pretend {
    Nothing,
    Device,
    /// One whose memory MPI reads and writes by itself.
    DeviceThatMpiKnows,
}

/// Which jobs start all-reduces of programs for several devices before they wait for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Overlap {
    Never,
    BetweenNodes,
    Always,
}

/// Everything a user can set.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Config {
    pub device: DeviceKind,
    pub inner_plugin: Option<PathBuf>,
    pub topology: Topology,
    pub local_devices: i32,
    pub thread_order: Orders,
    pub mpi: Option<Family>,
    pub libmpi: Option<PathBuf>,
    pub shim_dir: Option<PathBuf>,
    pub singleton: bool,
    pub warn_after: Duration,
    pub abort_after: Option<Duration>,
    pub exit_timeout: Option<Duration>,
    pub check: bool,
    pub log: Log,
    pub record_dir: Option<PathBuf>,
    pub record: Keep,
    pub keep_memory: bool,
    pub huge_pages: bool,
    pub share_compiled: bool,
    pub part_bytes: i64,
    pub shm_collectives: bool,
    pub shm_messages: bool,
    pub overlap: Overlap,
    pub transfer: Asked,
    /// What mpi4jax's variable said, if that was not clear.
    pub transfer_warning: Option<String>,
    pub chunk_bytes: usize,
    pub shm_ring: bool,
    pub probe_dir: Option<PathBuf>,
    pub probe: bool,
    pub pretend_device: Pretend,
    pub recompile: bool,
    pub pretend_size: Option<i32>,
    pub pretend_nodes: Option<i32>,
    /// What the user should hear of the variables set.
    pub warnings: Vec<String>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            device: DeviceKind::Auto,
            inner_plugin: None,
            topology: Topology::Global,
            local_devices: 1,
            thread_order: Orders::Each,
            mpi: None,
            libmpi: None,
            shim_dir: None,
            singleton: false,
            warn_after: Duration::from_secs(60),
            abort_after: None,
            exit_timeout: Some(Duration::from_secs(90)),
            check: false,
            log: Log::Warn,
            record_dir: None,
            record: Keep::Failures,
            keep_memory: true,
            huge_pages: true,
            share_compiled: true,
            part_bytes: LARGEST_PART,
            shm_collectives: true,
            shm_messages: true,
            overlap: Overlap::Never,
            transfer: Asked::Auto,
            transfer_warning: None,
            chunk_bytes: 1 << 20,
            shm_ring: true,
            probe_dir: None,
            probe: false,
            pretend_device: Pretend::Nothing,
            recompile: false,
            pretend_size: None,
            pretend_nodes: None,
            warnings: Vec::new(),
        }
    }
}
