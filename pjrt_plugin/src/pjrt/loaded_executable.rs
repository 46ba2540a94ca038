//! Loaded executables: launching them, and what they say of their devices.

use std::ffi::c_void;
use std::ops::Deref;
use std::sync::Arc;

use pjrt_sys::*;

use crate::compile::spmd;
use crate::error::Error;
use crate::inner::api;
use crate::inner::execute_args::ExecuteArgs;
use crate::inner::execute_options::ExecuteOptions;
use crate::inner::handles::{DeviceHandle, FromRaw, Handle, LoadedHandle, Owned};
use crate::inner::{serialized, side_table};
use crate::launch::local_devices::LocalDevices;
use crate::launch::{self, keep_alive, local_devices};
use crate::pjrt::device;
use crate::pjrt::entry::entry;

entry! {
    /// `PJRT_LoadedExecutable_Execute`
    pub fn execute(args: PJRT_LoadedExecutable_Execute_Args) {
        if args.num_devices == 0 {
            // It runs on devices of other ranks alone.
            return Ok(());
        }
        // SAFETY: the framework passes a live executable.
        let executable = unsafe { LoadedHandle::from_raw(args.executable) }?;
        if !args.execute_device.is_null() {
            // SAFETY: the framework passes a live device.
            let device = unsafe { DeviceHandle::from_raw(args.execute_device) }?;
            device::refuse_other("PJRT_LoadedExecutable_Execute", device)?;
            device::refuse_elsewhere(executable, device)?;
        }
        let given = args.options;
        // SAFETY: the options are valid for their size, and outlive the copy.
        let mut longer = unsafe {
            ((*given).struct_size < size_of::<PJRT_ExecuteOptions>())
                .then(|| ExecuteOptions::borrow(given))
        };
        if let Some(longer) = &mut longer {
            // SAFETY: the same options, for this call.
            unsafe { args.members() }.options = longer.raw();
        }
        let launched = match local_devices::program(executable) {
            Some(local) => execute_on_several(args.deref(), executable, &local),
            // SAFETY: the framework passes valid arguments, and each other executable here has one
            // device.
            None => unsafe { ExecuteArgs::new(args.members()) }
                .and_then(|mut launch| launch::execute(&mut launch)),
        };
        // SAFETY: as they were.
        unsafe { args.members() }.options = given;
        launched
    }

    /// `PJRT_LoadedExecutable_Destroy`
    pub fn destroy(args: PJRT_LoadedExecutable_Destroy_Args, executable: LoadedHandle) {
        // SAFETY: the framework gives it up, and does not use it any more.
        let given_up = unsafe { Owned::taken(executable) };
        let Some(unused) = keep_alive::postpone_destroy(given_up) else {
            return Ok(());
        };
        unused.release();
        side_table::forget(executable.address());
        args.pass_on(api().PJRT_LoadedExecutable_Destroy)
    }

    /// `PJRT_LoadedExecutable_GetExecutable`: what is known of the loaded executable is known of
    /// this one too.
    pub fn get_executable(
        args: PJRT_LoadedExecutable_GetExecutable_Args, loaded_executable: LoadedHandle
    ) {
        args.pass_on(api().PJRT_LoadedExecutable_GetExecutable)?;
        let (loaded, executable) = (loaded_executable.address(), args.executable as usize);
        spmd::share(loaded, executable);
        serialized::share(loaded, executable);
        Ok(())
    }

    /// `PJRT_LoadedExecutable_AddressableDevices`
    pub fn addressable_devices(
        args: PJRT_LoadedExecutable_AddressableDevices_Args, executable: LoadedHandle
    ) {
        args.pass_on(api().PJRT_LoadedExecutable_AddressableDevices)?;
        if spmd::is_elsewhere(executable) {
            // SAFETY: a shorter list.
            unsafe { args.members() }.num_addressable_devices = 0;
        } else if let Some(local) = local_devices::program(executable) {
            // SAFETY: the list lives as long as the loaded executable.
            let args = unsafe { args.members() };
            args.addressable_devices = local.devices.as_ptr().cast();
            args.num_addressable_devices = local.devices.len();
        }
        Ok(())
    }

    /// `PJRT_LoadedExecutable_GetDeviceAssignment`
    pub fn device_assignment(
        args: PJRT_LoadedExecutable_GetDeviceAssignment_Args, executable: LoadedHandle
    ) {
        let ours = spmd::assignment(executable)?;
        args.pass_on(api().PJRT_LoadedExecutable_GetDeviceAssignment)?;
        // A program without one runs on whatever device it is launched on.
        let Some(serialized) = ours.filter(|_| args.serialized_bytes_size > 0) else {
            return Ok(());
        };
        let serialized = Box::new(serialized);
        if let Some(free) = args.serialized_device_assignment_deleter {
            // SAFETY: the inner plugin has just made it, for whoever calls its deleter.
            unsafe { free(args.serialized_device_assignment) };
        }
        // SAFETY: the bytes live until the framework calls the deleter with the box.
        let args = unsafe { args.members() };
        args.serialized_bytes = serialized.as_ptr().cast();
        args.serialized_bytes_size = serialized.len();
        args.serialized_device_assignment = Box::into_raw(serialized).cast::<c_void>().cast();
        args.serialized_device_assignment_deleter = Some(free_assignment);
        Ok(())
    }
}

/// Launches a program on each of this rank's devices that it runs on.
fn execute_on_several(
    args: &PJRT_LoadedExecutable_Execute_Args,
    first: LoadedHandle,
    local: &Arc<LocalDevices>,
) -> Result<(), Error> {
    let executables: Vec<LoadedHandle> = local.executables(first).collect();
    if args.num_devices != executables.len() {
        return Err(Error::invalid(format!(
            "PJRT_LoadedExecutable_Execute: {} devices are given, and the program runs on {} of \
             this rank",
            args.num_devices,
            executables.len()
        )));
    }
    let mut rows = Vec::new();
    // SAFETY: the framework passes valid arguments for so many devices.
    let parts = unsafe { ExecuteArgs::of_each(args, executables.into_iter(), &mut rows) };
    launch::execute_several(local, &mut parts?)
}

unsafe extern "C" fn free_assignment(assignment: *mut PJRT_DeviceAssignmentSerialized) {
    // SAFETY: `device_assignment` made the box, and the framework frees it once.
    drop(unsafe { Box::from_raw(assignment.cast::<Vec<u8>>()) });
}
