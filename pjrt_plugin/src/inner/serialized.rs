//! What programs were loaded from. XLA:CPU has no machine code in what it serializes of a program
//! that was itself loaded, so the bytes are kept: a copy is loaded from them, and so is what the
//! framework has serialized again. JAX loads programs from its compilation cache.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::handles::{ClientHandle, Handle, LoadedHandle, Owned};
use super::library::on_gpu;
use super::side_table::SideTable;
use crate::error::Error;

/// What a program was loaded from.
#[derive(Clone)]
pub struct Origin {
    /// What the framework gave.
    pub bytes: Arc<[u8]>,
    /// The options that the inner plugin got; empty for those in the bytes.
    options: Arc<[u8]>,
}

/// By the addresses of loaded executables, and of what the framework has asked of them.
static ORIGINS: SideTable<Origin> = SideTable::new();

/// Keeps what a program is loaded from, with the options that the inner plugin got.
pub fn keep(loaded: LoadedHandle, bytes: &[u8], options: &[u8]) {
    if !on_gpu() {
        let (bytes, options) = (bytes.into(), options.into());
        ORIGINS.insert(loaded.address(), Origin { bytes, options });
    }
}

/// What an executable was loaded from; none if it was compiled.
pub fn find(address: usize) -> Option<Origin> {
    ORIGINS.get(address)
}

/// Notes that what is known of `loaded` is known of its executable too.
pub fn share(loaded: usize, executable: usize) {
    if let Some(origin) = find(loaded) {
        ORIGINS.insert(executable, origin);
    }
}

/// A copy of a program on another inner client.
pub fn copy(original: LoadedHandle, client: ClientHandle) -> Result<Owned<LoadedHandle>, Error> {
    match find(original.address()) {
        Some(origin) => client.load(&origin.bytes, &origin.options),
        None => client.load(&original.executable()?.get().serialize()?, &[]),
    }
}
