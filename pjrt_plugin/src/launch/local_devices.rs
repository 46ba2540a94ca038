//! The devices of this rank that run a program, where each rank has several
//! (`MPI_CUDA_LOCAL_DEVICES`), and what is loaded on them.

use std::sync::Arc;

use crate::inner::handles::{DeviceHandle, Handle, LoadedHandle, Owned};
use crate::inner::side_table::{self, SideTable};
use crate::launch::keep_alive;

/// The devices of this rank that run a program.
pub struct LocalDevices {
    /// Their numbers, in the program's order.
    pub ids: Vec<i64>,
    /// They themselves.
    pub devices: Vec<DeviceHandle>,
    /// What is loaded on each but the first, which has the framework's executable.
    others: Vec<Option<Owned<LoadedHandle>>>,
}

impl LocalDevices {
    /// Those of a program of which this is loaded on each but the first.
    pub fn new(
        ids: Vec<i64>,
        devices: Vec<DeviceHandle>,
        others: Vec<Owned<LoadedHandle>>,
    ) -> LocalDevices {
        LocalDevices {
            ids,
            devices,
            others: others.into_iter().map(Some).collect(),
        }
    }

    /// What is loaded on each but the first.
    pub fn others(&self) -> impl Iterator<Item = LoadedHandle> {
        self.others.iter().flatten().map(Owned::get)
    }

    /// What is loaded on each, of which the framework has the first.
    pub fn executables(&self, first: LoadedHandle) -> impl Iterator<Item = LoadedHandle> {
        std::iter::once(first).chain(self.others())
    }
}

impl Drop for LocalDevices {
    fn drop(&mut self) {
        let others = self.others.iter_mut().filter_map(Option::take);
        // Launches that are still to come need theirs.
        for unused in others.filter_map(keep_alive::postpone_destroy) {
            side_table::forget(unused.get().address());
        }
    }
}

/// By loaded executable.
static PROGRAMS: SideTable<Arc<LocalDevices>> = SideTable::new();

/// Notes that a program runs on devices of this rank, of which each rank has several.
pub fn remember(loaded: LoadedHandle, local: Arc<LocalDevices>) {
    PROGRAMS.insert(loaded.address(), local);
}

/// The devices of this rank that run a program, if each rank has several.
pub fn program(loaded: LoadedHandle) -> Option<Arc<LocalDevices>> {
    PROGRAMS.get(loaded.address())
}
