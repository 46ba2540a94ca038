//! What `jax.profiler` asks of a plugin: events of ours for each operation and collective, and
//! behind them what the inner plugin has seen.
//!
//! The functions are those of `xla/backends/profiler/plugin/profiler_c_api.h`, which frameworks
//! find by the profiler extension ([`table`]).

mod inner;
mod timeline;

use std::sync::OnceLock;

use mpi_runtime::engine::recorder::profiled::{self, Profiled};
use mpi_runtime::log;
use pjrt_sys::*;

use crate::boundary::{guarded, quiet};
use crate::error::Error;
use crate::inner::call::bytes;
use crate::plugin::world;
use inner::InnerProfiler;

/// A profile that somebody takes.
struct Profiler {
    inner: Option<InnerProfiler>,
    /// The options ask for events of the host, which ours are.
    wanted: bool,
    /// Ours are kept.
    running: bool,
    /// What was seen, serialized.
    space: Vec<u8>,
    collected: bool,
}

/// The functions that frameworks call. It is never freed, as the extension that names it.
pub fn table() -> *mut PLUGIN_Profiler_Api {
    static TABLE: OnceLock<usize> = OnceLock::new();
    let table = || {
        let table = PLUGIN_Profiler_Api {
            struct_size: size_of::<PLUGIN_Profiler_Api>(),
            private: std::ptr::null_mut(),
            error_destroy: Some(error_destroy),
            error_message: Some(error_message),
            error_get_code: Some(error_get_code),
            create: Some(create),
            destroy: Some(destroy),
            start: Some(start),
            stop: Some(stop),
            collect_data: Some(collect_data),
        };
        std::ptr::from_mut(Box::leak(Box::new(table))) as usize
    };
    *TABLE.get_or_init(table) as *mut PLUGIN_Profiler_Api
}

impl Profiler {
    fn new(options: &[u8]) -> Result<Profiler, Error> {
        Ok(Profiler {
            inner: InnerProfiler::new(options)?,
            wanted: xspace::wants_host_events(options),
            running: false,
            space: Vec::new(),
            collected: false,
        })
    }

    fn start(&mut self) -> Result<(), Error> {
        (self.space, self.collected) = (Vec::new(), false);
        if self.wanted && !self.running {
            if !profiled::start() {
                return Err(Error::precondition(
                    "another profile of this process is being taken; stop that one first",
                ));
            }
            self.running = true;
        }
        if self.ask_inner(InnerProfiler::start).is_none() {
            self.inner = None;
        }
        Ok(())
    }

    /// Asks the inner plugin's profiler. If it fails, ours goes on without it: JAX may have begun
    /// that profiler itself, as it does with the one of CUDA's plugin.
    fn ask_inner<T>(
        &mut self,
        ask: impl FnOnce(&mut InnerProfiler) -> Result<T, Error>,
    ) -> Option<T> {
        match ask(self.inner.as_mut()?) {
            Ok(answer) => Some(answer),
            Err(error) => {
                log::line(&format!(
                    "a profile may lack events of the inner plugin's: {error}"
                ));
                None
            }
        }
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.stop_ours()?;
        self.ask_inner(InnerProfiler::stop);
        Ok(())
    }

    fn stop_ours(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.running) {
            return Ok(());
        }
        let seen = profiled::stop().unwrap_or_default();
        if let Some(said) = profiled::said_of_lost(seen.lost) {
            log::line(&said);
        }
        self.space = match world() {
            Some(world) => timeline::serialize(&seen, world.rank, |number| {
                world.engine.communicators.get(number)
            })?,
            None => Vec::new(),
        };
        Ok(())
    }

    /// The serialized space, ours and the inner plugin's one after the other, which is both
    /// together. The inner plugin may end its own with a byte that ends the whole.
    fn collect(&mut self) -> Result<&mut Vec<u8>, Error> {
        if self.running {
            return Err(Error::precondition(
                "the profile must be stopped before it is read",
            ));
        }
        if !std::mem::replace(&mut self.collected, true) {
            let seen = self.ask_inner(InnerProfiler::collect);
            self.space.extend(seen.unwrap_or_default());
        }
        Ok(&mut self.space)
    }
}

impl Drop for Profiler {
    fn drop(&mut self) {
        if self.running {
            let _: Option<Profiled> = profiled::stop();
        }
    }
}

