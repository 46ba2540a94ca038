//! Functions that tables of newer inner plugins have after those of our header, by their place
//! among the table's words. They differ where they take a device or its description, which may be
//! of another rank, or compile options.

use std::ffi::{c_char, c_int, c_void};

use pjrt_sys::*;

use crate::compile::{self, spmd};
use crate::inner::handles::{
    ClientHandle, DeviceHandle, ExecutableHandle, FromRaw, Handle, LoadedHandle,
};
use crate::inner::library::newer;
use crate::pjrt::entry::{entry, make_with_options};
use crate::pjrt::{device, error};

/// The places, and what stands there in the framework's table.
pub const FUNCTIONS: [(usize, *const c_void); 8] = [
    (POISON_EXECUTION, poison_execution as *const c_void),
    (TRACKING_EVENT, tracking_event as *const c_void),
    (GET_COMPILE_OPTIONS, get_compile_options as *const c_void),
    (GET_ATTRIBUTES, get_attributes as *const c_void),
    (CLIENT_LOAD, client_load as *const c_void),
    (LOGICAL_IDS, logical_ids as *const c_void),
    (FOR_EACH_PAYLOAD, error::for_each_payload as *const c_void),
    (CLEAR_MEMORY_STATS, clear_memory_stats as *const c_void),
];

const POISON_EXECUTION: usize = 126;
const TRACKING_EVENT: usize = 127;
const GET_COMPILE_OPTIONS: usize = 129;
const GET_ATTRIBUTES: usize = 133;
const CLIENT_LOAD: usize = 134;
const LOGICAL_IDS: usize = 135;
/// Where `PJRT_Error_ForEachPayload` is.
pub const FOR_EACH_PAYLOAD: usize = 137;
const CLEAR_MEMORY_STATS: usize = 140;

/// How the arguments of a device's functions begin.
#[repr(C)]
pub struct OfDevice {
    struct_size: usize,
    extension_start: *mut PJRT_Extension_Base,
    device: *mut PJRT_Device,
}

/// The arguments of `PJRT_Device_CreateAsyncTrackingEvent`.
#[repr(C)]
pub struct TrackingEvent {
    struct_size: usize,
    extension_start: *mut PJRT_Extension_Base,
    device: *mut PJRT_Device,
    description: *const c_char,
    description_size: usize,
    event: *mut c_void,
}

/// The arguments of `PJRT_Client_Load`.
#[repr(C)]
pub struct Load {
    struct_size: usize,
    extension_start: *mut PJRT_Extension_Base,
    client: *mut PJRT_Client,
    executable: *mut PJRT_Executable,
    compile_options: *const c_char,
    compile_options_size: usize,
    loaded_executable: *mut PJRT_LoadedExecutable,
}

