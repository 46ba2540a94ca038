//! The exported functions beside `GetPjrtApi`; documented in `include/mpi_cuda.h`.

mod partitioner;

use std::cell::RefCell;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;

use mpi_runtime::engine::recorder::file;
use mpi_runtime::log;
use mpi_runtime::node::process::is_main_thread;
use mpi_runtime::watch::coordinator::{BringUp, Coordinator};
use mpi_runtime::watch::place;
use mpi_runtime::world::library;
use mpi_runtime::{Family, Kind};

use parking_lot::Mutex;
use pjrt_sys::PJRT_Api;

use crate::at_exit;
use crate::boundary::quiet;
use crate::error::Error;
use crate::ffi::callbacks::{self, Trampoline};
use crate::ffi::{self, Handler};
use crate::inner::on_gpu;
use crate::launch::{self, ticket};
use crate::plugin::{self, config, load, start_world, world};

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

fn fail(text: impl ToString) -> c_int {
    let text = CString::new(text.to_string().replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.set(text);
    -1
}

/// The PJRT entry point (`pjrt_c_api.h`).
#[unsafe(no_mangle)]
pub extern "C" fn GetPjrtApi() -> *const PJRT_Api {
    quiet(std::ptr::null(), crate::api::table)
}

/// Text of the last error of this thread; valid until its next call.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ptr())
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

/// The world, unless this process was forked from a rank: it has the rank's memory, and must not
/// touch the rank's MPI.
fn world_of_this_process() -> Option<&'static mpi_runtime::World> {
    world().filter(|_| !crate::fork::is_child())
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

/// This rank wants JAX's coordinator: 1 if the address to connect to was written to `address`, 0 if
/// it is not known yet, and −1 if it will hardly ever be.
///
/// # Safety
/// `address` must have room for `capacity` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_coordinator(address: *mut c_char, capacity: usize) -> c_int {
    quiet(-1, || {
        let Some(coordinator) = coordinator() else {
            return fail(Error::precondition("call mpi_cuda_start first"));
        };
        match coordinator.want() {
            Ok(Some(place)) => {
                let text = CString::new(place.to_string()).unwrap_or_default();
                let text = text.as_bytes_with_nul();
                if text.len() > capacity {
                    return fail(Error::invalid("there is no room for the address"));
                }
                // SAFETY: the caller promises that room.
                unsafe { address.copy_from_nonoverlapping(text.as_ptr().cast(), text.len()) };
                1
            }
            Ok(None) => 0,
            Err(why) => fail(Error::precondition(why)),
        }
    })
}

/// Whether JAX's coordinator is for ranks of other nodes too.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_several_nodes() -> c_int {
    quiet(0, || {
        coordinator().map_or(0, |coordinator| {
            c_int::from(coordinator.is_for_several_nodes())
        })
    })
}

/// Whether that rank of the world has died, or cannot be reached.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_has_died(rank: c_int) -> c_int {
    quiet(0, || {
        coordinator().map_or(0, |coordinator| {
            c_int::from(coordinator.has_died(rank as usize))
        })
    })
}

/// Rank 0 has started JAX's coordinator on that port.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_tell_coordinator(port: u16) {
    quiet((), || {
        if let Some(coordinator) = coordinator() {
            coordinator.tell(port);
        }
    });
}

/// Installs the function that brings up this rank's part of JAX's coordination, which may wait for
/// other ranks; it is called at most once, when another rank wants it. Null removes it.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_set_bring_up(function: Option<extern "C" fn()>) {
    quiet((), || {
        *BRING_UP.lock() = function;
        if let Some(coordinator) = coordinator() {
            coordinator.set_bring_up(function.map(|_| bring_up as BringUp));
        }
    });
}

static BRING_UP: Mutex<Option<extern "C" fn()>> = Mutex::new(None);

fn bring_up() {
    let function = *BRING_UP.lock();
    if let Some(function) = function {
        function();
    }
}

fn coordinator() -> Option<&'static Coordinator> {
    world_of_this_process()?.coordinator.as_deref()
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

