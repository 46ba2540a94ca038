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
        match extensions::profiler() {
            Some(table) => InnerProfiler::of(table, options),
            None => Ok(None),
        }
    }

    /// One that these functions make.
    fn of(
        table: &'static PLUGIN_Profiler_Api,
        options: &[u8],
    ) -> Result<Option<InnerProfiler>, Error> {
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

#[cfg(test)]
pub(super) mod tests {
    use std::ffi::c_void;
    use std::sync::atomic::{AtomicI32, Ordering};

    use super::*;

    /// Profilers of the tests that are there.
    static MADE: AtomicI32 = AtomicI32::new(0);
    static TEXT: &[u8] = b"no";

    /// What XLA's own plugins give: bytes of theirs, of which the last ends a message.
    static SPACE: [u8; 4] = [0x22, 0x01, b'h', 0];

    unsafe extern "C" fn create(
        args: *mut PLUGIN_Profiler_Create_Args,
    ) -> *mut PLUGIN_Profiler_Error {
        // SAFETY: the tests pass valid arguments.
        unsafe { (*args).profiler = std::ptr::from_ref(&MADE).cast_mut().cast() };
        MADE.fetch_add(1, Ordering::Relaxed);
        std::ptr::null_mut()
    }

    unsafe extern "C" fn destroy(_: *mut PLUGIN_Profiler_Args) -> *mut PLUGIN_Profiler_Error {
        MADE.fetch_sub(1, Ordering::Relaxed);
        std::ptr::null_mut()
    }

    unsafe extern "C" fn start(_: *mut PLUGIN_Profiler_Args) -> *mut PLUGIN_Profiler_Error {
        std::ptr::null_mut()
    }

    unsafe extern "C" fn stop(_: *mut PLUGIN_Profiler_Args) -> *mut PLUGIN_Profiler_Error {
        std::ptr::from_ref(&MADE).cast_mut().cast()
    }

    unsafe extern "C" fn message(args: *mut PLUGIN_Profiler_Error_Message_Args) {
        // SAFETY: as above.
        unsafe {
            (*args).message = TEXT.as_ptr().cast();
            (*args).message_size = TEXT.len();
        }
    }

    unsafe extern "C" fn at_once(
        args: *mut PLUGIN_Profiler_CollectData_Args,
    ) -> *mut PLUGIN_Profiler_Error {
        // SAFETY: as above.
        unsafe {
            (*args).buffer = SPACE.as_ptr().cast_mut();
            (*args).buffer_size_in_bytes = SPACE.len();
        }
        std::ptr::null_mut()
    }

    unsafe extern "C" fn in_two_calls(
        args: *mut PLUGIN_Profiler_CollectData_Args,
    ) -> *mut PLUGIN_Profiler_Error {
        // SAFETY: as above; a buffer has the size that the first call says.
        unsafe {
            if !(*args).buffer.is_null() {
                std::ptr::copy_nonoverlapping(SPACE.as_ptr(), (*args).buffer, SPACE.len());
            }
            (*args).buffer_size_in_bytes = SPACE.len();
        }
        std::ptr::null_mut()
    }

    type Collect = unsafe extern "C" fn(
        args: *mut PLUGIN_Profiler_CollectData_Args,
    ) -> *mut PLUGIN_Profiler_Error;

    /// A profiler of a plugin that has one.
    pub fn another(collect_data: Option<Collect>) -> InnerProfiler {
        let table = PLUGIN_Profiler_Api {
            struct_size: size_of::<PLUGIN_Profiler_Api>(),
            private: std::ptr::null_mut::<c_void>(),
            error_destroy: None,
            error_message: Some(message),
            error_get_code: None,
            create: Some(create),
            destroy: Some(destroy),
            start: Some(start),
            stop: Some(stop),
            collect_data: Some(collect_data.unwrap_or(at_once)),
        };
        let made = InnerProfiler::of(Box::leak(Box::new(table)), b"options");
        made.unwrap().expect("a profiler")
    }

    #[test]
    fn the_inner_profiler_is_asked_and_destroyed() {
        let before = MADE.load(Ordering::Relaxed);
        for collect in [at_once as Collect, in_two_calls] {
            let mut inner = another(Some(collect));
            inner.start().unwrap();
            assert_eq!(inner.collect().unwrap(), SPACE);
            let error = inner.stop().unwrap_err().to_string();
            assert_eq!(error, "mpi_cuda: the inner XLA plugin's profiler: no");
        }
        assert_eq!(MADE.load(Ordering::Relaxed), before);
    }
}
