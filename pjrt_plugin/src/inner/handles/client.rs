//! Clients: making one, its devices, compiling, and buffers from the host.

use pjrt_sys::*;

use super::handle::{
    BufferHandle, ClientHandle, DeviceHandle, EventHandle, ExecutableHandle, FromRaw, LoadedHandle,
    Owned, TopologyHandle,
};
use crate::error::Error;
use crate::inner::call::{new_args, slice};
use crate::inner::create_options::{GivenOption, Value, raw_options};

/// An array of the host's.
pub struct HostArray<'a> {
    /// Of what.
    pub element_type: PJRT_Buffer_Type,
    /// How many.
    pub dims: &'a [i64],
    /// Its content, row-major.
    pub data: &'a [u8],
}

/// A program as the framework gives it.
#[derive(Clone, Copy)]
pub struct Program<'a> {
    /// Its code.
    pub code: &'a [u8],
    /// What the code is, `mlir` or `hlo`.
    pub format: &'a [u8],
}

impl Program<'_> {
    /// The same as the inner plugin takes it; it must not outlive `self`.
    fn raw(&self) -> PJRT_Program {
        let mut program = new_args::<PJRT_Program>();
        program.code = self.code.as_ptr().cast_mut().cast();
        program.code_size = self.code.len();
        program.format = self.format.as_ptr().cast();
        program.format_size = self.format.len();
        program
    }
}

impl TopologyHandle {
    /// Compiles a program for devices of which there need to be none.
    pub fn compile(
        self,
        program: Program<'_>,
        options: &[u8],
    ) -> Result<Owned<ExecutableHandle>, Error> {
        let program = program.raw();
        let args = ask!(PJRT_Compile {
            topology: self.raw(),
            program: &program,
            compile_options: options.as_ptr().cast(),
            compile_options_size: options.len(),
        })?;
        // SAFETY: the executable is the caller's.
        unsafe { Owned::new(args.executable) }
    }
}

impl ClientHandle {
    /// A new client of the inner plugin.
    pub fn create(
        given: &[GivenOption<'_>],
        own: &[(&str, Value)],
    ) -> Result<Owned<ClientHandle>, Error> {
        let options = raw_options(given, own);
        let args = ask!(PJRT_Client_Create {
            create_options: options.as_ptr(),
            num_options: options.len(),
        })?;
        // SAFETY: the inner plugin has just made it, for the caller.
        unsafe { Owned::new(args.client) }
    }

    /// The topology that its devices are of.
    pub fn topology(self) -> Result<TopologyHandle, Error> {
        let args = ask!(PJRT_Client_TopologyDescription { client: self.raw() })?;
        // SAFETY: the topology lives as long as the client.
        unsafe { TopologyHandle::from_raw(args.topology) }
    }

    /// Its devices: of all ranks, or of this one.
    pub fn devices(self) -> Result<Vec<DeviceHandle>, Error> {
        let args = ask!(PJRT_Client_Devices { client: self.raw() })?;
        // SAFETY: the list and its devices live as long as the client.
        unsafe {
            let devices = slice(args.devices, args.num_devices).iter();
            devices
                .map(|&device| DeviceHandle::from_raw(device))
                .collect()
        }
    }

    /// Compiles a program with serialized options.
    pub fn compile(
        self,
        program: Program<'_>,
        options: &[u8],
    ) -> Result<Owned<LoadedHandle>, Error> {
        let program = program.raw();
        let args = ask!(PJRT_Client_Compile {
            client: self.raw(),
            program: &program,
            compile_options: options.as_ptr().cast(),
            compile_options_size: options.len(),
        })?;
        // SAFETY: the executable is the caller's.
        unsafe { Owned::new(args.executable) }
    }

    /// Loads a serialized program, with the serialized options given or, if they are empty, those
    /// that it was compiled with.
    pub fn load(self, serialized: &[u8], options: &[u8]) -> Result<Owned<LoadedHandle>, Error> {
        let given = match options {
            [] => std::ptr::null(),
            options => options.as_ptr(),
        };
        let args = ask!(PJRT_Executable_DeserializeAndLoad {
            client: self.raw(),
            serialized_executable: serialized.as_ptr().cast(),
            serialized_executable_size: serialized.len(),
            overridden_serialized_compile_options: given.cast(),
            overridden_serialized_compile_options_size: options.len(),
        })?;
        // SAFETY: the executable is the caller's.
        unsafe { Owned::new(args.loaded_executable) }
    }

    /// Copies an array to a device.
    pub fn copy_from_host(
        self,
        device: DeviceHandle,
        array: &HostArray<'_>,
    ) -> Result<Owned<BufferHandle>, Error> {
        let args = ask!(PJRT_Client_BufferFromHostBuffer {
            client: self.raw(),
            device: device.raw(),
            data: array.data.as_ptr().cast(),
            type_: array.element_type,
            dims: array.dims.as_ptr(),
            num_dims: array.dims.len(),
            host_buffer_semantics: PJRT_HostBufferSemantics_kImmutableOnlyDuringCall,
        })?;
        // SAFETY: the buffer and the event are the caller's; the array was copied.
        unsafe {
            drop(Owned::<EventHandle>::new(args.done_with_host_buffer));
            Owned::new(args.buffer)
        }
    }
}
