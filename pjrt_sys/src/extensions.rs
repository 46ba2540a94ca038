//! Extension structs of `xla/pjrt/c/pjrt_c_api_ffi_extension.h`,
//! `xla/pjrt/c/pjrt_c_api_layouts_extension.h`,
//! `xla/pjrt/c/pjrt_c_api_memory_descriptions_extension.h`,
//! `xla/pjrt/c/pjrt_c_api_custom_partitioner_extension.h`,
//! `xla/pjrt/c/pjrt_c_api_profiler_extension.h` and
//! `xla/backends/profiler/plugin/profiler_c_api.h`, which no wheel ships.

use crate::bindings::*;

/// Arguments of `PJRT_FFI_UserData_Add`: attaches `user_data` to one execution.
#[repr(C)]
#[allow(missing_docs)]
pub struct PJRT_FFI_UserData_Add_Args {
    pub struct_size: usize,
    pub extension_start: *mut PJRT_Extension_Base,
    pub context: *mut PJRT_ExecuteContext,
    pub user_data: PJRT_FFI_UserData,
}

/// A type-erased pointer and the id under which handlers ask for it.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct PJRT_FFI_UserData {
    pub type_id: i64,
    pub data: *mut core::ffi::c_void,
}

/// Arguments of `PJRT_FFI_Register_Handler`, version 3 of the extension.
#[repr(C)]
#[allow(missing_docs)]
pub struct PJRT_FFI_Register_Handler_Args {
    pub struct_size: usize,
    pub target_name: *const core::ffi::c_char,
    pub target_name_size: usize,
    pub handler: *mut core::ffi::c_void,
    pub platform_name: *const core::ffi::c_char,
    pub platform_name_size: usize,
    pub traits: u32,
}

/// A function of an extension.
#[allow(non_camel_case_types)]
pub type PJRT_Extension_Function<Args> =
    Option<unsafe extern "C" fn(args: *mut Args) -> *mut PJRT_Error>;

/// The FFI extension (`PJRT_Extension_Type_FFI`), version 3.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct PJRT_FFI_Extension {
    pub base: PJRT_Extension_Base,
    pub type_register: *const core::ffi::c_void,
    pub user_data_add: PJRT_Extension_Function<PJRT_FFI_UserData_Add_Args>,
    pub register_handler: PJRT_Extension_Function<PJRT_FFI_Register_Handler_Args>,
}

/// Arguments of `PJRT_DeviceDescription_MemoryDescriptions`: what memories a device has.
#[repr(C)]
#[allow(missing_docs)]
pub struct PJRT_DeviceDescription_MemoryDescriptions_Args {
    pub struct_size: usize,
    pub extension_start: *mut PJRT_Extension_Base,
    pub device_description: *mut PJRT_DeviceDescription,
    pub memory_descriptions: *const *const core::ffi::c_void,
    pub num_memory_descriptions: usize,
    pub default_memory_index: usize,
}

/// The extension that describes memories (`PJRT_Extension_Type_MemoryDescriptions`).
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct PJRT_MemoryDescriptions_Extension {
    pub base: PJRT_Extension_Base,
    pub of_device: PJRT_Extension_Function<PJRT_DeviceDescription_MemoryDescriptions_Args>,
    pub kind: *const core::ffi::c_void,
}

/// Arguments of `PJRT_Layouts_MemoryLayout_Serialize`: a layout as XLA's text, such as `{0,1}`.
#[repr(C)]
#[allow(missing_docs)]
pub struct PJRT_Layouts_MemoryLayout_Serialize_Args {
    pub struct_size: usize,
    pub extension_start: *mut PJRT_Extension_Base,
    pub layout: *mut core::ffi::c_void,
    pub serialized_bytes: *const core::ffi::c_char,
    pub serialized_bytes_size: usize,
    pub serialized_layout: *mut core::ffi::c_void,
    pub serialized_layout_deleter: Option<unsafe extern "C" fn(layout: *mut core::ffi::c_void)>,
}

/// Arguments of `PJRT_Layouts_PJRT_Executable_GetOutputLayouts`; the layouts are the executable's.
#[repr(C)]
#[allow(missing_docs)]
pub struct PJRT_Layouts_PJRT_Executable_GetOutputLayouts_Args {
    pub struct_size: usize,
    pub extension_start: *mut PJRT_Extension_Base,
    pub executable: *mut PJRT_Executable,
    pub num_outputs: usize,
    pub layouts: *mut *mut core::ffi::c_void,
}

/// The layouts extension (`PJRT_Extension_Type_Layouts`), up to the functions that are used.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct PJRT_Layouts_Extension {
    pub base: PJRT_Extension_Base,
    pub memory_layout_destroy: *const core::ffi::c_void,
    pub memory_layout_serialize: PJRT_Extension_Function<PJRT_Layouts_MemoryLayout_Serialize_Args>,
    pub client_get_default_layout: *const core::ffi::c_void,
    pub buffer_memory_layout: *const core::ffi::c_void,
    pub topology_get_default_layout: *const core::ffi::c_void,
    pub executable_get_output_layouts:
        PJRT_Extension_Function<PJRT_Layouts_PJRT_Executable_GetOutputLayouts_Args>,
}

/// Arguments of `PJRT_Register_Custom_Partitioner`: the framework partitions custom calls of that
/// name.
#[repr(C)]
#[allow(missing_docs)]
pub struct PJRT_Register_Custom_Partitioner_Args {
    pub struct_size: usize,
    pub name: *const core::ffi::c_char,
    pub name_size: usize,
    pub callbacks: *mut core::ffi::c_void,
}

