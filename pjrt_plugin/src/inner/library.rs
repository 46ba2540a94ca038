//! The inner plugin as a loaded library: its function table, and what is known of it.

use std::path::PathBuf;
use std::sync::OnceLock;

use libloading::Library;
use pjrt_sys::PJRT_Api;

use super::find::{choose, find, silence_logs};
use crate::config::{Config, Device};
use crate::error::Error;

/// The loaded inner plugin.
pub struct Inner {
    api: &'static PJRT_Api,
    /// The file it was loaded from.
    pub path: PathBuf,
    /// What its devices are.
    pub device: Device,
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

/// Whether the inner plugin's devices are GPUs.
pub fn on_gpu() -> bool {
    inner().device == Device::Cuda
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

fn table_of(path: &std::path::Path) -> Result<&'static PJRT_Api, Error> {
    type GetPjrtApi = unsafe extern "C" fn() -> *const PJRT_Api;
    // SAFETY: loading runs the initialisers of an XLA plugin, which ask nothing of the process.
    let library = unsafe { Library::new(path) }.map_err(|error| {
        Error::precondition(format!(
            "cannot load the inner XLA plugin {}: {error}",
            path.display()
        ))
    })?;
    // SAFETY: the symbol has this type in every PJRT plugin, and takes nothing (`pjrt_c_api.h`).
    let table = unsafe {
        library
            .get::<GetPjrtApi>(b"GetPjrtApi")
            .map(|entry| entry())
    };
    let table = table.map_err(|error| {
        Error::precondition(format!("{} is no PJRT plugin: {error}", path.display()))
    })?;
    // The table and its functions are used until the process ends.
    std::mem::forget(library);
    // SAFETY: a plugin's table is static, and its library stays loaded.
    unsafe { table.as_ref() }
        .ok_or_else(|| Error::precondition(format!("{} has no PJRT table", path.display())))
}

impl Inner {
    /// Its PJRT version.
    pub fn version(&self) -> (i32, i32) {
        let version = &self.api.pjrt_api_version;
        (version.major_version, version.minor_version)
    }
}
