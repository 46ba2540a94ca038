//! Where the buffers of a custom call are, and what is done there: by the host itself, or in the
//! order of the device's stream.

use std::mem::MaybeUninit;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mpi_runtime::device::cuda::Cuda;
use mpi_runtime::device::simulated::Simulated;
use mpi_runtime::device::{Address, Copy, Device, DeviceError, Fill, Stream};
use mpi_runtime::transfer::choice::{Mode, Through};
use mpi_runtime::{Buffer, Direct, Operation, Place, Staging, Ticket, World};
use parking_lot::Mutex;

use crate::config::{Config, Pretend};
use crate::error::Error;
use crate::ffi::frame::Frame;
use crate::ffi::huge_pages;
use crate::inner::on_gpu;
use crate::plugin::{config, world};

/// A device with its staging.
struct Staged {
    device: Arc<dyn Device>,
    staging: Staging,
    /// If MPI uses the device's memory by itself.
    direct: Option<Direct>,
    /// In place of the stream of a program, if XLA knows nothing of the device
    /// (`MPI_CUDA_PRETEND_DEVICE`): then each call waits for its own end.
    pretended: Option<Stream>,
}

static STAGED: OnceLock<Staged> = OnceLock::new();
/// What the probe has asked for.
static SWITCHED: Mutex<Option<Through>> = Mutex::new(None);
/// What copies of the pretended device take at most.
const DELAY: Duration = Duration::from_micros(50);

/// Prepares transfers, once the ranks agree on the way. Those for CUDA begin with the first call,
/// which knows its device.
pub fn start(config: &Config, world: &World) -> Result<(), Error> {
    let needed = world.transfer.is_some() && config.pretend_device != Pretend::Nothing;
    if needed && STAGED.get().is_none() {
        let failed = |error: DeviceError| Error::internal(error);
        let device = Arc::new(Simulated::over_host(DELAY));
        let pretended = Some(device.stream().map_err(failed)?);
        let staged = Staged::new(device, config.chunk_bytes, world, pretended).map_err(failed)?;
        STAGED.get_or_init(|| staged);
    }
    Ok(())
}

/// From now on MPI gets the arrays of the device themselves, or copies.
pub fn switch(through: Through) {
    if let Some(direct) = STAGED.get().and_then(|staged| staged.direct.as_ref()) {
        direct.switch(through);
    }
    *SWITCHED.lock() = Some(through);
}

impl Staged {
    fn new(
        device: Arc<dyn Device>,
        chunk: usize,
        world: &World,
        pretended: Option<Stream>,
    ) -> Result<Staged, DeviceError> {
        let mode = world
            .transfer
            .as_ref()
            .map_or(Mode::Staged, |choice| choice.mode);
        let through = |through| SWITCHED.lock().unwrap_or(through);
        Ok(Staged {
            staging: Staging::new(device.clone(), chunk, world.shm_rings.clone())?,
            direct: match mode {
                Mode::Direct(chosen) => Some(Direct::new(device.clone(), through(chosen))),
                Mode::Staged => None,
            },
            device,
            pretended,
        })
    }

    /// Of the GPU that `frame` is on; each rank has one.
    fn of_gpu(frame: &Frame<'_>) -> Result<&'static Staged, Error> {
        if let Some(staged) = STAGED.get() {
            return Ok(staged);
        }
        let world = world().ok_or_else(|| Error::internal("an operation before the world"))?;
        let chunk = config().chunk_bytes;
        let staged = Cuda::new(frame.device()?)
            .and_then(|cuda| Staged::new(Arc::new(cuda), chunk, world, None))
            .map_err(Error::internal)?;
        Ok(STAGED.get_or_init(|| staged))
    }
}

/// The memory of a custom call's buffers.
pub struct Memory<'a> {
    frame: &'a Frame<'a>,
    /// The device and the stream in whose order the call is; none if the buffers are the host's.
    device: Option<(&'static Staged, Stream)>,
}

impl<'a> Memory<'a> {
    /// That of `frame`.
    #[inline]
    pub fn of(frame: &'a Frame<'a>) -> Result<Memory<'a>, Error> {
        let device = if on_gpu() {
            let staged = Staged::of_gpu(frame)?;
            Some((staged, Stream(frame.stream()?)))
        } else {
            let pretended = |staged: &'static Staged| Some((staged, staged.pretended?));
            STAGED.get().and_then(pretended)
        };
        Ok(Memory { frame, device })
    }

    /// Whether the host can address it.
    pub fn is_hosts(&self) -> bool {
        self.device.is_none()
    }

    /// Executes an operation on buffers in it.
    pub fn execute(
        &self,
        world: &World,
        ticket: Ticket,
        op: &Operation<'_>,
    ) -> Result<(), Box<mpi_runtime::OperationError>> {
        match self.device {
            Some((staged, main)) => {
                let engine = &world.engine;
                let place = match &staged.direct {
                    Some(direct) if Direct::can(op, world.oversubscribed) => {
                        Place::Direct(direct, main)
                    }
                    _ => Place::Staged(&staged.staging, main),
                };
                let done = engine.execute(ticket, op, place);
                self.catch_up();
                done
            }
            None => {
                if config().huge_pages {
                    huge_pages::prepare(op);
                }
                world.engine.execute(ticket, op, Place::Host)
            }
        }
    }

