//! Extension structs of `xla/pjrt/c/pjrt_c_api_ffi_extension.h`, which no wheel ships.

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

/// A function of the FFI extension.
#[allow(non_camel_case_types)]
pub type PJRT_FFI_Function<Args> = Option<unsafe extern "C" fn(args: *mut Args) -> *mut PJRT_Error>;

/// The FFI extension (`PJRT_Extension_Type_FFI`), version 3.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct PJRT_FFI_Extension {
    pub base: PJRT_Extension_Base,
    pub type_register: *const core::ffi::c_void,
    pub user_data_add: PJRT_FFI_Function<PJRT_FFI_UserData_Add_Args>,
    pub register_handler: PJRT_FFI_Function<PJRT_FFI_Register_Handler_Args>,
}
