//! The function table: the inner plugin's own, with what must differ replaced.

use std::ffi::c_void;
use std::mem::{offset_of, size_of};
use std::sync::OnceLock;

use pjrt_sys::*;

use crate::error::Error;
use crate::inner::api;
use crate::pjrt::entry::entry;
use crate::pjrt::{
    buffer, client, device, error, event, executable, execute_context, extension,
    loaded_executable, newer, topology,
};
use crate::plugin;

/// Replaces entries of a table, if the inner table is long enough to have them.
macro_rules! replace {
    ($api:ident: $($function:ident = $with:path,)+) => {$(
        if $api.struct_size > offset_of!(PJRT_Api, $function) {
            $api.$function = Some($with);
        }
    )+};
}

/// The table for the framework; made once.
pub fn table() -> *const PJRT_Api {
    struct Table(*const PJRT_Api);
    // SAFETY: the table is leaked and only read.
    unsafe impl Send for Table {}
    // SAFETY: as for `Send`.
    unsafe impl Sync for Table {}
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE
        .get_or_init(|| {
            Table(match plugin::load() {
                Ok(_) => wrapped(),
                Err(error) => stillborn(error),
            })
        })
        .0
}

fn wrapped() -> *const PJRT_Api {
    let inner = api();
    // A newer inner table is longer than our header's; its tail is kept as it is.
    let size = inner.struct_size.max(size_of::<PJRT_Api>());
    let mut storage = vec![0u64; size.div_ceil(size_of::<u64>())].into_boxed_slice();
    let api = storage.as_mut_ptr().cast::<PJRT_Api>();
    Box::leak(storage);
    // SAFETY: the storage is aligned and at least as long as both tables; the inner table is
    // readable for its struct_size.
    let api = unsafe {
        std::ptr::copy_nonoverlapping(
            std::ptr::from_ref(inner).cast::<u8>(),
            api.cast::<u8>(),
            inner.struct_size,
        );
        &mut *api
    };
    api.extension_start = extension::chain();
    replace_general(api);
    replace_devices(api);
    replace_buffers(api);
    for (place, ours) in newer::FUNCTIONS {
        // What an inner plugin lacks, its framework does not ask for.
        if let Some(entry) = slot(api, place).filter(|entry| !entry.is_null()) {
            *entry = ours;
        }
    }
    api
}

/// Errors, events, clients and executables.
fn replace_general(api: &mut PJRT_Api) {
    replace! { api:
        PJRT_Error_Destroy = error::destroy,
        PJRT_Error_Message = error::message,
        PJRT_Error_GetCode = error::get_code,
        PJRT_Event_OnReady = event::on_ready,
        PJRT_Event_Destroy = event::destroy,
        PJRT_Client_Create = client::create,
        PJRT_Client_Destroy = client::destroy,
        PJRT_Client_PlatformVersion = client::platform_version,
        PJRT_Client_Compile = executable::compile,
        PJRT_Compile = executable::compile_ahead,
        PJRT_LoadedExecutable_GetExecutable = loaded_executable::get_executable,
        PJRT_LoadedExecutable_AddressableDevices = loaded_executable::addressable_devices,
        PJRT_LoadedExecutable_GetDeviceAssignment = loaded_executable::device_assignment,
        PJRT_Executable_Destroy = executable::destroy,
        PJRT_Executable_NumPartitions = executable::num_partitions,
        PJRT_Executable_NumReplicas = executable::num_replicas,
        PJRT_Executable_Serialize = executable::serialize,
        PJRT_Executable_OptimizedProgram = executable::optimized,
        PJRT_Executable_DeserializeAndLoad = executable::deserialize_and_load,
        PJRT_ExecuteContext_Destroy = execute_context::destroy,
        PJRT_LoadedExecutable_Execute = loaded_executable::execute,
        PJRT_LoadedExecutable_Destroy = loaded_executable::destroy,
    }
}

