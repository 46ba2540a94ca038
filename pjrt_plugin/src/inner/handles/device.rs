//! Devices, their descriptions, and memories.

use super::handle::{DescriptionHandle, DeviceHandle, FromRaw, MemoryHandle};
use crate::error::Error;
use crate::inner::call::{bytes, slice};

/// What a device is called.
#[derive(Debug, PartialEq)]
pub struct Texts {
    /// For whoever develops it.
    pub debug: String,
    /// For users.
    pub short: String,
}

impl DescriptionHandle {
    /// The device's number in its topology.
    pub fn id(self) -> Result<i32, Error> {
        let args = ask!(PJRT_DeviceDescription_Id {
            device_description: self.raw(),
        })?;
        Ok(args.id)
    }

    /// What the device is called.
    pub fn texts(self) -> Result<Texts, Error> {
        let debug = ask!(PJRT_DeviceDescription_DebugString {
            device_description: self.raw(),
        })?;
        let short = ask!(PJRT_DeviceDescription_ToString {
            device_description: self.raw(),
        })?;
        // SAFETY: the texts live as long as the description.
        let (debug, short) = unsafe {
            (
                bytes(debug.debug_string, debug.debug_string_size),
                bytes(short.to_string, short.to_string_size),
            )
        };
        let owned = |text| String::from_utf8_lossy(text).into_owned();
        Ok(Texts {
            debug: owned(debug),
            short: owned(short),
        })
    }
}

impl DeviceHandle {
    /// What it says of itself.
    pub fn description(self) -> Result<DescriptionHandle, Error> {
        let args = ask!(PJRT_Device_GetDescription { device: self.raw() })?;
        // SAFETY: the description lives as long as the device.
        unsafe { DescriptionHandle::from_raw(args.device_description) }
    }

    /// Its memories.
    pub fn memories(self) -> Result<Vec<MemoryHandle>, Error> {
        let args = ask!(PJRT_Device_AddressableMemories { device: self.raw() })?;
        // SAFETY: the list and its memories live as long as the device.
        unsafe {
            let memories = slice(args.memories, args.num_memories).iter();
            memories
                .map(|&memory| MemoryHandle::from_raw(memory))
                .collect()
        }
    }

    /// Where its results are if nothing else is said.
    pub fn default_memory(self) -> Result<MemoryHandle, Error> {
        let args = ask!(PJRT_Device_DefaultMemory { device: self.raw() })?;
        // SAFETY: the memory lives as long as the device.
        unsafe { MemoryHandle::from_raw(args.memory) }
    }
}

impl MemoryHandle {
    /// Whether it is of that kind.
    pub fn is_kind(self, kind: &[u8]) -> bool {
        // SAFETY: the text lives as long as the memory.
        ask!(PJRT_Memory_Kind { memory: self.raw() })
            .is_ok_and(|args| unsafe { bytes(args.kind, args.kind_size) } == kind)
    }
}
