//! Devices and memories.

use super::handle::{DeviceHandle, FromRaw, MemoryHandle};
use crate::error::Error;
use crate::inner::call::{bytes, slice};

impl DeviceHandle {
    /// Its number in the topology.
    pub fn id(self) -> Result<i32, Error> {
        let described = ask!(PJRT_Device_GetDescription { device: self.raw() })?;
        let args = ask!(PJRT_DeviceDescription_Id {
            device_description: described.device_description,
        })?;
        Ok(args.id)
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
