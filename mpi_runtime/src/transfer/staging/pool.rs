//! Pinned memory of the host, which is slow to get and so is kept.

#![forbid(unsafe_code)]

use std::sync::Arc;

use parking_lot::Mutex;

use crate::device::{Device, DeviceError, Event, HostMemory, Stream};

/// The small size; the large one is that of chunks.
const SMALL: usize = 64 << 10;

/// Memory of the two usual sizes, and what copies still use.
pub(super) struct Pool {
    device: Arc<dyn Device>,
    large: usize,
    state: Mutex<PoolState>,
}

#[derive(Default)]
struct PoolState {
    free: Vec<HostMemory>,
    /// With the event behind the last copy.
    in_use: Vec<(Event, HostMemory)>,
}

impl Pool {
    pub(super) fn new(device: Arc<dyn Device>, large: usize) -> Pool {
        Pool {
            device,
            large,
            state: Mutex::default(),
        }
    }

    /// Memory of at least `bytes`.
    pub(super) fn take(&self, bytes: usize) -> Result<HostMemory, DeviceError> {
        let wanted = [SMALL, self.large].into_iter().find(|&size| size >= bytes);
        let wanted = wanted.unwrap_or(bytes);
        let mut state = self.state.lock();
        self.collect(&mut state)?;
        let fitting = state.free.iter().position(|memory| memory.bytes == wanted);
        match fitting {
            Some(place) => Ok(state.free.swap_remove(place)),
            None => self.device.pinned(wanted),
        }
    }

    /// Takes memory back that is free once everything in `stream` has happened.
    pub(super) fn give_back(&self, memory: HostMemory, stream: Stream) {
        // A device that has failed may still copy: then the memory is neither used again nor freed.
        if let Ok(event) = self.device.record(stream) {
            self.state.lock().in_use.push((event, memory));
        }
    }

    /// Takes memory back that no copy uses any more.
    pub(super) fn put_back(&self, memory: HostMemory) {
        self.keep(&mut self.state.lock(), memory);
    }

    fn keep(&self, state: &mut PoolState, memory: HostMemory) {
        if memory.bytes == SMALL || memory.bytes == self.large {
            state.free.push(memory);
        } else {
            self.device.free_pinned(memory);
        }
    }

    fn collect(&self, state: &mut PoolState) -> Result<(), DeviceError> {
        let mut place = 0;
        while place < state.in_use.len() {
            if !self.device.has_passed(&state.in_use[place].0)? {
                place += 1;
                continue;
            }
            let (event, memory) = state.in_use.swap_remove(place);
            self.device.forget(event);
            self.keep(state, memory);
        }
        Ok(())
    }

    /// Pieces that are free, and that copies still use.
    #[cfg(test)]
    pub(super) fn pieces(&self) -> (usize, usize) {
        let mut state = self.state.lock();
        self.collect(&mut state).unwrap();
        (state.free.len(), state.in_use.len())
    }
}