/// Devices and the topology.
fn replace_devices(api: &mut PJRT_Api) {
    replace! { api:
        PJRT_Client_ProcessIndex = topology::process_index,
        PJRT_Client_Devices = topology::devices,
        PJRT_Client_LookupDevice = topology::lookup_device,
        PJRT_Client_AddressableDevices = topology::addressable_devices,
        PJRT_Client_AddressableMemories = topology::addressable_memories,
        PJRT_Client_LookupAddressableDevice = topology::lookup_addressable_device,
        PJRT_Client_DefaultDeviceAssignment = topology::default_device_assignment,
        PJRT_TopologyDescription_GetDeviceDescriptions = topology::device_descriptions,
        PJRT_Device_GetDescription = device::description,
        PJRT_Device_IsAddressable = device::is_addressable,
        PJRT_Device_LocalHardwareId = device::local_hardware_id,
        PJRT_Device_AddressableMemories = device::addressable_memories,
        PJRT_Device_DefaultMemory = device::default_memory,
        PJRT_Device_MemoryStats = device::memory_stats,
        PJRT_DeviceDescription_Id = device::id,
        PJRT_DeviceDescription_ProcessIndex = device::process_index,
        PJRT_DeviceDescription_Attributes = device::attributes,
        PJRT_DeviceDescription_Kind = device::kind,
        PJRT_DeviceDescription_DebugString = device::debug_string,
        PJRT_DeviceDescription_ToString = device::to_string,
    }
}

/// Buffers.
fn replace_buffers(api: &mut PJRT_Api) {
    replace! { api:
        PJRT_Client_BufferFromHostBuffer = buffer::from_host_buffer,
        PJRT_Client_CreateUninitializedBuffer = buffer::create_uninitialized,
        PJRT_Client_CreateViewOfDeviceBuffer = buffer::create_view,
        PJRT_Client_CreateAliasBuffer = buffer::create_alias,
        PJRT_Client_CreateBuffersForAsyncHostToDevice = buffer::create_for_async_transfer,
        PJRT_Buffer_CopyToDevice = buffer::copy_to_device,
        PJRT_Buffer_CopyToMemory = buffer::copy_to_memory,
        PJRT_Buffer_Destroy = buffer::destroy,
        PJRT_Buffer_Delete = buffer::delete,
        PJRT_Buffer_IsDeleted = buffer::is_deleted,
        PJRT_Buffer_ToHostBuffer = buffer::to_host_buffer,
        PJRT_Buffer_CopyRawToHost = buffer::copy_raw_to_host,
        PJRT_Buffer_UnsafePointer = buffer::unsafe_pointer,
        PJRT_Buffer_OpaqueDeviceMemoryDataPointer = buffer::device_pointer,
        PJRT_Buffer_ReadyEvent = buffer::ready_event,
        PJRT_Buffer_IncreaseExternalReferenceCount = buffer::add_reference,
        PJRT_Buffer_DecreaseExternalReferenceCount = buffer::remove_reference,
    }
}

/// An entry of the table by its number among the table's words, if the table has it.
fn slot(api: &mut PJRT_Api, number: usize) -> Option<&mut *const c_void> {
    let bytes = (number + 1) * size_of::<*const c_void>();
    (api.struct_size >= bytes).then(|| {
        // SAFETY: the table's storage has its struct_size, and is words.
        unsafe { &mut *std::ptr::from_mut(api).cast::<*const c_void>().add(number) }
    })
}

/// A table with nothing but the reason why there is no other.
fn stillborn(error: Error) -> *const PJRT_Api {
    static REASON: OnceLock<String> = OnceLock::new();
    REASON.get_or_init(|| error.to_string());

    fn reason() -> Error {
        let reason = REASON.get().cloned().unwrap_or_default();
        Error::verbatim(PJRT_Error_Code_FAILED_PRECONDITION, reason)
    }
    entry! {
        /// `PJRT_Plugin_Initialize`
        pub fn initialize(args: PJRT_Plugin_Initialize_Args) {
            Err(reason())
        }

        /// `PJRT_Plugin_Attributes`
        pub fn attributes(args: PJRT_Plugin_Attributes_Args) {
            // SAFETY: an empty list.
            unsafe { args.members() }.num_attributes = 0;
            Ok(())
        }

        /// `PJRT_Client_Create`
        pub fn create(args: PJRT_Client_Create_Args) {
            Err(reason())
        }
    }
    // SAFETY: zero is valid for a table of optional functions.
    let mut api: Box<PJRT_Api> = Box::new(unsafe { std::mem::zeroed() });
    api.struct_size = size_of::<PJRT_Api>();
    api.pjrt_api_version.struct_size = size_of::<PJRT_Api_Version>();
    api.pjrt_api_version.major_version = PJRT_API_MAJOR as i32;
    api.pjrt_api_version.minor_version = PJRT_API_MINOR as i32;
    api.PJRT_Error_Destroy = Some(error::destroy);
    api.PJRT_Error_Message = Some(error::message);
    api.PJRT_Error_GetCode = Some(error::get_code);
    api.PJRT_Plugin_Initialize = Some(initialize);
    api.PJRT_Plugin_Attributes = Some(attributes);
    api.PJRT_Client_Create = Some(create);
    Box::leak(api)
}
