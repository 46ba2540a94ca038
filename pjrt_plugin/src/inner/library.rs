//! The inner plugin as a loaded library: its function table, and what is known of it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;
use mpi_runtime::elf;
use mpi_runtime::error::Failure;
use pjrt_sys::PJRT_Api;

use super::call::Function;
use super::find::{choose, find, silence_logs};
use crate::config::{Config, DeviceKind};
use crate::error::Error;

/// The loaded inner plugin.
pub struct Inner {
    api: &'static PJRT_Api,
    /// The file it was loaded from.
    pub path: PathBuf,
    /// What its devices are.
    pub device: DeviceKind,
    /// Why these.
    pub reason: String,
}

// SAFETY: the table is static in a library that is never unloaded, and only read.
unsafe impl Send for Inner {}
// SAFETY: as for `Send`.
unsafe impl Sync for Inner {}

static INNER: OnceLock<Inner> = OnceLock::new();

/// The inner plugin.
///
/// # Panics
/// Before [`load`] succeeded; the framework has a function table only after that.
pub fn inner() -> &'static Inner {
    INNER
        .get()
        .expect("the plugin is loaded before its functions are called")
}

/// The function table of the inner plugin.
pub fn api() -> &'static PJRT_Api {
    inner().api
}

/// A function that newer inner tables have after those of our header (entries are only ever
/// appended, `pjrt_c_api.h`), by its place among the table's words.
///
/// # Safety
/// `Args` must be the arguments of the function in that place.
pub unsafe fn newer<Args>(place: usize) -> Function<Args> {
    let table = std::ptr::from_ref(api()).cast::<Function<Args>>();
    if api().struct_size < (place + 1) * size_of::<Function<Args>>() {
        return None;
    }
    // SAFETY: the table is as long as it says, and a function that lacks is null.
    unsafe { *table.add(place) }
}

/// Whether the inner plugin's devices are GPUs.
pub fn on_gpu() -> bool {
    INNER
        .get()
        .is_some_and(|inner| inner.device == DeviceKind::Cuda)
}

/// Loads the plugin that `config` asks for, once.
pub fn load(config: &Config) -> Result<&'static Inner, Error> {
    if let Some(inner) = INNER.get() {
        return Ok(inner);
    }
    let (device, reason) = choose(config)?;
    let path = find(config, device)?;
    silence_logs();
    let inner = Inner {
        api: table_of(&path)?,
        path,
        device,
        reason,
    };
    Ok(INNER.get_or_init(|| inner))
}

fn table_of(path: &Path) -> Result<&'static PJRT_Api, Error> {
    type GetPjrtApi = unsafe extern "C" fn() -> *const PJRT_Api;
    let name = path.display();
    let cannot = |reason: String| {
        Error::precondition(format!("cannot load the inner XLA plugin {name}: {reason}"))
    };
    elf::check(path).map_err(|wrong| cannot(format!("{wrong}; install its package again")))?;
    // SAFETY: loading runs the initialisers of an XLA plugin, which ask nothing of the process.
    let library =
        unsafe { Library::new(path) }.map_err(|error| cannot(Failure::from(error).to_string()))?;
    // SAFETY: the symbol has this type in every PJRT plugin (`pjrt_c_api.h`), and takes nothing. A
    // plugin's table is static, and its library stays loaded.
    let table = unsafe {
        let entry = library.get::<GetPjrtApi>(b"GetPjrtApi");
        entry.map(|entry| entry().as_ref())
    };
    let table =
        table.map_err(|error| Error::precondition(format!("{name} is no PJRT plugin: {error}")))?;
    // The table and its functions are used until the process ends.
    std::mem::forget(library);
    table.ok_or_else(|| Error::precondition(format!("{name} has no PJRT table")))
}

impl Inner {
    /// Its PJRT version.
    pub fn version(&self) -> (i32, i32) {
        let version = &self.api.pjrt_api_version;
        (version.major_version, version.minor_version)
    }

    /// What tells it from another build: XLA's plugins for the CPU all say that they are "cpu". It
    /// is the same on all nodes.
    pub fn build(&self) -> String {
        let (major, minor) = self.version();
        let size = self.path.metadata().map_or(0, |about| about.len());
        format!("PJRT {major}.{minor}, {size} bytes")
    }
}