/// Runs a body; its error is the framework's.
fn returned(body: impl FnOnce() -> Result<(), Error>) -> *mut PLUGIN_Profiler_Error {
    match guarded(body) {
        Ok(()) => std::ptr::null_mut(),
        Err(error) => Box::into_raw(Box::new(error)).cast(),
    }
}

/// The profiler of a call.
///
/// # Safety
/// `raw` must be null, or what [`create`] gave and [`destroy`] has not had, and nobody else may use
/// it meanwhile.
unsafe fn profiler<'a>(raw: *mut PLUGIN_Profiler) -> Result<&'a mut Profiler, Error> {
    // SAFETY: as this function demands.
    unsafe { raw.cast::<Profiler>().as_mut() }
        .ok_or_else(|| Error::invalid("a null pointer in place of a profiler"))
}

/// `PLUGIN_Profiler_Create`
unsafe extern "C" fn create(args: *mut PLUGIN_Profiler_Create_Args) -> *mut PLUGIN_Profiler_Error {
    returned(|| {
        // SAFETY: the framework passes valid arguments, with options as long as it says.
        let (args, options) = unsafe {
            let args = &mut *args;
            let options = bytes(args.options, args.options_size);
            (args, options)
        };
        args.profiler = std::ptr::null_mut();
        args.profiler = Box::into_raw(Box::new(Profiler::new(options)?)).cast();
        Ok(())
    })
}

/// `PLUGIN_Profiler_Destroy`
unsafe extern "C" fn destroy(args: *mut PLUGIN_Profiler_Args) -> *mut PLUGIN_Profiler_Error {
    returned(|| {
        // SAFETY: the framework passes valid arguments, and has null or a box of `create`, which it
        // does not use any more.
        unsafe {
            let raw = (*args).profiler.cast::<Profiler>();
            if !raw.is_null() {
                drop(Box::from_raw(raw));
            }
        }
        Ok(())
    })
}

/// `PLUGIN_Profiler_Start`
unsafe extern "C" fn start(args: *mut PLUGIN_Profiler_Args) -> *mut PLUGIN_Profiler_Error {
    // SAFETY: the framework passes valid arguments, and one call at a time for a profiler.
    returned(|| unsafe { profiler((*args).profiler) }?.start())
}

/// `PLUGIN_Profiler_Stop`
unsafe extern "C" fn stop(args: *mut PLUGIN_Profiler_Args) -> *mut PLUGIN_Profiler_Error {
    // SAFETY: as above.
    returned(|| unsafe { profiler((*args).profiler) }?.stop())
}

/// `PLUGIN_Profiler_CollectData`. The header wants two calls, of which the second has a buffer of
/// the framework's. XLA's own framework makes one, and reads the buffer that it is given.
unsafe extern "C" fn collect_data(
    args: *mut PLUGIN_Profiler_CollectData_Args,
) -> *mut PLUGIN_Profiler_Error {
    returned(|| {
        // SAFETY: as above. A buffer of the framework's has the size that the first call gave. The
        // profiler has its own until it is destroyed.
        unsafe {
            let args = &mut *args;
            let space = profiler(args.profiler)?.collect()?;
            args.buffer_size_in_bytes = space.len();
            if args.buffer.is_null() {
                args.buffer = space.as_mut_ptr();
            } else if args.buffer != space.as_mut_ptr() {
                std::ptr::copy_nonoverlapping(space.as_ptr(), args.buffer, space.len());
            }
        }
        Ok(())
    })
}

/// `PLUGIN_Profiler_Error_Destroy`
unsafe extern "C" fn error_destroy(args: *mut PLUGIN_Profiler_Error_Destroy_Args) {
    quiet((), || {
        // SAFETY: the framework passes null or an error that it has got from here, once.
        unsafe {
            let raw = (*args).error.cast::<Error>();
            if !raw.is_null() {
                drop(Box::from_raw(raw));
            }
        }
    });
}

/// `PLUGIN_Profiler_Error_Message`
unsafe extern "C" fn error_message(args: *mut PLUGIN_Profiler_Error_Message_Args) {
    quiet((), || {
        // SAFETY: the framework passes valid arguments with a live error of ours; all of them are
        // made here, so they have their text themselves.
        unsafe {
            let args = &mut *args;
            if let Error::Own(own) = &*args.error.cast::<Error>() {
                args.message = own.message.as_ptr().cast();
                args.message_size = own.message.len();
            }
        }
    });
}

