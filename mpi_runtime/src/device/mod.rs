//! The seam for memory that the host cannot address: what staging needs of a device.
//!
//! Work on one stream happens in order, work on different streams does not; an event is a place in
//! a stream (CUDA C Programming Guide, sections 3.2.8.5 and 3.2.8.8).

pub mod cuda;
pub mod simulated;

use std::fmt;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

/// How long an event is waited for before the thread sleeps, and how long it sleeps then.
const SPIN: Duration = Duration::from_micros(200);
const NAP: Duration = Duration::from_micros(20);

/// An address in device memory. Only a number to the host.
pub type Address = usize;

/// A queue of copies and kernels; of CUDA, a `CUstream`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub u64);

/// A place in a stream; of CUDA, a `CUevent`. Given back by [`Device::forget`].
#[derive(Debug, PartialEq, Eq)]
pub struct Event(pub u64);

/// Memory of the host that the device copies to and from by itself (pinned).
#[derive(Debug)]
pub struct HostMemory {
    /// Where it begins.
    pub data: NonNull<u8>,
    /// Its size.
    pub bytes: usize,
}

// SAFETY: it is an address; whoever has it has the memory.
unsafe impl Send for HostMemory {}

/// What a device says has failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{action} failed on {device}: {reason}")]
pub struct DeviceError {
    /// What was attempted.
    pub action: &'static str,
    /// Which device.
    pub device: String,
    /// In the words of its library.
    pub reason: String,
}

/// A copy between memories.
#[derive(Clone, Copy)]
pub enum Copy {
    /// From the device to the host.
    Down {
        /// Where to.
        to: *mut u8,
        /// Where from.
        from: Address,
    },
    /// From the host to the device.
    Up {
        /// Where to.
        to: Address,
        /// Where from.
        from: *const u8,
    },
    /// On the device.
    Across {
        /// Where to.
        to: Address,
        /// Where from.
        from: Address,
    },
}

impl fmt::Debug for Copy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Copy::Down { .. } => "a copy to the host",
            Copy::Up { .. } => "a copy from the host",
            Copy::Across { .. } => "a copy on the device",
        })
    }
}

/// What memory is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// So many zero bytes.
    Zeros(usize),
    /// One number.
    Word(u32),
}

/// A device with memory of its own.
pub trait Device: Send + Sync {
    /// Pinned memory of the host.
    ///
    /// # Errors
    /// If there is none left.
    fn pinned(&self, bytes: usize) -> Result<HostMemory, DeviceError>;

    /// Frees memory of [`Device::pinned`] that no copy uses any more.
    fn free_pinned(&self, memory: HostMemory);

    /// Lets the device copy by itself to and from memory that somebody else has made.
    ///
    /// # Errors
    /// If it cannot; then the memory is as good as before.
    ///
    /// # Safety
    /// The memory must stay mapped as long as the process lives.
    unsafe fn pin(&self, memory: &HostMemory) -> Result<(), DeviceError>;

    /// Memory of the device that MPI can pass to other processes: of CUDA's, that of `cuMemAlloc`,
    /// and not of its virtual memory management.
    ///
    /// # Errors
    /// If there is none left.
    fn memory(&self, bytes: usize) -> Result<Address, DeviceError>;

    /// Frees memory of [`Device::memory`] that nothing uses any more.
    fn free_memory(&self, memory: Address);

    /// A new stream, which lives as long as the device.
    ///
    /// # Errors
    /// If the device has failed.
    fn stream(&self) -> Result<Stream, DeviceError>;

    /// The place in `stream` behind everything that is in it now.
    ///
    /// # Errors
    /// If the device has failed.
    fn record(&self, stream: Stream) -> Result<Event, DeviceError>;

    /// What comes into `stream` from now on waits for `event`. The caller does not.
    ///
    /// # Errors
    /// If the device has failed.
    fn wait(&self, stream: Stream, event: &Event) -> Result<(), DeviceError>;

    /// Whether everything before `event` has ended.
    ///
    /// # Errors
    /// If the device has failed, before or since.
    fn has_passed(&self, event: &Event) -> Result<bool, DeviceError>;

    /// The event is not needed any more.
    fn forget(&self, event: Event);

    /// Puts a copy of `bytes` bytes into `stream`.
    ///
    /// # Errors
    /// If the device has failed.
    ///
    /// # Safety
    /// Both memories must be valid until the copy has ended.
    unsafe fn copy(&self, stream: Stream, copy: Copy, bytes: usize) -> Result<(), DeviceError>;

    /// Writes to device memory, in `stream`.
    ///
    /// # Errors
    /// If the device has failed.
    ///
    /// # Safety
    /// The memory must be valid until that has happened.
    unsafe fn fill(&self, stream: Stream, to: Address, what: Fill) -> Result<(), DeviceError>;
}

/// Waits for an event, and forgets it.
///
/// # Errors
/// If the device has failed.
pub(crate) fn pass(device: &dyn Device, event: Event) -> Result<(), DeviceError> {
    let begun = Instant::now();
    let passed = loop {
        match device.has_passed(&event) {
            Ok(false) if begun.elapsed() < SPIN => std::thread::yield_now(),
            // The program computes what is to be sent.
            Ok(false) => std::thread::sleep(NAP),
            other => break other.map(drop),
        }
    };
    device.forget(event);
    passed
}
