//! Executables: compiling and loading them, and what they say of themselves. Towards the framework
//! a program for several devices is the program for all of them (`compile/spmd.rs`).

use std::ffi::{c_char, c_void};

use pjrt_sys::*;

use crate::compile::{self, spmd};
use crate::error::Error;
use crate::inner::api;
use crate::inner::call::bytes;
use crate::inner::handles::{ClientHandle, ExecutableHandle, FromRaw, Handle, Program};
use crate::inner::{serialized, side_table};
use crate::pjrt::entry::{Passed, entry, make_with_options};

/// Format of what `PJRT_Executable_OptimizedProgram` gives.
const OPTIMIZED: &str = "hlo_with_config";

entry! {
    /// `PJRT_Client_Compile`
    pub fn compile(
        args: PJRT_Client_Compile_Args, client: ClientHandle;
        options: &[u8] = compile_options, compile_options_size
    ) {
        // SAFETY: the framework passes a valid program.
        let program = unsafe {
            let program = &*args.program;
            Program {
                code: bytes(program.code, program.code_size),
                format: bytes(program.format, program.format_size),
            }
        };
        let given = args.client;
        let loaded = compile::compile(client, program, options, |home, options| {
            // SAFETY: a live client; so below.
            unsafe { args.members() }.client = home.raw();
            make_with_options!(args, options, api().PJRT_Client_Compile, executable)
        });
        // SAFETY: as it was; so below.
        unsafe { args.members() }.client = given;
        let loaded = loaded?;
        // SAFETY: the framework gets the executable.
        unsafe { args.members() }.executable = loaded.release().raw();
        Ok(())
    }

    /// `PJRT_Compile`: without a client, for one device.
    pub fn compile_ahead(
        args: PJRT_Compile_Args; options: &[u8] = compile_options, compile_options_size
    ) {
        // SAFETY: the framework passes a live topology.
        let topology = unsafe { FromRaw::from_raw(args.topology.cast_mut()) }?;
        let compiled = compile::compile_ahead(topology, options, |options| {
            make_with_options!(args, options, api().PJRT_Compile, executable)
        })?;
        // SAFETY: the framework gets the executable.
        unsafe { args.members() }.executable = compiled.release().raw();
        Ok(())
    }

    /// `PJRT_Executable_DeserializeAndLoad`
    pub fn deserialize_and_load(
        args: PJRT_Executable_DeserializeAndLoad_Args, client: ClientHandle;
        serialized: &[u8] = serialized_executable, serialized_executable_size
    ) {
        // SAFETY: the framework passes valid arguments, with options that outlive the call.
        let given = unsafe { overridden_options(args.raw()) };
        let given_client = args.client;
        let loaded = compile::load(client, serialized, given, |home, options| {
            // SAFETY: the client is live. The options live through the call, after which the
            // framework's are there again; there the function gives the executable. Where there are
            // any, the arguments are long enough to say so.
            unsafe {
                args.members().client = home.raw();
                if !given.is_empty() {
                    put_options(args.members(), options);
                }
                let loaded = args.make(api().PJRT_Executable_DeserializeAndLoad, |args| {
                    &mut args.loaded_executable
                });
                if !given.is_empty() {
                    put_options(args.members(), given);
                }
                args.members().client = given_client;
                loaded
            }
        })?;
        // SAFETY: the framework gets the executable.
        unsafe { args.members() }.loaded_executable = loaded.release().raw();
        Ok(())
    }

    /// `PJRT_Executable_Destroy`
    pub fn destroy(args: PJRT_Executable_Destroy_Args, executable: ExecutableHandle) {
        side_table::forget(executable.address());
        args.pass_on(api().PJRT_Executable_Destroy)
    }

    /// `PJRT_Executable_NumPartitions`
    pub fn num_partitions(args: PJRT_Executable_NumPartitions_Args, executable: ExecutableHandle) {
        match spmd::find(executable.address()) {
            // SAFETY: a number for the framework.
            Some(spmd) => unsafe { args.members() }.num_partitions = spmd.devices.partitions(),
            None => args.pass_on(api().PJRT_Executable_NumPartitions)?,
        }
        Ok(())
    }

    /// `PJRT_Executable_NumReplicas`
    pub fn num_replicas(args: PJRT_Executable_NumReplicas_Args, executable: ExecutableHandle) {
        match spmd::find(executable.address()) {
            // SAFETY: a number for the framework.
            Some(spmd) => unsafe { args.members() }.num_replicas = spmd.devices.replicas(),
            None => args.pass_on(api().PJRT_Executable_NumReplicas)?,
        }
        Ok(())
    }

    /// `PJRT_Executable_Serialize`: a program for several devices as any rank can load it, and one
    /// that was loaded as it was.
    pub fn serialize(args: PJRT_Executable_Serialize_Args, executable: ExecutableHandle) {
        let address = executable.address();
        let serialized = match (spmd::find(address), serialized::find(address)) {
            (Some(spmd), _) => spmd.serialize()?,
            (None, Some(origin)) => origin.bytes.to_vec(),
            (None, None) => return args.pass_on(api().PJRT_Executable_Serialize),
        };
        let serialized = Box::new(serialized);
        // SAFETY: the bytes live until the framework calls the deleter with the box.
        let args = unsafe { args.members() };
        args.serialized_bytes = serialized.as_ptr().cast();
        args.serialized_bytes_size = serialized.len();
        args.serialized_executable = Box::into_raw(serialized).cast::<c_void>().cast();
        args.serialized_executable_deleter = Some(free_serialized);
        Ok(())
    }

    /// `PJRT_Executable_OptimizedProgram`: the partitioned program with its collectives.
    pub fn optimized(args: PJRT_Executable_OptimizedProgram_Args, executable: ExecutableHandle) {
        let Some(spmd) = spmd::find(executable.address()) else {
            return args.pass_on(api().PJRT_Executable_OptimizedProgram);
        };
        write_program(&mut args, &spmd.optimized)
    }
}

