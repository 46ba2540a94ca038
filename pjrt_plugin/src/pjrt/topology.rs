//! The topology is MPI's: devices belong to ranks in order, and each rank addresses its own.

use std::sync::Arc;

use pjrt_sys::*;

use crate::clients::{self, Client};
use crate::error::Error;
use crate::inner::api;
use crate::inner::handles::{ClientHandle, TopologyHandle};
use crate::pjrt::entry::entry;

fn find(client: ClientHandle) -> Result<Arc<Client>, Error> {
    clients::find(client).ok_or_else(|| unknown("client"))
}

/// What the framework names is not of a client that it has.
pub fn unknown(what: &str) -> Error {
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

    /// `PJRT_Client_Devices`
    pub fn devices(args: PJRT_Client_Devices_Args, client: ClientHandle) {
        let client = find(client)?;
        // SAFETY: the list lives as long as the client, which is known until it is destroyed.
        let args = unsafe { args.members() };
        args.devices = client.devices.all().as_ptr().cast();
        args.num_devices = client.devices.all().len();
        Ok(())
    }

    /// `PJRT_Client_LookupDevice`
    pub fn lookup_device(args: PJRT_Client_LookupDevice_Args, client: ClientHandle) {
        let client = find(client)?;
        let devices = client.devices.all();
        let device = usize::try_from(args.id).ok().and_then(|id| devices.get(id));
        let device = device.ok_or_else(|| {
            let last = devices.len() - 1;
            Error::invalid(format!("no device {}: there are those from 0 to {last}", args.id))
        })?;
        // SAFETY: the device lives as long as its client.
        unsafe { args.members() }.device = device.raw();
        Ok(())
    }

    /// `PJRT_TopologyDescription_GetDeviceDescriptions`: a client's topology has all devices.
    pub fn device_descriptions(
        args: PJRT_TopologyDescription_GetDeviceDescriptions_Args, topology: TopologyHandle
    ) {
        let Some(client) = clients::of_topology(topology) else {
            return args.pass_on(api().PJRT_TopologyDescription_GetDeviceDescriptions);
        };
        let descriptions = client.devices.descriptions();
        // SAFETY: the list lives as long as the client, whose topology this is.
        let args = unsafe { args.members() };
        args.descriptions = descriptions.as_ptr().cast();
        args.num_descriptions = descriptions.len();
        Ok(())
    }

    /// `PJRT_Client_AddressableDevices`
    pub fn addressable_devices(args: PJRT_Client_AddressableDevices_Args, client: ClientHandle) {
        let client = find(client)?;
        // SAFETY: the list lives as long as the client, which is known until it is destroyed.
        let args = unsafe { args.members() };
        args.addressable_devices = client.devices.own().as_ptr().cast();
        args.num_addressable_devices = client.devices.own().len();
        Ok(())
    }

    /// `PJRT_Client_AddressableMemories`
    pub fn addressable_memories(args: PJRT_Client_AddressableMemories_Args, client: ClientHandle) {
        let client = find(client)?;
        // SAFETY: as in `addressable_devices`.
        let args = unsafe { args.members() };
        args.addressable_memories = client.devices.memories().as_ptr().cast();
        args.num_addressable_memories = client.devices.memories().len();
        Ok(())
    }

    /// `PJRT_Client_LookupAddressableDevice`: local ids start at 0 on each rank.
    pub fn lookup_addressable_device(
        args: PJRT_Client_LookupAddressableDevice_Args, client: ClientHandle
    ) {
        let client = find(client)?;
        let (own, place) = (client.devices.own(), args.local_hardware_id);
        let found = usize::try_from(place).ok().and_then(|place| own.get(place));
        let device = found.ok_or_else(|| {
            let last = own.len() - 1;
            Error::invalid(match last {
                0 => format!("no local device {place}: each rank has one, with local id 0"),
                _ => format!("no local device {place}: each rank has those from 0 to {last}"),
            })
        })?;
        // SAFETY: the device lives as long as its client.
        unsafe { args.members() }.addressable_device = device.raw();
        Ok(())
    }

    /// `PJRT_Client_DefaultDeviceAssignment`: this rank's first for programs of one device, else
    /// the first ones in order, replica by replica, as for programs that are assigned to none.
    pub fn default_device_assignment(
        args: PJRT_Client_DefaultDeviceAssignment_Args, client: ClientHandle
    ) {
        let client = find(client)?;
        let (replicas, partitions) = (args.num_replicas.max(0), args.num_partitions.max(0));
        let count = i64::from(replicas) * i64::from(partitions);
        let devices = client.devices.all().len();
        if count > devices as i64 {
            return Err(Error::invalid(format!(
                "{replicas} replicas of {partitions} partitions are more than the {devices} devices"
            )));
        }
        if args.default_assignment_size < count as usize {
            return Err(Error::invalid(format!(
                "{replicas} replicas of {partitions} partitions do not fit into a list of {}",
                args.default_assignment_size
            )));
        }
        for place in 0..count as i32 {
            let device = if count == 1 { client.devices.first() } else { place };
            // SAFETY: the framework's list is as long as it says.
            unsafe { *args.default_assignment.add(place as usize) = device };
        }
        Ok(())
    }
}
