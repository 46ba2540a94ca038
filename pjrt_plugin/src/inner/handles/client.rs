//! Clients: making one, its devices, compiling, and buffers from the host.

use pjrt_sys::*;

use super::{
    BufferHandle, ClientHandle, Destroy, DeviceHandle, EventHandle, FromRaw, LoadedHandle, Owned,
};
use crate::error::Error;
use crate::inner::call::{ask, new_args, slice};
use crate::inner::create_options::{GivenOption, Value, raw_options};
use crate::inner::library::api;

/// An array of the host's.
pub struct HostArray<'a> {
    /// Of what.
    pub element_type: PJRT_Buffer_Type,
    /// How many.
    pub dims: &'a [i64],
    /// Its content, row-major.
    pub data: &'a [u8],
}

impl ClientHandle {
    /// A new client of the inner plugin.
    pub fn create(given: &[GivenOption<'_>], own: &[(&str, Value)]) -> Result<ClientHandle, Error> {
        let options = raw_options(given, own);
        // SAFETY: the options outlive the call, and the inner plugin copies them.
        unsafe {
            let args = ask(api().PJRT_Client_Create, |args| {
                args.create_options = options.as_ptr();
                args.num_options = options.len();
            })?;
            ClientHandle::from_raw(args.client)
        }
    }

    /// Its devices, those of other ranks too.
    pub fn devices(self) -> Result<Vec<DeviceHandle>, Error> {
        // SAFETY: the client is live, and its list of devices lives as long.
        unsafe {
            let args = ask(api().PJRT_Client_Devices, |args| args.client = self.raw())?;
            let devices = slice(args.devices, args.num_devices);
            devices
                .iter()
                .map(|&device| DeviceHandle::from_raw(device))
                .collect()
        }
    }

    /// Compiles a program in `format` with serialized options.
    pub fn compile(
        self,
        code: &[u8],
        format: &str,
        options: &[u8],
    ) -> Result<Owned<LoadedHandle>, Error> {
        let mut program = new_args::<PJRT_Program>();
        program.code = code.as_ptr().cast_mut().cast();
        program.code_size = code.len();
        program.format = format.as_ptr().cast();
        program.format_size = format.len();
        // SAFETY: the client is live; the inner plugin copies the program and the options. The
        // executable is the caller's.
        unsafe {
            let args = ask(api().PJRT_Client_Compile, |args| {
                args.client = self.raw();
                args.program = &program;
                args.compile_options = options.as_ptr().cast();
                args.compile_options_size = options.len();
            })?;
            Owned::new(args.executable)
        }
    }

    /// Copies an array to a device.
    pub fn copy_from_host(
        self,
        device: DeviceHandle,
        array: &HostArray<'_>,
    ) -> Result<Owned<BufferHandle>, Error> {
        // SAFETY: live handles; the array is copied during the call. The buffer and the event are
        // the caller's.
        unsafe {
            let args = ask(api().PJRT_Client_BufferFromHostBuffer, |args| {
                args.client = self.raw();
                args.device = device.raw();
                args.data = array.data.as_ptr().cast();
                args.type_ = array.element_type;
                args.dims = array.dims.as_ptr();
                args.num_dims = array.dims.len();
                args.host_buffer_semantics = PJRT_HostBufferSemantics_kImmutableOnlyDuringCall;
            })?;
            if let Ok(event) = EventHandle::from_raw(args.done_with_host_buffer) {
                event.destroy();
            }
            Owned::new(args.buffer)
        }
    }
}
