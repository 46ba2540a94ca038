//! What is known of loaded executables that have operations of ours or host callbacks.

use std::sync::atomic::{AtomicBool, Ordering};

use mpi_runtime::engine::KnownCollectives;
use mpi_runtime::{LaunchOrder, UniformProgram};

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
    /// Its collectives, if they are known before it runs.
    pub collectives: Option<KnownCollectives>,
    /// They take long.
    pub long: bool,
    /// The communicators that it uses.
    pub comms: ProgramComms,
    /// What it is, if it has collectives of XLA's.
    pub channel: u64,
}

/// The numbers of a program's communicators.
#[derive(Clone, Copy, Debug)]
pub struct ProgramComms {
    /// Where its collectives use those of all programs.
    pub shared: &'static [i64],
    /// Where they use those of its channel alone.
    pub apart: &'static [i64],
}

impl ProgramComms {
    /// It uses none.
    pub const NONE: ProgramComms = ProgramComms {
        shared: &[],
        apart: &[],
    };
}

impl ProgramInfo {
    /// What a launch of it by that thread is ordered with. The first thread's collectives use
    /// communicators of all programs, in one order; those of others their program's own.
    pub fn order(&self, thread: u32) -> LaunchOrder {
        let first = thread == 0;
        LaunchOrder {
            thread,
            comms: if first {
                self.comms.shared
            } else {
                self.comms.apart
            },
            channel: if first { 0 } else { self.channel },
        }
    }
}

static PROGRAMS: SideTable<ProgramInfo> = SideTable::new();

/// There has been one with operations and callbacks.
static HAVE_BOTH: AtomicBool = AtomicBool::new(false);

/// Whether there has been a program with callbacks beside operations.
pub fn have_callbacks_beside_operations() -> bool {
    HAVE_BOTH.load(Ordering::Relaxed)
}

/// Notes a loaded executable with operations or callbacks.
pub fn remember(loaded: LoadedHandle, program: ProgramInfo) {
    if program.operations && program.callbacks {
        HAVE_BOTH.store(true, Ordering::Relaxed);
    }
    PROGRAMS.insert(loaded.address(), program);
}

/// What is known of a loaded executable; none if it has neither.
pub fn find(loaded: LoadedHandle) -> Option<ProgramInfo> {
    PROGRAMS.get(loaded.address())
}
