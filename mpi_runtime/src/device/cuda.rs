//! A CUDA device behind [`Device`], by CUDA's driver interface, which is loaded when it is first
//! used: nothing here needs CUDA to build, nor a driver to load.
//!
//! Not run on a GPU yet.

use std::ffi::{CStr, c_char, c_int};
use std::ptr::{self, NonNull};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUevent, CUevent_flags, CUresult, CUstream, CUstream_flags,
    cudaError_enum,
};
use parking_lot::Mutex;

use crate::device::{Address, Copy, Device, DeviceError, Event, Fill, HostMemory, Stream};

/// Memory of the host that every context may use (`CU_MEMHOSTALLOC_PORTABLE`,
/// `CU_MEMHOSTREGISTER_PORTABLE`).
const PORTABLE: u32 = 1;

/// A GPU, in the context that XLA uses too: the device's primary one.
pub struct Cuda {
    ordinal: i32,
    context: CUcontext,
    /// Events that nobody uses: making one costs more than recording it.
    spare: Mutex<Vec<Event>>,
}

// SAFETY: a context may be used by every thread that makes it current (CUDA Driver API, "Context
// Management").
unsafe impl Send for Cuda {}
// SAFETY: as for `Send`.
unsafe impl Sync for Cuda {}

/// What there is of CUDA in this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No driver.
    NoDriver,
    /// A driver that cannot start, in its own words.
    Broken(String),
    /// So many devices, with the driver's version (13000: CUDA 13.0).
    Devices {
        /// Number of devices that `CUDA_VISIBLE_DEVICES` leaves.
        count: i32,
        /// Of the driver.
        version: i32,
    },
}

/// Looks for a driver and devices.
pub fn find() -> Found {
    // SAFETY: it only tries to load the library.
    if !unsafe { sys::is_culib_present() } {
        return Found::NoDriver;
    }
    let (mut count, mut version): (c_int, c_int) = (0, 0);
    // SAFETY: the driver is there, and writes to valid places.
    let started = unsafe {
        check("cuInit", -1, sys::cuInit(0))
            .and_then(|()| check("cuDeviceGetCount", -1, sys::cuDeviceGetCount(&mut count)))
            .and_then(|()| {
                check(
                    "cuDriverGetVersion",
                    -1,
                    sys::cuDriverGetVersion(&mut version),
                )
            })
    };
    match started {
        Ok(()) => Found::Devices { count, version },
        Err(error) => Found::Broken(error.to_string()),
    }
}

/// What names a device for good, as `nvidia-smi -L` writes it, if the driver says that: processes
/// that each see one GPU of a node call all of them 0.
pub fn uuid(ordinal: i32) -> Option<String> {
    let mut device = 0;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: a device was found, so the driver has started; it writes to valid places. The newer
    // function tells the parts of a GPU (MIG) apart.
    let found = unsafe {
        check(
            "cuDeviceGet",
            ordinal,
            sys::cuDeviceGet(&mut device, ordinal),
        )
        .and_then(|()| {
            let newer = sys::cuDeviceGetUuid_v2(&mut uuid, device);
            check("cuDeviceGetUuid", ordinal, newer).or_else(|_| {
                let older = sys::cuDeviceGetUuid(&mut uuid, device);
                check("cuDeviceGetUuid", ordinal, older)
            })
        })
    };
    found.ok()?;
    let hex = |part: &[c_char]| -> String {
        let bytes = part.iter();
        bytes.map(|byte| format!("{:02x}", *byte as u8)).collect()
    };
    let parts = [0..4, 4..6, 6..8, 8..10, 10..16].map(|range| hex(&uuid.bytes[range]));
    Some(format!("GPU-{}", parts.join("-")))
}

