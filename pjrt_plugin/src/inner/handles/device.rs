//! Devices and memories.

use super::{DeviceHandle, FromRaw, MemoryHandle};
use crate::error::Error;
use crate::inner::call::{ask, bytes, slice};
use crate::inner::library::api;

impl DeviceHandle {
    /// Its number in the topology.
    pub fn id(self) -> Result<i32, Error> {
        // SAFETY: the device is live, and so is its description.
        unsafe {
            let described = ask(api().PJRT_Device_GetDescription, |args| {
                args.device = self.raw();
            })?;
            let args = ask(api().PJRT_DeviceDescription_Id, |args| {
                args.device_description = described.device_description;
            })?;
            Ok(args.id)
        }
    }

    /// Its memories.
    pub fn memories(self) -> Result<Vec<MemoryHandle>, Error> {
        // SAFETY: the device is live, and its list of memories lives as long.
        unsafe {
            let args = ask(api().PJRT_Device_AddressableMemories, |args| {
                args.device = self.raw();
            })?;
            let memories = slice(args.memories, args.num_memories);
            memories
                .iter()
                .map(|&memory| MemoryHandle::from_raw(memory))
                .collect()
        }
    }

    /// Where its results are if nothing else is said.
    pub fn default_memory(self) -> Result<MemoryHandle, Error> {
        // SAFETY: the device is live, and so is its memory.
        unsafe {
            let args = ask(api().PJRT_Device_DefaultMemory, |args| {
                args.device = self.raw();
            })?;
            MemoryHandle::from_raw(args.memory)
        }
    }
}

impl MemoryHandle {
    /// Whether it is of that kind.
    pub fn is_kind(self, kind: &[u8]) -> bool {
        // SAFETY: the memory is live, and the text lives as long.
        unsafe {
            ask(api().PJRT_Memory_Kind, |args| args.memory = self.raw())
                .is_ok_and(|args| bytes(args.kind, args.kind_size) == kind)
        }
    }
}
