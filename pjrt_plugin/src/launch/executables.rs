//! What is known of loaded executables that have operations of ours or host callbacks.

use mpi_runtime::UniformProgram;

use crate::inner::handles::{Handle, LoadedHandle};
use crate::inner::side_table::SideTable;

/// What we know of a loaded executable that has operations of ours or host callbacks.
#[derive(Clone, Copy)]
pub struct ProgramInfo {
    /// Its name, as the recorder knows it.
    pub name: u32,
    /// It has operations.
    pub operations: bool,
    /// It has host callbacks.
    pub callbacks: bool,
    /// XLA would run it on the calling thread, where an operation must not wait for a peer.
    pub cheap: bool,
    /// It writes a status of the user's, who reads it when the launch returns, as after MPI's own
    /// receive.
    pub status: bool,
    /// Its operations are the same collectives and exchanges on every rank.
    pub uniform: Option<UniformProgram>,
}

static PROGRAMS: SideTable<ProgramInfo> = SideTable::new();

/// Notes a loaded executable with operations or callbacks.
pub fn remember(loaded: LoadedHandle, program: ProgramInfo) {
    PROGRAMS.insert(loaded.address(), program);
}

/// What is known of a loaded executable; none if it has neither.
pub fn find(loaded: LoadedHandle) -> Option<ProgramInfo> {
    PROGRAMS.get(loaded.address())
}
