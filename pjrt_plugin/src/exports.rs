//! The exported functions beside `GetPjrtApi`; documented in `include/mpi_cuda.h`.

mod answer;
mod coordinator;
mod measure;
mod partitioner;
mod targets;

use std::cell::RefCell;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use mpi_runtime::engine::recorder::file;
use mpi_runtime::log;
use mpi_runtime::node::process::is_main_thread;
use mpi_runtime::watch::place;
use mpi_runtime::world::library;
use mpi_runtime::{Family, Kind};

use parking_lot::Mutex;
use pjrt_sys::PJRT_Api;

use self::answer::{fail, world_of_this_process};
use crate::at_exit;
use crate::boundary::quiet;
use crate::error::Error;
use crate::inner::on_gpu;
use crate::launch::{self, ticket};
use crate::plugin::{self, config, load, start_world, world};

/// The PJRT entry point (`pjrt_c_api.h`).
#[unsafe(no_mangle)]
pub extern "C" fn GetPjrtApi() -> *const PJRT_Api {
    quiet(std::ptr::null(), crate::api::table)
}

/// What stands before a line of our log: time, host, rank and the library's name. Valid until this
/// thread's next call.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_log_prefix() -> *const c_char {
    thread_local! {
        static PREFIX: RefCell<CString> = RefCell::default();
    }
    quiet(c"".as_ptr(), || {
        PREFIX.set(CString::new(log::prefix()).unwrap_or_default());
        PREFIX.with_borrow(|prefix| prefix.as_ptr())
    })
}

/// Opens the MPI of this process, if that has not happened, and tells its file; an empty text if
/// there is none and none is needed, null on error. The text is valid until this thread's next
/// call.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_open_mpi() -> *const c_char {
    thread_local! {
        static FILE: RefCell<CString> = RefCell::default();
    }
    quiet(std::ptr::null(), || {
        let opened = plugin::config_with(&[]).and_then(|config| {
            let options = plugin::library_options(&config);
            library::open(&options).map_err(Error::precondition)
        });
        match opened {
            Ok(found) => {
                let file = found.map(|found| found.file.into_os_string().into_encoded_bytes());
                FILE.set(CString::new(file.unwrap_or_default()).unwrap_or_default());
                FILE.with_borrow(|file| file.as_ptr())
            }
            Err(error) => {
                fail(error);
                std::ptr::null()
            }
        }
    })
}

/// Whether this process may join as a rank: 1, or −1 with the error if it is a child of one.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_is_rank() -> c_int {
    quiet(1, || {
        let checked = plugin::config_with(&[]).and_then(|config| {
            let checked = mpi_runtime::world::refuse_children(config.singleton);
            checked.map_err(Error::precondition)
        });
        checked.map_or_else(fail, |()| 1)
    })
}

/// What this process is made of, in lines of a name, a tab and words: the MPI and who named it, the
/// inner plugin, and the world if it was joined. Valid until this thread's next call.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_about() -> *const c_char {
    thread_local! {
        static ABOUT: RefCell<CString> = RefCell::default();
    }
    quiet(c"".as_ptr(), || {
        let lines = crate::about::lines().replace('\0', " ");
        ABOUT.set(CString::new(lines).unwrap_or_default());
        ABOUT.with_borrow(|about| about.as_ptr())
    })
}

/// Joins the world if that has not happened, and tells rank, size, and the MPI family.
///
/// # Safety
/// The pointers must be writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_start(
    rank: *mut c_int,
    size: *mut c_int,
    family: *mut *const c_char,
) -> c_int {
    quiet(-1, || {
        let world = match load().and_then(start_world) {
            Ok(world) => world,
            Err(error) => return fail(error),
        };
        at_exit::watch();
        // SAFETY: the caller promises writable pointers.
        unsafe {
            *rank = world.rank;
            *size = world.size;
            *family = match world.family() {
                Some(Family::OpenMpi) => c"openmpi".as_ptr(),
                Some(Family::Mpich) => c"mpich".as_ptr(),
                Some(Family::MpiAbi) => c"mpi_abi".as_ptr(),
                None => c"none".as_ptr(),
            };
        }
        0
    })
}

/// What names the job, the same on all its ranks: when it started, in nanoseconds since 1970; 0
/// before that.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_job() -> u64 {
    quiet(0, || world().map_or(0, |world| world.job))
}

extern "C" fn on_comm_deleted(number: i64) -> c_int {
    quiet(0, || {
        let may_wait = !launch::ticket::is_in_callback();
        world().map_or(0, |world| {
            c_int::from(world.engine.comm_deleted(number, may_wait))
        })
    })
}