/// `PLUGIN_Profiler_Error_GetCode`
unsafe extern "C" fn error_get_code(
    args: *mut PLUGIN_Profiler_Error_GetCode_Args,
) -> *mut PLUGIN_Profiler_Error {
    quiet(std::ptr::null_mut(), || {
        // SAFETY: as above.
        unsafe {
            let args = &mut *args;
            if let Error::Own(own) = &*args.error.cast::<Error>() {
                args.code = own.code as i32;
            }
        }
        std::ptr::null_mut()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls a function of the table with a profiler; the error's text, if it fails.
    fn call(
        function: PLUGIN_Profiler_Function<PLUGIN_Profiler_Args>,
        raw: usize,
    ) -> Option<String> {
        let mut args = PLUGIN_Profiler_Args {
            struct_size: 0,
            profiler: raw as *mut PLUGIN_Profiler,
        };
        // SAFETY: valid arguments, and a profiler that is destroyed last.
        let error = unsafe { function.unwrap()(&mut args) };
        (!error.is_null()).then(|| said(error))
    }

    fn said(error: *mut PLUGIN_Profiler_Error) -> String {
        // SAFETY: zero bytes are valid for these arguments; the error is live until it is destroyed
        // here.
        unsafe {
            let mut message: PLUGIN_Profiler_Error_Message_Args = std::mem::zeroed();
            message.error = error;
            error_message(&mut message);
            let text = bytes(message.message, message.message_size);
            let text = String::from_utf8_lossy(text).into_owned();
            let mut destroyed: PLUGIN_Profiler_Error_Destroy_Args = std::mem::zeroed();
            destroyed.error = error;
            error_destroy(&mut destroyed);
            text
        }
    }

    fn collected(raw: usize, buffer: &mut [u8]) -> (Vec<u8>, usize) {
        let mut args = PLUGIN_Profiler_CollectData_Args {
            struct_size: 0,
            profiler: raw as *mut PLUGIN_Profiler,
            buffer: match buffer {
                [] => std::ptr::null_mut(),
                _ => buffer.as_mut_ptr(),
            },
            buffer_size_in_bytes: 0,
        };
        // SAFETY: as above; the buffer has the size that the first call gave.
        unsafe {
            assert!(collect_data(&mut args).is_null());
            let size = args.buffer_size_in_bytes;
            (bytes(args.buffer.cast(), size).to_vec(), size)
        }
    }

    /// What is the inner plugin's comes last, since a byte at its end may end the whole.
    #[test]
    fn both_profiles_are_one() {
        crate::plugin::start_for_tests();
        let functions = table();
        // SAFETY: the table is never freed.
        let functions = unsafe { &*functions };
        assert_eq!(functions.struct_size, 80);
        let profiler = Profiler {
            inner: Some(inner::tests::another(None)),
            wanted: true,
            running: false,
            space: Vec::new(),
            collected: false,
        };
        let other = Profiler {
            inner: None,
            wanted: true,
            running: false,
            space: Vec::new(),
            collected: false,
        };
        let raw = Box::into_raw(Box::new(profiler)) as usize;
        let second = Box::into_raw(Box::new(other)) as usize;
        assert_eq!(call(functions.start, raw), None);
        let refused = call(functions.start, second).unwrap();
        assert!(
            refused.contains("another profile of this process"),
            "{refused}"
        );
        let mut early = PLUGIN_Profiler_CollectData_Args {
            struct_size: 0,
            profiler: raw as *mut PLUGIN_Profiler,
            buffer: std::ptr::null_mut(),
            buffer_size_in_bytes: 0,
        };
        // SAFETY: as above.
        let early = said(unsafe { collect_data(&mut early) });
        assert!(early.contains("must be stopped"), "{early}");
        // The inner plugin's stop fails, which is logged, and what it has seen is there.
        assert_eq!(call(functions.stop, raw), None);
        let (whole, size) = collected(raw, &mut []);
        assert!(whole.ends_with(b"\x22\x01h\0") && whole.len() == size);
        let mut own = vec![0; size];
        collected(raw, &mut own);
        assert_eq!(own, whole);
        assert_eq!(call(functions.start, second), None);
        // A profiler that is destroyed takes no profile any more.
        for one in [raw, second] {
            assert_eq!(call(functions.destroy, one), None);
        }
        assert!(profiled::start() && profiled::stop().is_some());
        assert!(call(functions.start, 0).unwrap().contains("null pointer"));
    }
}
