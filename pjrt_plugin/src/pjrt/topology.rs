//! The topology is MPI's: device `i` belongs to rank `i`, and each rank addresses its own.

use std::sync::Arc;

use pjrt_sys::*;

use crate::clients::{self, Client};
use crate::error::Error;
use crate::inner::api;
use crate::inner::call::ask;
use crate::inner::handles::{ClientHandle, DeviceHandle, Handle};
use crate::pjrt::entry::entry;

fn find(client: ClientHandle) -> Result<Arc<Client>, Error> {
    clients::find(client).ok_or_else(|| unknown("client"))
}

fn unknown(what: &str) -> Error {
    Error::invalid(format!(
        "unknown {what}: it is not of a client of this plugin"
    ))
}

entry! {
    /// `PJRT_Client_ProcessIndex`
    pub fn process_index(args: PJRT_Client_ProcessIndex_Args, client: ClientHandle) {
        let rank = find(client)?.rank;
        // SAFETY: a number for the framework.
        unsafe { args.members() }.process_index = rank;
        Ok(())
    }

    /// `PJRT_Client_AddressableDevices`
    pub fn addressable_devices(args: PJRT_Client_AddressableDevices_Args, client: ClientHandle) {
        let client = find(client)?;
        // SAFETY: the list lives as long as the client, which is known until it is destroyed.
        let args = unsafe { args.members() };
        args.addressable_devices = client.addressable.as_ptr().cast();
        args.num_addressable_devices = client.addressable.len();
        Ok(())
    }

    /// `PJRT_Client_AddressableMemories`
    pub fn addressable_memories(args: PJRT_Client_AddressableMemories_Args, client: ClientHandle) {
        let client = find(client)?;
        // SAFETY: as in `addressable_devices`.
        let args = unsafe { args.members() };
        args.addressable_memories = client.memories.as_ptr().cast();
        args.num_addressable_memories = client.memories.len();
        Ok(())
    }

    /// `PJRT_Client_LookupAddressableDevice`: local ids start at 0 on each rank.
    pub fn lookup_addressable_device(
        args: PJRT_Client_LookupAddressableDevice_Args, client: ClientHandle
    ) {
        let client = find(client)?;
        if args.local_hardware_id != 0 {
            return Err(Error::invalid(format!(
                "no local device {}: each rank has one, with local id 0",
                args.local_hardware_id
            )));
        }
        // SAFETY: the device lives as long as its client.
        unsafe { args.members() }.addressable_device = client.addressable[0].raw();
        Ok(())
    }

    /// `PJRT_Client_DefaultDeviceAssignment`: this rank's device for programs of one device.
    pub fn default_device_assignment(
        args: PJRT_Client_DefaultDeviceAssignment_Args, client: ClientHandle
    ) {
        let client = find(client)?;
        args.pass_on(api().PJRT_Client_DefaultDeviceAssignment)?;
        if args.num_replicas * args.num_partitions == 1 && args.default_assignment_size > 0 {
            // SAFETY: the framework's list is as long as it says.
            unsafe { *args.default_assignment = client.rank };
        }
        Ok(())
    }

    /// `PJRT_Device_IsAddressable`
    pub fn is_addressable(args: PJRT_Device_IsAddressable_Args, device: DeviceHandle) {
        let (client, owner) = clients::owner(device.address()).ok_or_else(|| unknown("device"))?;
        // SAFETY: an answer for the framework.
        unsafe { args.members() }.is_addressable = owner == client.rank;
        Ok(())
    }

    /// `PJRT_Device_LocalHardwareId`
    pub fn local_hardware_id(args: PJRT_Device_LocalHardwareId_Args) {
        // SAFETY: a number for the framework.
        unsafe { args.members() }.local_hardware_id = 0;
        Ok(())
    }

    /// `PJRT_DeviceDescription_ProcessIndex`. Descriptions of devices and of topologies are
    /// different pointers with the same ids, and the inner CPU client numbers its devices from 0:
    /// the id is the rank.
    pub fn description_process_index(args: PJRT_DeviceDescription_ProcessIndex_Args) {
        let description = args.device_description;
        // SAFETY: the framework passes a live description.
        let described = unsafe {
            ask(api().PJRT_DeviceDescription_Id, |id| id.device_description = description)
        };
        let id = described?.id;
        // SAFETY: a number for the framework.
        unsafe { args.members() }.process_index = id;
        Ok(())
    }
}
