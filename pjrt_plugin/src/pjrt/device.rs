//! Devices and their descriptions. Those of other ranks may be ours, with nothing of the inner
//! plugin behind them (`devices.rs`): what they are is said here, and nothing else can be done with
//! them.

use std::ffi::c_char;
use std::sync::Arc;

use pjrt_sys::*;

use crate::clients::{self, Client};
use crate::error::Error;
use crate::inner::api;
use crate::inner::handles::{DescriptionHandle, DeviceHandle, Handle, LoadedHandle};
use crate::pjrt::entry::entry;
use crate::pjrt::topology::unknown;
use crate::plugin::config;

/// The client of a device, and the device's number.
fn of(device: DeviceHandle) -> Result<(Arc<Client>, i32), Error> {
    clients::owner(device.address()).ok_or_else(|| unknown("device"))
}

/// Refuses a device of another rank that the inner plugin does not have.
pub fn refuse_other(function: &str, device: DeviceHandle) -> Result<(), Error> {
    match clients::owner(device.address()) {
        Some((client, owner)) if client.devices.is_shown_only(device.address()) => {
            Err(Error::invalid(format!(
                "{function} on rank {}: the device belongs to rank {}, which alone can use it; \
                 use jax.local_devices()",
                client.rank,
                client.devices.rank_of(owner)
            )))
        }
        _ => Ok(()),
    }
}

/// Refuses to run a program, which leaves its device open, on another device of this rank than it
/// is loaded on.
pub fn refuse_elsewhere(executable: LoadedHandle, device: DeviceHandle) -> Result<(), Error> {
    let several =
        clients::owner(device.address()).filter(|(client, _)| client.devices.of_rank() > 1);
    let Some((_, number)) = several else {
        return Ok(());
    };
    let (client, home) = clients::of_executable(executable)?;
    match client.devices.owner(home.device.address()) {
        Some(loaded) if loaded != number => Err(Error::unimplemented(format!(
            "a program that was compiled without a device (compile_portable_executable) runs on \
             device {loaded}, the first of rank {}, and not on device {number}: compile it for \
             that one",
            client.rank
        ))),
        _ => Ok(()),
    }
}

/// The client that a description is of, if its rank is not for the inner plugin to say.
fn described(description: DescriptionHandle) -> Option<(Arc<Client>, i32)> {
    let found = clients::owner(description.address())?;
    found.0.devices.is_alone().then_some(found)
}

/// A device of the inner plugin's that is of the same kind.
pub fn like(device: DeviceHandle) -> DeviceHandle {
    match clients::owner(device.address()) {
        Some((client, _)) if client.devices.is_shown_only(device.address()) => client.device(),
        _ => device,
    }
}

/// A description of the inner plugin's that says the same of a device, but for its number.
pub fn description_like(description: DescriptionHandle) -> DescriptionHandle {
    match clients::owner(description.address()) {
        Some((client, _)) if client.devices.is_shown_only(description.address()) => {
            client.devices.descriptions()[client.devices.first() as usize]
        }
        _ => description,
    }
}

