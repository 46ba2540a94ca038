//! The inner plugin's own profiler, where it has one. XLA's plugins for the CPU have none, so what
//! they see in their own copy of XLA cannot be had.

use std::ffi::c_char;

use pjrt_sys::*;

use crate::error::Error;
use crate::inner::call::bytes;
use crate::inner::extensions;

/// A profiler of the inner plugin's.
pub struct InnerProfiler {
    table: &'static PLUGIN_Profiler_Api,
    raw: *mut PLUGIN_Profiler,
}

impl InnerProfiler {
    /// With serialized options; none if the inner plugin has no profiler.
    pub fn new(options: &[u8]) -> Result<Option<InnerProfiler>, Error> {
        let Some(table) = extensions::profiler() else {
            return Ok(None);
        };
        let mut args = PLUGIN_Profiler_Create_Args {
            struct_size: size_of::<PLUGIN_Profiler_Create_Args>(),
            options: options.as_ptr().cast::<c_char>(),
            options_size: options.len(),
            profiler: std::ptr::null_mut(),
        };
        call(table, table.create, &mut args)?;
        let raw = args.profiler;
        Ok((!raw.is_null()).then_some(InnerProfiler { table, raw }))
    }

    /// Begins.
    pub fn start(&mut self) -> Result<(), Error> {
        call(self.table, self.table.start, &mut self.args())
    }

    /// Ends.
    pub fn stop(&mut self) -> Result<(), Error> {
        call(self.table, self.table.stop, &mut self.args())
    }

    /// What it has seen: a serialized space.
    pub fn collect(&mut self) -> Result<Vec<u8>, Error> {
        let mut args = PLUGIN_Profiler_CollectData_Args {
            struct_size: size_of::<PLUGIN_Profiler_CollectData_Args>(),
            profiler: self.raw,
            buffer: std::ptr::null_mut(),
            buffer_size_in_bytes: 0,
        };
        call(self.table, self.table.collect_data, &mut args)?;
        if !args.buffer.is_null() {
            // SAFETY: XLA's plugins give a buffer of their own, which stays until the profiler is
            // used again, and say how long it is (`plugin_tracer_impl.cc`).
            let space = unsafe { bytes(args.buffer.cast(), args.buffer_size_in_bytes) };
            return Ok(space.to_vec());
        }
        // The header wants a second call with a buffer of the size that the first one has given.
        let mut space = vec![0; args.buffer_size_in_bytes];
        if !space.is_empty() {
            args.buffer = space.as_mut_ptr();
            call(self.table, self.table.collect_data, &mut args)?;
        }
        Ok(space)
    }

    fn args(&self) -> PLUGIN_Profiler_Args {
        PLUGIN_Profiler_Args {
            struct_size: size_of::<PLUGIN_Profiler_Args>(),
            profiler: self.raw,
        }
    }
}

impl Drop for InnerProfiler {
    fn drop(&mut self) {
        let _ = call(self.table, self.table.destroy, &mut self.args());
    }
}

/// Calls a function of the inner plugin's profiler with arguments that are made for it here.
fn call<Args>(
    table: &PLUGIN_Profiler_Api,
    function: PLUGIN_Profiler_Function<Args>,
    args: &mut Args,
) -> Result<(), Error> {
    let missing = || Error::unimplemented("the inner XLA plugin's profiler lacks a function");
    let function = function.ok_or_else(missing)?;
    // SAFETY: each type of arguments is of one kind of function, and this file fills them with a
    // live profiler and with buffers that are as long as they say.
    let error = unsafe { function(args) };
    if error.is_null() {
        return Ok(());
    }
    Err(taken(table, error))
}

/// An error of the inner plugin's as one of ours, which needs its table no longer.
fn taken(table: &PLUGIN_Profiler_Api, error: *mut PLUGIN_Profiler_Error) -> Error {
    let mut said = PLUGIN_Profiler_Error_Message_Args {
        struct_size: size_of::<PLUGIN_Profiler_Error_Message_Args>(),
        private: std::ptr::null_mut(),
        error,
        message: std::ptr::null(),
        message_size: 0,
    };
    let mut destroyed = PLUGIN_Profiler_Error_Destroy_Args {
        struct_size: size_of::<PLUGIN_Profiler_Error_Destroy_Args>(),
        private: std::ptr::null_mut(),
        error,
    };
    // SAFETY: the error is live until it is destroyed here, and its text as long.
    unsafe {
        if let Some(message) = table.error_message {
            message(&mut said);
        }
        let text = String::from_utf8_lossy(bytes(said.message, said.message_size)).into_owned();
        if let Some(destroy) = table.error_destroy {
            destroy(&mut destroyed);
        }
        Error::internal(format!("the inner XLA plugin's profiler: {text}"))
    }
}
