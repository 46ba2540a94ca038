//! One staged operation under way: its copies, and the memory of the host that they use.

use std::sync::Arc;

use crate::buffer::Buffer;
use crate::device::{self, Copy, Device, DeviceError, Event, HostMemory, Stream};
use crate::node::shm_rings::ShmRings;
use crate::transfer::staging::pool::Pool;

/// Chunks that are on their way down while MPI has one.
pub(super) const AHEAD: usize = 2;
/// What all operations on a device share.
pub(super) struct StagingResources {
    pub(super) device: Arc<dyn Device>,
    /// Copies to the host and from it, each in an order of their own.
    pub(super) down: Stream,
    pub(super) up: Stream,
    pub(super) pool: Pool,
    /// Bytes of a chunk.
    pub(super) chunk: usize,
    /// Of this node's ranks, for long messages among them.
    pub(super) shm_rings: Option<Arc<ShmRings>>,
}

/// One operation under way.
pub(super) struct Run<'a> {
    pub(super) staging: &'a StagingResources,
    main: Stream,
    /// Where its copies go.
    pub(super) down: Stream,
    pub(super) up: Stream,
}

/// A chunk in memory of the host, on its way down.
pub(super) struct Coming {
    pub(super) memory: Option<HostMemory>,
    /// Behind its copies; none if there were none.
    pub(super) copied: Option<Event>,
}

impl<'a> Run<'a> {
    /// What the copies read is written by what is in `main` before, and what they write may be read
    /// by it.
    pub(super) fn begin(
        staging: &'a StagingResources,
        main: Stream,
    ) -> Result<Run<'a>, DeviceError> {
        let device = &staging.device;
        let here = device.record(main)?;
        let both = device
            .wait(staging.down, &here)
            .and_then(|()| device.wait(staging.up, &here));
        device.forget(here);
        let (down, up) = (staging.down, staging.up);
        both.map(|()| Run {
            staging,
            main,
            down,
            up,
        })
    }

    /// Its copies are where the program is.
    pub(super) fn within(staging: &'a StagingResources, main: Stream) -> Run<'a> {
        Run {
            staging,
            main,
            down: main,
            up: main,
        }
    }

    /// Later work of the program comes after the copies.
    pub(super) fn end(self) -> Result<(), DeviceError> {
        let device = &self.staging.device;
        for stream in [self.down, self.up] {
            if stream == self.main {
                continue;
            }
            let behind = device.record(stream)?;
            let waits = device.wait(self.main, &behind);
            device.forget(behind);
            waits?;
        }
        Ok(())
    }

    /// Waits until everything of the program before this operation has ended.
    pub(super) fn drain(&self) -> Result<(), DeviceError> {
        let here = self.staging.device.record(self.down)?;
        self.pass(here)
    }

    /// Waits for an event.
    pub(super) fn pass(&self, event: Event) -> Result<(), DeviceError> {
        device::pass(&*self.staging.device, event)
    }

    /// Memory of the host for `bytes`.
    pub(super) fn memory(&self, bytes: usize) -> Result<Option<HostMemory>, DeviceError> {
        if bytes == 0 {
            return Ok(None);
        }
        self.staging.pool.take(bytes).map(Some)
    }

    /// Starts to copy the rows of a chunk down, one after the other.
    pub(super) fn come(&self, rows: &[(usize, usize)]) -> Result<Coming, DeviceError> {
        let bytes = rows.iter().map(|row| row.1).sum();
        let Some(memory) = self.memory(bytes)? else {
            return Ok(Coming {
                memory: None,
                copied: None,
            });
        };
        let (device, down) = (&self.staging.device, self.down);
        let mut place = 0;
        for &(from, bytes) in rows {
            let to = memory.data.as_ptr().wrapping_add(place);
            // SAFETY: the operand is valid while the operation runs, and `end` makes the program
            // wait for this copy; the memory is the pool's until the event behind it.
            let copied = unsafe { device.copy(down, Copy::Down { to, from }, bytes) };
            if let Err(error) = copied {
                self.give_back(Some(memory), down);
                return Err(error);
            }
            place += bytes;
        }
        let copied = device.record(down)?;
        Ok(Coming {
            memory: Some(memory),
            copied: Some(copied),
        })
    }

    /// Waits until a chunk is there.
    pub(super) fn arrive(&self, chunk: Coming) -> Result<Option<HostMemory>, DeviceError> {
        match chunk.copied {
            Some(copied) => self.pass(copied).map(|()| chunk.memory),
            None => Ok(chunk.memory),
        }
    }

    /// Copies what lies in `memory` up, row by row, and gives it back when that has happened.
    pub(super) fn go(
        &self,
        memory: Option<HostMemory>,
        rows: &[(usize, usize)],
    ) -> Result<(), DeviceError> {
        let Some(memory) = memory else { return Ok(()) };
        let (device, up) = (&self.staging.device, self.up);
        let mut place = 0;
        let mut result = Ok(());
        for &(to, bytes) in rows {
            let from = memory.data.as_ptr().wrapping_add(place);
            // SAFETY: as in `come`.
            result = unsafe { device.copy(up, Copy::Up { to, from }, bytes) };
            if result.is_err() {
                break;
            }
            place += bytes;
        }
        self.give_back(Some(memory), up);
        result
    }

    /// The memory is free once everything in `stream` has happened.
    pub(super) fn give_back(&self, memory: Option<HostMemory>, stream: Stream) {
        if let Some(memory) = memory {
            self.staging.pool.give_back(memory, stream);
        }
    }

    /// No copy uses the memory any more.
    pub(super) fn put_back(&self, memory: Option<HostMemory>) {
        if let Some(memory) = memory {
            self.staging.pool.put_back(memory);
        }
    }
}

/// The array in memory of the host.
pub(super) fn at<'a>(memory: &Option<HostMemory>, array: Buffer<'a>) -> Buffer<'a> {
    let Some(memory) = memory else {
        return Buffer::described(array.dtype(), array.shape());
    };
    assert!(array.bytes() <= memory.bytes);
    // SAFETY: memory of the pool's, with room for it, which is put back when the operation that has
    // the array has returned.
    unsafe { array.placed(memory.data.as_ptr().cast()) }
}