/// The number of a communicator given by its MPI handle, and rank and size in it; −1 on error.
///
/// # Safety
/// `handle` must be a live communicator, `name` NUL-terminated, the pointers writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_comm(
    handle: u64,
    name: *const c_char,
    rank: *mut c_int,
    size: *mut c_int,
) -> i64 {
    quiet(-1, || {
        let Some(world) = world() else {
            return i64::from(fail(Error::precondition("call mpi_cuda_start first")));
        };
        // SAFETY: the caller's name is NUL-terminated.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let number = match world.engine.register(handle, &name, on_comm_deleted) {
            Ok(number) => number,
            Err(error) => {
                return i64::from(fail(Error::invalid(format!(
                    "communicator {name}: {error}"
                ))));
            }
        };
        if let Some(comm) = world.engine.communicators.get(number) {
            // SAFETY: the caller's pointers are writable.
            unsafe {
                *rank = comm.rank;
                *size = comm.size;
            }
        }
        number
    })
}

/// The number of a user-defined reduction for the attribute `op`.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_op(handle: u64) -> i64 {
    quiet(-1, || crate::ffi::user_reductions::register(handle))
}

/// The number of an `MPI_Status` for the attribute `status`.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_status(address: *mut c_void) -> i64 {
    quiet(0, || crate::ffi::status::register(address as usize))
}

/// The next program with receives of mpi4jax's that is compiled has a status.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_reads_status() {
    quiet((), crate::ffi::status::next_reads);
}

/// Says in words what a sequence of operations is whose hash stands in the mark of a program.
/// `code` is the same for sequences that differ only in how often their loops run.
///
/// # Safety
/// `words` must be NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_describe(sequence: u64, code: u64, words: *const c_char) {
    quiet((), || {
        // SAFETY: the caller's words are NUL-terminated.
        let words = unsafe { CStr::from_ptr(words) }.to_string_lossy();
        if let Some(world) = world() {
            world.engine.describe_sequence(sequence, code, &words);
        }
    });
}

/// Says of which kinds the first collectives of that sequence are: their names, with spaces
/// between.
///
/// # Safety
/// `kinds` must be NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_know_kinds(sequence: u64, kinds: *const c_char) {
    quiet((), || {
        // SAFETY: the caller's names are NUL-terminated.
        let names = unsafe { CStr::from_ptr(kinds) }.to_string_lossy();
        let kind = |name: &str| Kind::ALL.iter().find(|kind| kind.name() == name).copied();
        // What comes behind an unknown one is in an unknown place.
        let kinds: Vec<Kind> = names.split_whitespace().map_while(kind).collect();
        if let Some(world) = world() {
            world.engine.know_kinds(sequence, &kinds);
        }
    });
}

/// Whether there is an error of an operation, or of a callback beside one, that nobody has read:
/// the next launch with operations raises it.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_has_unread() -> c_int {
    quiet(0, || {
        world().map_or(0, |world| c_int::from(world.engine.has_unread()))
    })
}

/// A host callback on a GPU has raised this. XLA's plugin calls it, and where no operation is in
/// flight its error is nobody's but JAX's. Else it is raised later, if nobody reads it.
///
/// # Safety
/// `error` must be NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_callback_failed(error: *const c_char) {
    quiet((), || {
        // SAFETY: the caller's text is NUL-terminated.
        let error = unsafe { CStr::from_ptr(error) }.to_string_lossy();
        if let Some(world) = world_of_this_process().filter(|world| world.engine.in_flight() > 0) {
            world.engine.note_unread(&error, None);
        }
    });
}

/// Where the number of launches with operations stands that the main thread has asked for.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_launches_by_main() -> *const u64 {
    crate::launch::launches_by_main().as_ptr()
}

/// The program has refused a collective, called `kind`, before it launched anything: the other
/// ranks, which may wait in theirs, get an error with these words. Waits for nobody. Only what the
/// main thread refuses outside of host callbacks is told.
///
/// # Safety
/// `kind` and `words` must be NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_refuse(comm: i64, kind: *const c_char, words: *const c_char) {
    quiet((), || {
        // SAFETY: the caller's texts are NUL-terminated.
        let (kind, words) = unsafe { (CStr::from_ptr(kind), CStr::from_ptr(words)) };
        let kind = Kind::ALL
            .iter()
            .find(|one| one.name().as_bytes() == kind.to_bytes());
        let kind = kind.filter(|kind| kind.is_collective());
        if let (Some(world), Some(kind)) = (world_of_this_process(), kind)
            && is_main_thread()
            && ticket::callback_of().is_none()
            && !ticket::is_inside_launch()
        {
            world
                .engine
                .refuse_unlaunched(comm, *kind, &words.to_string_lossy());
        }
    });
}