    /// Waits for the pretended device.
    fn catch_up(&self) {
        let Some((staged, main)) = self.device else {
            return;
        };
        if staged.pretended.is_none() {
            return;
        }
        if let Ok(event) = staged.device.record(main) {
            while let Ok(false) = staged.device.has_passed(&event) {
                std::thread::yield_now();
            }
            staged.device.forget(event);
        }
    }

    /// Copies an array to one of the same size, which does not overlap it.
    pub fn copy(&self, from: &Buffer<'_>, to: &Buffer<'_>) -> Result<(), Error> {
        assert_eq!(from.bytes(), to.bytes());
        self.copy_bytes(from.data() as Address, to.data() as Address, from.bytes())?;
        self.catch_up();
        Ok(())
    }

    fn copy_bytes(&self, from: Address, to: Address, bytes: usize) -> Result<(), Error> {
        if bytes == 0 || from == to {
            return Ok(());
        }
        match self.device {
            Some((staged, main)) => {
                let across = Copy::Across { to, from };
                // SAFETY: XLA's buffers have their sizes, and are valid for what is in the stream.
                unsafe { staged.device.copy(main, across, bytes) }.map_err(Error::internal)
            }
            None => {
                // SAFETY: XLA's buffers have their sizes, and results do not overlap other
                // operands.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
                Ok(())
            }
        }
    }

    /// From `rows` rows of `columns` blocks to `columns` rows of `rows` blocks, in one pass.
    pub fn interleave(
        &self,
        from: &Buffer<'_>,
        to: &Buffer<'_>,
        rows: usize,
        columns: usize,
    ) -> Result<(), Error> {
        // However many blocks there are of nothing.
        if from.bytes() == 0 {
            return Ok(());
        }
        let block = from.bytes() / (rows * columns).max(1);
        assert!(from.bytes() == to.bytes() && block * rows * columns == from.bytes());
        let (from, to) = (from.data() as Address, to.data() as Address);
        for (here, there) in interleaved(rows, columns) {
            self.copy_bytes(from + here * block, to + there * block, block)?;
        }
        self.catch_up();
        Ok(())
    }

    /// Fills an array with zeros.
    pub fn clear(&self, array: &Buffer<'_>) -> Result<(), Error> {
        self.fill(array, Fill::Zeros(array.bytes()))
    }

    /// Writes a number of 32 bits, of which `array` is one.
    pub fn write(&self, array: &Buffer<'_>, word: u32) -> Result<(), Error> {
        assert_eq!(array.bytes(), size_of::<u32>());
        self.fill(array, Fill::Word(word))
    }

    fn fill(&self, array: &Buffer<'_>, what: Fill) -> Result<(), Error> {
        if array.bytes() == 0 {
            return Ok(());
        }
        if let Some((staged, main)) = self.device {
            // SAFETY: XLA's buffer has its size, and is valid for what is in the stream.
            unsafe { staged.device.fill(main, array.data() as Address, what) }
                .map_err(Error::internal)?;
            self.catch_up();
            return Ok(());
        }
        // SAFETY: XLA's buffer has its size.
        unsafe {
            match what {
                Fill::Zeros(bytes) => array.data().cast::<u8>().write_bytes(0, bytes),
                Fill::Word(word) => array.data().cast::<u32>().write_unaligned(word),
            }
        }
        Ok(())
    }

    /// Memory of ours beside the buffers, with anything in it.
    pub fn scratch(&self, bytes: usize) -> Result<Scratch<'a>, Error> {
        let of_gpu = self
            .device
            .is_some_and(|(staged, _)| staged.pretended.is_none());
        if of_gpu && bytes > 0 {
            let (frame, data) = (self.frame, self.frame.allocate(bytes)?);
            return Ok(Scratch::Device { frame, data, bytes });
        }
        Ok(Scratch::Host(Box::new_uninit_slice(bytes)))
    }
}

/// Where each block of `rows` rows of `columns` goes, if rows become columns.
fn interleaved(rows: usize, columns: usize) -> impl Iterator<Item = (usize, usize)> {
    let row =
        move |row| (0..columns).map(move |column| (row * columns + column, column * rows + row));
    (0..rows).flat_map(row)
}

/// Memory of [`Memory::scratch`].
pub enum Scratch<'a> {
    /// The host's.
    Host(Box<[MaybeUninit<u8>]>),
    /// A GPU's.
    Device {
        /// Who gave it.
        frame: &'a Frame<'a>,
        /// Where it is.
        data: *mut std::ffi::c_void,
        /// Its size.
        bytes: usize,
    },
}

impl Scratch<'_> {
    /// An array like `like` in it.
    pub fn over<'b>(&mut self, like: &Buffer<'b>) -> Buffer<'b> {
        let (data, bytes) = match self {
            Scratch::Host(memory) => (memory.as_mut_ptr().cast(), memory.len()),
            Scratch::Device { data, bytes, .. } => (*data, *bytes),
        };
        assert!(like.bytes() <= bytes);
        // SAFETY: this memory holds as many bytes, and belongs to a call that outlives its arrays.
        unsafe { like.placed(data) }
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        if let Scratch::Device { frame, data, bytes } = self {
            frame.free(*data, *bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_interleaved_and_back() {
        let parts = ["a0", "a1", "a2", "b0", "b1", "b2"];
        let (mut whole, mut back) = ([""; 6], [""; 6]);
        for (here, there) in interleaved(2, 3) {
            whole[there] = parts[here];
        }
        assert_eq!(whole, ["a0", "b0", "a1", "b1", "a2", "b2"]);
        for (here, there) in interleaved(3, 2) {
            back[there] = whole[here];
        }
        assert_eq!(back, parts);
    }
}