/// The arguments of `PJRT_Executable_GetCompileOptions`.
#[repr(C)]
pub struct CompileOptions {
    struct_size: usize,
    extension_start: *mut PJRT_Extension_Base,
    executable: *mut PJRT_Executable,
    serialized_bytes: *const c_char,
    serialized_bytes_size: usize,
    serialized_compile_options: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// The arguments of `PJRT_LoadedExecutable_AddressableDeviceLogicalIds`.
#[repr(C)]
pub struct LogicalIds {
    struct_size: usize,
    extension_start: *mut PJRT_Extension_Base,
    executable: *mut PJRT_LoadedExecutable,
    ids: *const [c_int; 2],
    num_ids: usize,
}

unsafe extern "C" fn free_options(options: *mut c_void) {
    // SAFETY: `get_compile_options` made the box, and the framework frees it once.
    drop(unsafe { Box::from_raw(options.cast::<Vec<u8>>()) });
}

entry! {
    /// `PJRT_Executable_GetCompileOptions`: with the numbers by which the framework knows devices.
    pub fn get_compile_options(args: CompileOptions, executable: ExecutableHandle) {
        let Some(given) = spmd::given(executable.address())? else {
            // SAFETY: in this place is the function of these arguments; so below.
            return args.pass_on(unsafe { newer(GET_COMPILE_OPTIONS) });
        };
        let given = Box::new(given);
        // SAFETY: the bytes live until the framework calls the deleter with the box.
        let args = unsafe { args.members() };
        args.serialized_bytes = given.as_ptr().cast();
        args.serialized_bytes_size = given.len();
        args.serialized_compile_options = Box::into_raw(given).cast();
        args.deleter = Some(free_options);
        Ok(())
    }

    /// `PJRT_LoadedExecutable_AddressableDeviceLogicalIds`
    pub fn logical_ids(args: LogicalIds, executable: LoadedHandle) {
        if spmd::is_elsewhere(executable) {
            // SAFETY: an empty list.
            let args = unsafe { args.members() };
            (args.ids, args.num_ids) = (std::ptr::null(), 0);
            return Ok(());
        }
        let own = spmd::find(executable.address());
        let Some(logical) = own.as_ref().map(|own| &own.logical[..]).filter(|ids| !ids.is_empty())
        else {
            // SAFETY: as above.
            return args.pass_on(unsafe { newer(LOGICAL_IDS) });
        };
        // SAFETY: the list lives as long as the loaded executable.
        let args = unsafe { args.members() };
        (args.ids, args.num_ids) = (logical.as_ptr(), logical.len());
        Ok(())
    }

    /// `PJRT_Device_PoisonExecution`
    pub fn poison_execution(args: OfDevice, device: DeviceHandle) {
        device::refuse_other("PJRT_Device_PoisonExecution", device)?;
        // SAFETY: as above.
        args.pass_on(unsafe { newer(POISON_EXECUTION) })
    }

    /// `PJRT_Device_CreateAsyncTrackingEvent`: no event for another rank's device, which
    /// frameworks take; an error would end them.
    pub fn tracking_event(args: TrackingEvent, device: DeviceHandle) {
        if device::refuse_other("PJRT_Device_CreateAsyncTrackingEvent", device).is_err() {
            // SAFETY: no event.
            unsafe { args.members() }.event = std::ptr::null_mut();
            return Ok(());
        }
        // SAFETY: as above.
        args.pass_on(unsafe { newer(TRACKING_EVENT) })
    }

    /// `PJRT_Device_ClearMemoryStats`
    pub fn clear_memory_stats(args: OfDevice, device: DeviceHandle) {
        device::refuse_other("PJRT_Device_ClearMemoryStats", device)?;
        // SAFETY: as above.
        args.pass_on(unsafe { newer(CLEAR_MEMORY_STATS) })
    }

    /// `PJRT_Device_GetAttributes`: those of another rank's device are like this one's.
    pub fn get_attributes(args: OfDevice, device: DeviceHandle) {
        // SAFETY: a live device as well.
        unsafe { args.members() }.device = device::like(device).raw();
        // SAFETY: as above.
        let done = args.pass_on(unsafe { newer(GET_ATTRIBUTES) });
        // SAFETY: as it was.
        unsafe { args.members() }.device = device.raw();
        done
    }

    /// `PJRT_Client_Load`
    pub fn client_load(
        args: Load, client: ClientHandle; options: &[u8] = compile_options, compile_options_size
    ) {
        // SAFETY: the framework passes a live executable.
        let executable = unsafe { ExecutableHandle::from_raw(args.executable) }?;
        let compiled_with = match options {
            [] => spmd::given(executable.address())?.unwrap_or_default(),
            given => given.to_vec(),
        };
        let given = args.client;
        let loaded = compile::load_compiled(client, &compiled_with, |home, options| {
            // SAFETY: a live client, and as above.
            let function = unsafe {
                args.members().client = home.raw();
                newer(CLIENT_LOAD)
            };
            make_with_options!(args, options, function, loaded_executable)
        });
        // SAFETY: as it was.
        unsafe { args.members() }.client = given;
        let loaded = loaded?;
        // SAFETY: the framework gets the executable.
        unsafe { args.members() }.loaded_executable = loaded.release().raw();
        Ok(())
    }
}