entry! {
    /// `PJRT_Device_GetDescription`
    pub fn description(args: PJRT_Device_GetDescription_Args, device: DeviceHandle) {
        let (client, owner) = of(device)?;
        let description = client.devices.descriptions()[owner as usize].raw();
        // SAFETY: the description lives as long as the client.
        unsafe { args.members() }.device_description = description;
        Ok(())
    }

    /// `PJRT_Device_IsAddressable`
    pub fn is_addressable(args: PJRT_Device_IsAddressable_Args, device: DeviceHandle) {
        let (client, owner) = of(device)?;
        // SAFETY: an answer for the framework.
        unsafe { args.members() }.is_addressable =
            client.devices.local(owner.into()).is_some();
        Ok(())
    }

    /// `PJRT_Device_LocalHardwareId`
    pub fn local_hardware_id(args: PJRT_Device_LocalHardwareId_Args, device: DeviceHandle) {
        let place = of(device).map_or(0, |(client, owner)| owner % client.devices.of_rank());
        // SAFETY: a number for the framework.
        unsafe { args.members() }.local_hardware_id = place;
        Ok(())
    }

    /// `PJRT_Device_AddressableMemories`: another rank's has none that could be addressed.
    pub fn addressable_memories(args: PJRT_Device_AddressableMemories_Args, device: DeviceHandle) {
        if refuse_other("PJRT_Device_AddressableMemories", device).is_err() {
            // SAFETY: an empty list.
            let args = unsafe { args.members() };
            args.memories = std::ptr::null();
            args.num_memories = 0;
            return Ok(());
        }
        args.pass_on(api().PJRT_Device_AddressableMemories)
    }

    /// `PJRT_Device_DefaultMemory`
    pub fn default_memory(args: PJRT_Device_DefaultMemory_Args, device: DeviceHandle) {
        refuse_other("PJRT_Device_DefaultMemory", device)?;
        args.pass_on(api().PJRT_Device_DefaultMemory)
    }

    /// `PJRT_Device_MemoryStats`
    pub fn memory_stats(args: PJRT_Device_MemoryStats_Args, device: DeviceHandle) {
        refuse_other("PJRT_Device_MemoryStats", device)?;
        args.pass_on(api().PJRT_Device_MemoryStats)
    }

    /// `PJRT_DeviceDescription_Id`
    pub fn id(args: PJRT_DeviceDescription_Id_Args, device_description: DescriptionHandle) {
        let Some((_, owner)) = described(device_description) else {
            return args.pass_on(api().PJRT_DeviceDescription_Id);
        };
        // SAFETY: a number for the framework.
        unsafe { args.members() }.id = owner;
        Ok(())
    }

    /// `PJRT_DeviceDescription_ProcessIndex`. Descriptions of topologies that are of no client have
    /// the same ids, as many of them for each rank as ranks have devices.
    pub fn process_index(
        args: PJRT_DeviceDescription_ProcessIndex_Args, device_description: DescriptionHandle
    ) {
        let rank = match clients::owner(device_description.address()) {
            Some((client, owner)) => client.devices.rank_of(owner),
            None => device_description.id()? / config().local_devices,
        };
        // SAFETY: a number for the framework.
        unsafe { args.members() }.process_index = rank;
        Ok(())
    }

    /// `PJRT_DeviceDescription_DebugString`
    pub fn debug_string(
        args: PJRT_DeviceDescription_DebugString_Args, device_description: DescriptionHandle
    ) {
        let Some((client, owner)) = described(device_description) else {
            return args.pass_on(api().PJRT_DeviceDescription_DebugString);
        };
        let text = client.devices.texts(owner).map_or("", |texts| &texts.debug);
        // SAFETY: the text lives as long as the client.
        let args = unsafe { args.members() };
        args.debug_string = text.as_ptr().cast::<c_char>();
        args.debug_string_size = text.len();
        Ok(())
    }

    /// `PJRT_DeviceDescription_ToString`
    pub fn to_string(
        args: PJRT_DeviceDescription_ToString_Args, device_description: DescriptionHandle
    ) {
        let Some((client, owner)) = described(device_description) else {
            return args.pass_on(api().PJRT_DeviceDescription_ToString);
        };
        let text = client.devices.texts(owner).map_or("", |texts| &texts.short);
        // SAFETY: the text lives as long as the client.
        let args = unsafe { args.members() };
        args.to_string = text.as_ptr().cast::<c_char>();
        args.to_string_size = text.len();
        Ok(())
    }

    /// `PJRT_DeviceDescription_Kind`
    pub fn kind(args: PJRT_DeviceDescription_Kind_Args, device_description: DescriptionHandle) {
        // SAFETY: live as well, and of the same kind; so are its attributes below.
        unsafe { args.members() }.device_description = description_like(device_description).raw();
        let done = args.pass_on(api().PJRT_DeviceDescription_Kind);
        // SAFETY: as it was.
        unsafe { args.members() }.device_description = device_description.raw();
        done
    }

    /// `PJRT_DeviceDescription_Attributes`
    pub fn attributes(
        args: PJRT_DeviceDescription_Attributes_Args, device_description: DescriptionHandle
    ) {
        // SAFETY: as in `kind`.
        unsafe { args.members() }.device_description = description_like(device_description).raw();
        let done = args.pass_on(api().PJRT_DeviceDescription_Attributes);
        // SAFETY: as it was.
        unsafe { args.members() }.device_description = device_description.raw();
        done
    }
}
