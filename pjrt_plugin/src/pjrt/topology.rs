//! The topology is MPI's: device `i` belongs to rank `i`, and each rank addresses its own.

use pjrt_sys::*;

use crate::boundary;
use crate::error::Error;
use crate::inner::call::{call, new_args};
use crate::pjrt::client;
use crate::plugin::plugin;

fn unknown(what: &str) -> Error {
    Error::invalid(format!(
        "mpi_cuda: unknown {what}: it is not of a client of this plugin"
    ))
}

/// `PJRT_Client_ProcessIndex`
pub unsafe extern "C" fn process_index(
    args: *mut PJRT_Client_ProcessIndex_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        let args = unsafe { &mut *args };
        args.process_index = client::find(args.client)
            .ok_or_else(|| unknown("client"))?
            .rank;
        Ok(())
    })
}

/// `PJRT_Client_AddressableDevices`
pub unsafe extern "C" fn addressable_devices(
    args: *mut PJRT_Client_AddressableDevices_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        let args = unsafe { &mut *args };
        let client = client::find(args.client).ok_or_else(|| unknown("client"))?;
        // The list lives as long as the client, which the table keeps until it is destroyed.
        args.addressable_devices = client.addressable.as_ptr();
        args.num_addressable_devices = client.addressable.len();
        Ok(())
    })
}

/// `PJRT_Client_AddressableMemories`
pub unsafe extern "C" fn addressable_memories(
    args: *mut PJRT_Client_AddressableMemories_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        let args = unsafe { &mut *args };
        let client = client::find(args.client).ok_or_else(|| unknown("client"))?;
        args.addressable_memories = client.memories.as_ptr();
        args.num_addressable_memories = client.memories.len();
        Ok(())
    })
}

/// `PJRT_Client_LookupAddressableDevice`: local ids start at 0 on each rank.
pub unsafe extern "C" fn lookup_addressable_device(
    args: *mut PJRT_Client_LookupAddressableDevice_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        let args = unsafe { &mut *args };
        let client = client::find(args.client).ok_or_else(|| unknown("client"))?;
        if args.local_hardware_id != 0 {
            return Err(Error::invalid(format!(
                "mpi_cuda: no local device {}: each rank has one, with local id 0",
                args.local_hardware_id
            )));
        }
        args.addressable_device = client.addressable[0];
        Ok(())
    })
}

/// `PJRT_Client_DefaultDeviceAssignment`: this rank's device for programs of one device.
pub unsafe extern "C" fn default_device_assignment(
    args: *mut PJRT_Client_DefaultDeviceAssignment_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments with room for the assignment.
        unsafe {
            let inner = &mut *args;
            let client = client::find(inner.client).ok_or_else(|| unknown("client"))?;
            call(
                plugin().inner.api().PJRT_Client_DefaultDeviceAssignment,
                args,
            )?;
            if inner.num_replicas * inner.num_partitions == 1 && inner.default_assignment_size > 0 {
                *inner.default_assignment = client.rank;
            }
        }
        Ok(())
    })
}

/// `PJRT_Device_IsAddressable`
pub unsafe extern "C" fn is_addressable(
    args: *mut PJRT_Device_IsAddressable_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        let args = unsafe { &mut *args };
        let (client, owner) = client::owner(args.device).ok_or_else(|| unknown("device"))?;
        args.is_addressable = owner == client.rank;
        Ok(())
    })
}

/// `PJRT_Device_LocalHardwareId`
pub unsafe extern "C" fn local_hardware_id(
    args: *mut PJRT_Device_LocalHardwareId_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe { (*args).local_hardware_id = 0 };
        Ok(())
    })
}

/// `PJRT_DeviceDescription_ProcessIndex`. Descriptions of devices and of topologies are different
/// pointers with the same ids, and the inner CPU client numbers its devices from 0: the id is the
/// rank.
pub unsafe extern "C" fn description_process_index(
    args: *mut PJRT_DeviceDescription_ProcessIndex_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        let args = unsafe { &mut *args };
        let mut id = new_args::<PJRT_DeviceDescription_Id_Args>();
        id.device_description = args.device_description;
        // SAFETY: a live description of the inner plugin.
        unsafe { call(plugin().inner.api().PJRT_DeviceDescription_Id, &mut id) }?;
        args.process_index = id.id;
        Ok(())
    })
}