fn check(action: &'static str, ordinal: i32, result: CUresult) -> Result<(), DeviceError> {
    if result == cudaError_enum::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: writes to a valid place; the text is static.
    let text = unsafe {
        if sys::cuGetErrorString(result, &mut text) == cudaError_enum::CUDA_SUCCESS {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        } else {
            format!("error {result:?}")
        }
    };
    Err(DeviceError {
        action,
        device: match ordinal {
            0.. => format!("CUDA device {ordinal}"),
            _ => "CUDA".into(),
        },
        reason: text,
    })
}

impl Cuda {
    /// The device with that number among those that are visible.
    ///
    /// # Errors
    /// If there is none, or it cannot be used.
    pub fn new(ordinal: i32) -> Result<Cuda, DeviceError> {
        let failed = |reason: String| DeviceError {
            action: "opening it",
            device: format!("CUDA device {ordinal}"),
            reason,
        };
        match find() {
            Found::Devices { count, .. } if (0..count).contains(&ordinal) => {}
            Found::Devices { count, .. } => {
                return Err(failed(format!("there are {count} devices")));
            }
            Found::NoDriver => return Err(failed("there is no CUDA driver (libcuda.so.1)".into())),
            Found::Broken(reason) => return Err(failed(reason)),
        }
        let (mut device, mut context): (CUdevice, CUcontext) = (0, ptr::null_mut());
        // SAFETY: the driver is started, and writes to valid places.
        unsafe {
            check(
                "cuDeviceGet",
                ordinal,
                sys::cuDeviceGet(&mut device, ordinal),
            )?;
            let retained = sys::cuDevicePrimaryCtxRetain(&mut context, device);
            check("cuDevicePrimaryCtxRetain", ordinal, retained)?;
        }
        Ok(Cuda {
            ordinal,
            context,
            spare: Mutex::default(),
        })
    }

    /// Calls the driver with this device's context current.
    fn call(
        &self,
        action: &'static str,
        body: impl FnOnce() -> CUresult,
    ) -> Result<(), DeviceError> {
        // SAFETY: the context is retained as long as `self` lives.
        let current = unsafe { sys::cuCtxSetCurrent(self.context) };
        check("cuCtxSetCurrent", self.ordinal, current)?;
        check(action, self.ordinal, body())
    }

    fn event(&self) -> Result<Event, DeviceError> {
        if let Some(event) = self.spare.lock().pop() {
            return Ok(event);
        }
        let mut event: CUevent = ptr::null_mut();
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes to a valid place.
        self.call("cuEventCreate", || unsafe {
            sys::cuEventCreate(&mut event, flags)
        })?;
        Ok(Event(event as u64))
    }
}

fn stream_of(stream: Stream) -> CUstream {
    stream.0 as CUstream
}

fn event_of(event: &Event) -> CUevent {
    event.0 as CUevent
}

impl Device for Cuda {
    fn pinned(&self, bytes: usize) -> Result<HostMemory, DeviceError> {
        let mut data = ptr::null_mut();
        // SAFETY: writes to a valid place.
        self.call("cuMemHostAlloc", || unsafe {
            sys::cuMemHostAlloc(&mut data, bytes, PORTABLE)
        })?;
        let data = NonNull::new(data.cast()).ok_or_else(|| DeviceError {
            action: "cuMemHostAlloc",
            device: format!("CUDA device {}", self.ordinal),
            reason: "it gave nothing".into(),
        })?;
        Ok(HostMemory { data, bytes })
    }

    fn free_pinned(&self, memory: HostMemory) {
        let data = memory.data.as_ptr().cast();
        // An error here means that the device has failed, which its next use says.
        // SAFETY: made by `pinned`, and not used any more.
        let _ = self.call("cuMemFreeHost", || unsafe { sys::cuMemFreeHost(data) });
    }

    unsafe fn pin(&self, memory: &HostMemory) -> Result<(), DeviceError> {
        let (data, bytes) = (memory.data.as_ptr().cast(), memory.bytes);
        // SAFETY: `Device::pin` demands that the memory stays mapped.
        self.call("cuMemHostRegister", || unsafe {
            sys::cuMemHostRegister_v2(data, bytes, PORTABLE)
        })
    }