/// Whether another rank waits in an operation, which it has for a moment.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_is_awaited() -> c_int {
    quiet(0, || {
        world_of_this_process().map_or(0, |world| c_int::from(world.engine.is_awaited()))
    })
}

/// Installs the function that says where the threads of Python are: it writes at most `capacity`
/// bytes to `text` and returns how many, and writes how many threads there are beside the main one
/// to `others`. Null removes it.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_set_where(function: Option<WhereInPython>) {
    quiet((), || {
        *WHERE_IN_PYTHON.lock() = function;
        place::set_where(function.map(|_| where_in_python as place::Where));
    });
}

/// See [`mpi_cuda_set_where`].
pub type WhereInPython =
    extern "C" fn(text: *mut c_char, capacity: usize, others: *mut usize) -> usize;

static WHERE_IN_PYTHON: Mutex<Option<WhereInPython>> = Mutex::new(None);

fn where_in_python() -> Option<place::Threads> {
    let function = (*WHERE_IN_PYTHON.lock())?;
    let mut text = vec![0u8; 4 << 10];
    let mut others = 0;
    let length = function(text.as_mut_ptr().cast(), text.len(), &raw mut others);
    text.truncate(length);
    let words = String::from_utf8_lossy(&text).into_owned();
    Some(place::Threads { words, others })
}

/// Waits until everything dispatched so far has ended; −1 if an operation failed unnoticed.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_wait() -> c_int {
    quiet(-1, || {
        let Some(world) = world_of_this_process() else {
            return 0;
        };
        if launch::ticket::is_in_callback() {
            return fail(Error::precondition(
                "a host callback cannot wait for the launch that it belongs to",
            ));
        }
        world.engine.wait_idle();
        world.engine.take_unread_error(None).map_or(0, fail)
    })
}

/// Number of launches with operations that have not ended.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_in_flight() -> c_int {
    quiet(0, || {
        world().map_or(0, |world| world.engine.in_flight() as c_int)
    })
}

/// Number of launches so far that ran on the calling thread, since all ranks had arrived.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_launches_on_callers() -> c_int {
    quiet(0, || launch::launches_on_callers() as c_int)
}

/// Writes the record of this rank's last operations to a file, or, for null, to that in
/// `MPI_CUDA_RECORD_DIR`; -1 on error.
///
/// # Safety
/// `path` must be null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_write_record(path: *const c_char) -> c_int {
    quiet(-1, || {
        if world_of_this_process().is_none() {
            return fail(Error::precondition("call mpi_cuda_start first"));
        }
        // SAFETY: the caller's text is NUL-terminated, if there is one.
        let path = (!path.is_null()).then(|| unsafe { CStr::from_ptr(path) });
        let path = path.map(|path| Path::new(OsStr::from_bytes(path.to_bytes())));
        file::write_to(path).map_or_else(
            |error| {
                fail(Error::invalid(format!(
                    "the record cannot be written: {error}"
                )))
            },
            |()| 0,
        )
    })
}

/// Records that this rank fails with a status, and why.
///
/// # Safety
/// `words` must be NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_failed(code: c_int, words: *const c_char) {
    quiet((), || {
        if world_of_this_process().is_some() {
            // SAFETY: the caller's words are NUL-terminated.
            file::failed(code, unsafe { CStr::from_ptr(words) }.to_bytes());
            at_exit::note_failure();
        }
    });
}

/// The main thread of this rank has failed with a status, and other threads of it go on: if other
/// ranks wait for long from now on, the job ends.
///
/// # Safety
/// `words` must be NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_main_thread_failed(code: c_int, words: *const c_char) {
    quiet((), || {
        if let Some(world) = world_of_this_process() {
            // SAFETY: the caller's words are NUL-terminated.
            let words = unsafe { CStr::from_ptr(words) }.to_string_lossy();
            world.main_thread_failed(code, words.into_owned());
        }
    });
}

/// Ends the whole job with a non-zero status, once the launcher has read what this rank printed.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_abort(code: c_int) {
    quiet((), || {
        if let Some(world) = world_of_this_process() {
            world.abort(code);
        }
    });
}

/// This rank has come to its end: from now on it waits for others for a bounded time only.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_ending() {
    quiet((), || {
        if let Some(world) = world_of_this_process() {
            world.watch_end(config().exit_timeout);
        }
    });
}

/// Waits for everything and finalizes MPI if we initialised it. Call once, last.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_shutdown() {
    quiet((), || {
        if let Some(world) = world_of_this_process() {
            world.shutdown();
        }
    });
}

/// Whether the inner plugin's devices are GPUs; 0 if it cannot be loaded.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_on_gpu() -> c_int {
    quiet(0, || load().map_or(0, |_| c_int::from(on_gpu())))
}