/// Forwards an FFI target of another package; a null handler is refused when it is called.
///
/// # Safety
/// `name` must be NUL-terminated, `handler` an XLA FFI handler or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_register_ffi_target(
    name: *const c_char,
    handler: Option<Handler>,
) -> c_int {
    quiet(-1, || {
        // SAFETY: the caller's name is NUL-terminated.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        ffi::register_foreign(&name, handler).map_or_else(fail, |()| 0)
    })
}

/// Registers a function of the custom calls before XLA's FFI under a target name, and has the FFI
/// handler that calls it; null on error.
///
/// # Safety
/// `name` must be NUL-terminated. `function` must stay, and take what its callers' API version of
/// custom calls says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_register_untyped_target(
    name: *const c_char,
    function: *mut c_void,
) -> *mut c_void {
    quiet(std::ptr::null_mut(), || {
        // SAFETY: the caller's name is NUL-terminated.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let registered = match NonNull::new(function) {
            // SAFETY: the caller's promise.
            Some(function) => unsafe { ffi::register_untyped(&name, function) },
            None => Err(Error::invalid(format!(
                "the custom call {name} has no function"
            ))),
        };
        registered.map_or_else(
            |error| {
                fail(error);
                std::ptr::null_mut()
            },
            |handler| handler as *mut c_void,
        )
    })
}

/// Installs the function that calls Python callbacks; null removes it.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_set_trampoline(trampoline: Option<Trampoline>) {
    quiet((), || callbacks::set_trampoline(trampoline));
}

/// Whether the inner plugin's devices are GPUs; 0 if it cannot be loaded.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_on_gpu() -> c_int {
    quiet(0, || load().map_or(0, |_| c_int::from(on_gpu())))
}

/// Writes the bytes of all ranks to `all`, one after the other, of which each passes as many;
/// collective. -1 on error.
///
/// # Safety
/// `own` must hold `bytes` bytes, and `all` have room for so many of each rank.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_gather(own: *const u8, bytes: usize, all: *mut u8) -> c_int {
    quiet(-1, || {
        let Some(world) = world_of_this_process() else {
            return fail(Error::precondition("call mpi_cuda_start first"));
        };
        // SAFETY: the caller's bytes, which nobody changes meanwhile.
        let own = unsafe { std::slice::from_raw_parts(own, bytes) };
        match world.gather(own) {
            Ok(gathered) => {
                // SAFETY: the caller has room for those of all ranks.
                unsafe { all.copy_from_nonoverlapping(gathered.as_ptr(), gathered.len()) };
                0
            }
            Err(error) => fail(error),
        }
    })
}

/// The seconds that a message of so many bytes takes to `peer`, which calls this too: the mean of
/// `rounds` there and back, halved. -1 on error.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_ping(peer: c_int, bytes: usize, rounds: c_int) -> f64 {
    quiet(-1.0, || {
        let Some(world) = world_of_this_process() else {
            return fail(Error::precondition("call mpi_cuda_start first")).into();
        };
        let rounds = u32::try_from(rounds).unwrap_or(0);
        match world.ping(peer, bytes, rounds) {
            Ok(time) => time.as_secs_f64(),
            Err(error) => fail(error).into(),
        }
    })
}

/// Turns the probe of direct transfer to the next way: 0 arrays, 1 copies of them, 2 nothing is
/// left; -1 on error.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_probe_next() -> c_int {
    quiet(-1, || match crate::probe::next() {
        Ok(place) => c_int::try_from(place).unwrap_or(c_int::MAX),
        Err(error) => fail(error),
    })
}

/// What came of it on this rank: null if the data were right. 1 if it works on all ranks, 0 if not;
/// -1 on error.
///
/// # Safety
/// `failure` must be null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_probe_report(failure: *const c_char) -> c_int {
    quiet(-1, || {
        // SAFETY: the caller's text is NUL-terminated, if there is one.
        let text = (!failure.is_null()).then(|| unsafe { CStr::from_ptr(failure) });
        let text = text.map(|text| text.to_string_lossy());
        match crate::probe::report(text.as_deref()) {
            Ok(works) => c_int::from(works),
            Err(error) => fail(error),
        }
    })
}