    fn memory(&self, bytes: usize) -> Result<Address, DeviceError> {
        let mut memory = 0;
        // SAFETY: writes to a valid place.
        self.call("cuMemAlloc", || unsafe {
            sys::cuMemAlloc_v2(&mut memory, bytes)
        })?;
        Ok(memory as Address)
    }

    fn free_memory(&self, memory: Address) {
        // As in `free_pinned`.
        // SAFETY: made by `memory`, and not used any more.
        let _ = self.call("cuMemFree", || unsafe { sys::cuMemFree_v2(memory as u64) });
    }

    fn stream(&self) -> Result<Stream, DeviceError> {
        let mut stream: CUstream = ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes to a valid place.
        self.call("cuStreamCreate", || unsafe {
            sys::cuStreamCreate(&mut stream, flags)
        })?;
        Ok(Stream(stream as u64))
    }

    fn record(&self, stream: Stream) -> Result<Event, DeviceError> {
        let event = self.event()?;
        // SAFETY: a stream and an event of this device's.
        self.call("cuEventRecord", || unsafe {
            sys::cuEventRecord(event_of(&event), stream_of(stream))
        })?;
        Ok(event)
    }

    fn wait(&self, stream: Stream, event: &Event) -> Result<(), DeviceError> {
        // SAFETY: an event of ours that is not destroyed, and a live stream.
        self.call("cuStreamWaitEvent", || unsafe {
            sys::cuStreamWaitEvent(stream_of(stream), event_of(event), 0)
        })
    }

    fn has_passed(&self, event: &Event) -> Result<bool, DeviceError> {
        let mut result = cudaError_enum::CUDA_SUCCESS;
        self.call("cuEventQuery", || {
            // SAFETY: an event of ours that is not destroyed.
            result = unsafe { sys::cuEventQuery(event_of(event)) };
            match result {
                cudaError_enum::CUDA_ERROR_NOT_READY => cudaError_enum::CUDA_SUCCESS,
                other => other,
            }
        })?;
        Ok(result == cudaError_enum::CUDA_SUCCESS)
    }

    fn forget(&self, event: Event) {
        self.spare.lock().push(event);
    }

    unsafe fn copy(&self, stream: Stream, copy: Copy, bytes: usize) -> Result<(), DeviceError> {
        let stream = stream_of(stream);
        // SAFETY: `Device::copy` demands that both memories are valid until the copy has ended.
        unsafe {
            match copy {
                Copy::Down { to, from } => self.call("cuMemcpyDtoHAsync", || {
                    sys::cuMemcpyDtoHAsync_v2(to.cast(), from as u64, bytes, stream)
                }),
                Copy::Up { to, from } => self.call("cuMemcpyHtoDAsync", || {
                    sys::cuMemcpyHtoDAsync_v2(to as u64, from.cast(), bytes, stream)
                }),
                Copy::Across { to, from } => self.call("cuMemcpyDtoDAsync", || {
                    sys::cuMemcpyDtoDAsync_v2(to as u64, from as u64, bytes, stream)
                }),
            }
        }
    }

    unsafe fn fill(&self, stream: Stream, to: Address, what: Fill) -> Result<(), DeviceError> {
        let (to, stream) = (to as u64, stream_of(stream));
        // SAFETY: `Device::fill` demands that the memory is valid until it is filled.
        unsafe {
            match what {
                Fill::Zeros(bytes) => self.call("cuMemsetD8Async", || {
                    sys::cuMemsetD8Async(to, 0, bytes, stream)
                }),
                Fill::Word(word) => self.call("cuMemsetD32Async", || {
                    sys::cuMemsetD32Async(to, word, 1, stream)
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_device_says_so() {
        match find() {
            Found::Devices { count, .. } if count > 0 => assert!(Cuda::new(count).is_err()),
            found => {
                let error = Cuda::new(0).err().unwrap().to_string();
                assert!(error.contains("CUDA device 0"), "{found:?}: {error}");
            }
        }
    }
}