/// Arguments of `PJRT_Register_Batch_Partitionable`: custom calls of that name do the same to each
/// element of a batch.
#[repr(C)]
#[allow(missing_docs)]
pub struct PJRT_Register_Batch_Partitionable_Args {
    pub struct_size: usize,
    pub name: *const core::ffi::c_char,
    pub name_size: usize,
}

/// The extension by which the framework says that it partitions custom calls itself
/// (`PJRT_Extension_Type_Custom_Partitioner`), version 1.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct PJRT_Custom_Partitioner_Extension {
    pub base: PJRT_Extension_Base,
    pub register_custom_partitioner: PJRT_Extension_Function<PJRT_Register_Custom_Partitioner_Args>,
    pub register_batch_partitionable:
        PJRT_Extension_Function<PJRT_Register_Batch_Partitionable_Args>,
}

/// The extension with which a plugin adds to profiles (`PJRT_Extension_Type_Profiler`).
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct PJRT_Profiler_Extension {
    pub base: PJRT_Extension_Base,
    pub profiler_api: *mut PLUGIN_Profiler_Api,
    /// Not of the extension of a plugin.
    pub traceme_context_id: i64,
}

/// What takes a profile; opaque, and each plugin's own.
#[repr(C)]
pub struct PLUGIN_Profiler {
    _opaque: [u8; 0],
}

/// An error of a profiler; opaque, and each plugin's own.
#[repr(C)]
pub struct PLUGIN_Profiler_Error {
    _opaque: [u8; 0],
}

/// Arguments of `PLUGIN_Profiler_Error_Destroy`.
#[repr(C)]
#[allow(missing_docs)]
pub struct PLUGIN_Profiler_Error_Destroy_Args {
    pub struct_size: usize,
    pub private: *mut core::ffi::c_void,
    pub error: *mut PLUGIN_Profiler_Error,
}

/// Arguments of `PLUGIN_Profiler_Error_Message`; the message lives as long as the error.
#[repr(C)]
#[allow(missing_docs)]
pub struct PLUGIN_Profiler_Error_Message_Args {
    pub struct_size: usize,
    pub private: *mut core::ffi::c_void,
    pub error: *const PLUGIN_Profiler_Error,
    pub message: *const core::ffi::c_char,
    pub message_size: usize,
}

/// Arguments of `PLUGIN_Profiler_Error_GetCode`; the codes are those of `absl::StatusCode`.
#[repr(C)]
#[allow(missing_docs)]
pub struct PLUGIN_Profiler_Error_GetCode_Args {
    pub struct_size: usize,
    pub private: *mut core::ffi::c_void,
    pub error: *const PLUGIN_Profiler_Error,
    pub code: core::ffi::c_int,
}

/// Arguments of `PLUGIN_Profiler_Create`; the options are serialized `tensorflow.ProfileOptions`.
/// Frameworks leave the `struct_size` of this and the following as it comes.
#[repr(C)]
#[allow(missing_docs)]
pub struct PLUGIN_Profiler_Create_Args {
    pub struct_size: usize,
    pub options: *const core::ffi::c_char,
    pub options_size: usize,
    pub profiler: *mut PLUGIN_Profiler,
}

/// Arguments of `PLUGIN_Profiler_Start`, `PLUGIN_Profiler_Stop` and `PLUGIN_Profiler_Destroy`.
#[repr(C)]
#[allow(missing_docs)]
pub struct PLUGIN_Profiler_Args {
    pub struct_size: usize,
    pub profiler: *mut PLUGIN_Profiler,
}

/// Arguments of `PLUGIN_Profiler_CollectData`: a serialized `tensorflow.profiler.XSpace`.
#[repr(C)]
#[allow(missing_docs)]
pub struct PLUGIN_Profiler_CollectData_Args {
    pub struct_size: usize,
    pub profiler: *mut PLUGIN_Profiler,
    pub buffer: *mut u8,
    pub buffer_size_in_bytes: usize,
}

/// A function of a profiler.
#[allow(non_camel_case_types)]
pub type PLUGIN_Profiler_Function<Args> =
    Option<unsafe extern "C" fn(args: *mut Args) -> *mut PLUGIN_Profiler_Error>;

/// The functions of a profiler, up to those that all versions have. jaxlib takes a table of this
/// size: 0.9 and 0.10 no other one, and newer ones none that is smaller (`plugin_tracer.cc`).
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct PLUGIN_Profiler_Api {
    pub struct_size: usize,
    pub private: *mut core::ffi::c_void,
    pub error_destroy: Option<unsafe extern "C" fn(args: *mut PLUGIN_Profiler_Error_Destroy_Args)>,
    pub error_message: Option<unsafe extern "C" fn(args: *mut PLUGIN_Profiler_Error_Message_Args)>,
    pub error_get_code: PLUGIN_Profiler_Function<PLUGIN_Profiler_Error_GetCode_Args>,
    pub create: PLUGIN_Profiler_Function<PLUGIN_Profiler_Create_Args>,
    pub destroy: PLUGIN_Profiler_Function<PLUGIN_Profiler_Args>,
    pub start: PLUGIN_Profiler_Function<PLUGIN_Profiler_Args>,
    pub stop: PLUGIN_Profiler_Function<PLUGIN_Profiler_Args>,
    pub collect_data: PLUGIN_Profiler_Function<PLUGIN_Profiler_CollectData_Args>,
}