/// Replaces the options of a serialized program.
fn put_options(args: &mut PJRT_Executable_DeserializeAndLoad_Args, options: &[u8]) {
    args.overridden_serialized_compile_options = options.as_ptr().cast();
    args.overridden_serialized_compile_options_size = options.len();
}

/// The options that replace those in a serialized program; empty if there are none.
///
/// # Safety
/// `args` must be valid for its `struct_size`, and the options for the lifetime chosen.
unsafe fn overridden_options<'a>(args: *const PJRT_Executable_DeserializeAndLoad_Args) -> &'a [u8] {
    type Args = PJRT_Executable_DeserializeAndLoad_Args;
    const END: usize =
        std::mem::offset_of!(Args, overridden_serialized_compile_options_size) + size_of::<usize>();
    // SAFETY: only what the size covers is read; older frameworks have no such options.
    unsafe {
        if (*args).struct_size < END {
            return &[];
        }
        bytes(
            (*args).overridden_serialized_compile_options,
            (*args).overridden_serialized_compile_options_size,
        )
    }
}

/// Writes a program into the framework's, or its size if the framework has no buffer yet.
fn write_program(
    args: &mut Passed<'_, PJRT_Executable_OptimizedProgram_Args>,
    code: &[u8],
) -> Result<(), Error> {
    // SAFETY: the framework passes a program to fill in and, if it has a buffer, says how long that
    // is.
    unsafe {
        let program = &mut *args.program;
        program.format = OPTIMIZED.as_ptr().cast();
        program.format_size = OPTIMIZED.len();
        if program.code.is_null() {
            program.code_size = code.len();
        } else if program.code_size < code.len() {
            return Err(Error::invalid(format!(
                "the optimized program has {} bytes, and the buffer {}",
                code.len(),
                program.code_size
            )));
        } else {
            let code_chars = code.as_ptr().cast::<c_char>();
            std::ptr::copy_nonoverlapping(code_chars, program.code, code.len());
        }
    }
    Ok(())
}

unsafe extern "C" fn free_serialized(serialized: *mut PJRT_SerializedExecutable) {
    // SAFETY: `serialize` made the box, and the framework frees it once.
    drop(unsafe { Box::from_raw(serialized.cast::<Vec<u8>>()) });
}
