//! Launching programs. Those with operations of ours take a ticket, which the operations find
//! again through the run id; they run on the calling thread only if all ranks are there.

pub mod alias_buffer;
pub mod async_barrier;
pub mod deferred;
pub mod execute_options;
pub mod in_callback;
pub mod inflight_limit;

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mpi_runtime::{Ticket, UniformProgram, World};
use parking_lot::{ReentrantMutex, RwLock};
use pjrt_sys::*;

use crate::boundary;
use crate::compile::spmd;
use crate::config::Device;
use crate::error::Error;
use crate::inner::call::{call, new_args, slice};
use crate::inner::handles::{destroy_event, destroy_loaded};
use crate::launch::alias_buffer::End;
use crate::launch::execute_options::Options;
use crate::pjrt::buffer;
use crate::pjrt::client;
use crate::pjrt::event;
use crate::pjrt::execute_context;
use crate::pjrt::keep_alive::KeepAlive;
use crate::plugin::{plugin, world};

/// How long a program that cannot be deferred waits for those that are.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What we know of a loaded executable that has operations of ours or host callbacks.
#[derive(Clone, Copy)]
pub struct ProgramInfo {
    /// It has operations.
    pub operations: bool,
    /// It has host callbacks.
    pub callbacks: bool,
    /// XLA would run it on the calling thread, where an operation must not wait for a peer.
    pub cheap: bool,
    /// It writes a status of the user's, who reads it when the launch returns, as after MPI's own receive.
    pub status: bool,
    /// Its operations are the same collectives and exchanges on every rank.
    pub uniform: Option<UniformProgram>,
}

static PROGRAMS: LazyLock<RwLock<HashMap<usize, ProgramInfo>>> = LazyLock::new(RwLock::default);

/// KeptExecutable from taking a ticket until the inner plugin has queued the launch, so that tickets and
/// XLA's own queue have the same order. Reentrant, since a host callback may launch programs.
static LAUNCHING: ReentrantMutex<()> = ReentrantMutex::new(());

thread_local! {
    /// The launch whose host callback this thread is running; what it launches belongs to it.
    static CALLBACK_OF: Cell<Option<Ticket>> = const { Cell::new(None) };
    /// Launches of programs with callbacks or operations that this thread is inside of.
    static LAUNCHES_HERE: Cell<u32> = const { Cell::new(0) };
    /// This thread runs a host callback of a program that XLA runs in the background.
    static IN_BACKGROUND: Cell<bool> = const { Cell::new(false) };
}

/// Notes a loaded executable with operations or callbacks.
pub fn remember(loaded: *const PJRT_LoadedExecutable, program: ProgramInfo) {
    PROGRAMS.write().insert(loaded as usize, program);
}

/// Runs `body` as a host callback of the launch with `run_id`.
pub fn in_callback_of<T>(run_id: i64, body: impl FnOnce() -> T) -> T {
    let outer = CALLBACK_OF.replace(ticket_of(run_id));
    let outer_background = IN_BACKGROUND.replace(LAUNCHES_HERE.get() == 0);
    let result = body();
    IN_BACKGROUND.set(outer_background);
    CALLBACK_OF.set(outer);
    result
}

/// Whether this thread runs a host callback that must not wait for launches: its own has operations,
/// or is in the background with others queued behind it.
pub fn is_in_callback() -> bool {
    CALLBACK_OF.get().is_some() || IN_BACKGROUND.get()
}

/// The ticket that a run id carries.
pub fn ticket_of(run_id: i64) -> Option<Ticket> {
    Some(Ticket(run_id as u32)).filter(|ticket| ticket.0 != 0)
}

/// Executables that deferred launches still need.
static EXECUTABLES: KeepAlive = KeepAlive::new();

/// Keeps an executable until dropped.
pub struct KeptExecutable(*mut PJRT_LoadedExecutable);

/// Keeps `executable` until what is returned is dropped.
pub fn keep(executable: *mut PJRT_LoadedExecutable) -> KeptExecutable {
    EXECUTABLES.keep(executable as usize);
    KeptExecutable(executable)
}

impl KeptExecutable {
    /// The executable.
    pub fn handle(&self) -> *mut PJRT_LoadedExecutable {
        self.0
    }
}

impl Drop for KeptExecutable {
    fn drop(&mut self) {
        if EXECUTABLES.release(self.0 as usize).destroy {
            forget(self.0);
            destroy_loaded(self.0);
        }
    }
}

/// Addresses are reused, so this comes before destroying.
fn forget(executable: *mut PJRT_LoadedExecutable) {
    PROGRAMS.write().remove(&(executable as usize));
    spmd::forget(executable);
    in_callback::forget(executable);
    deferred::forget(executable);
}

/// `PJRT_LoadedExecutable_Destroy`
pub unsafe extern "C" fn destroy(args: *mut PJRT_LoadedExecutable_Destroy_Args) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            let executable = (*args).executable;
            if EXECUTABLES.postpone(executable as usize, |postponed| postponed.destroy = true) {
                return Ok(());
            }
            forget(executable);
            call(plugin().inner.api().PJRT_LoadedExecutable_Destroy, args)
        }
    })
}

/// `PJRT_LoadedExecutable_Execute`
pub unsafe extern "C" fn execute(args: *mut PJRT_LoadedExecutable_Execute_Args) -> *mut PJRT_Error {
    // SAFETY: the framework passes valid arguments.
    if unsafe { (*args).num_devices } == 0 {
        // It runs on devices of other ranks on_caller.
        return std::ptr::null_mut();
    }
    // SAFETY: as above.
    let (program, context) = unsafe {
        let program = PROGRAMS.read().get(&((*args).executable as usize)).copied();
        (program, (*(*args).options).context)
    };
    if IN_BACKGROUND.get() {
        // SAFETY: as above.
        return boundary::pjrt(|| unsafe { launch_in_background(&mut *args, program) });
    }
    match program {
        None if !inflight_limit::may_be_full() => {
            match plugin().inner.api().PJRT_LoadedExecutable_Execute {
                // SAFETY: passed through.
                Some(function) => unsafe { function(args) },
                None => std::ptr::null_mut(),
            }
        }
        Some(program) if program.operations => {
            // SAFETY: as above.
            boundary::pjrt(|| unsafe {
                launch_operations(&mut *args, program, execute_context::keep(context))
            })
        }
        _ => {
            // SAFETY: as above.
            boundary::pjrt(|| unsafe {
                launch_others(&mut *args, program, execute_context::keep(context))
            })
        }
    }
}

/// Launches a program without operations, which may have callbacks.
///
/// # Safety
/// The arguments must be valid.
unsafe fn launch_others(
    args: &mut PJRT_LoadedExecutable_Execute_Args,
    program: Option<ProgramInfo>,
    context: execute_context::KeptContext,
) -> Result<(), Error> {
    let callbacks = program.is_some_and(|program| program.callbacks);
    let several = world().is_some_and(|world| world.size > 1);
    let order = several.then(|| LAUNCHING.lock());
    // SAFETY: valid arguments.
    let deferred = several && unsafe { must_defer(args, 1)? };
    let completion = Completion {
        inputs: if several && inflight_limit::may_be_full() {
            // SAFETY: valid arguments.
            unsafe { buffer::keep_inputs(args) }
        } else {
            Vec::new()
        },
        context,
        callbacks: callbacks.then(WithCallbacks::new),
        ticket: None,
        slot: several.then(|| inflight_limit::InFlightSlot::new(1, callbacks)),
        ends: Vec::new(),
    };
    if deferred {
        // SAFETY: valid arguments.
        return unsafe { defer(args, 0, completion) };
    }
    // Only the order of deferring matters here, and a callback may wait for another thread's launch.
    drop(order);
    // SAFETY: valid arguments. Without a ticket: JAX's own launch ids must not look like one.
    unsafe { with_launch_id(args, 0, |args| launch(args, completion)) }
}

/// Whether the dispatching thread would wait for a peer, and a thread of ours can do so instead.
/// Call with the launching lock context.
///
/// # Safety
/// The arguments must be valid.
unsafe fn must_defer(
    args: &PJRT_LoadedExecutable_Execute_Args,
    launches: usize,
) -> Result<bool, Error> {
    // The launch whose callback this is would wait for what is deferred.
    if LAUNCHES_HERE.get() > 0 || crate::fork::is_child() || inflight_limit::wait_for(launches) {
        return Ok(false);
    }
    // SAFETY: as the caller promises.
    if unsafe { deferred::is_possible(args) } {
        return Ok(true);
    }
    match inflight_limit::wait_none_deferred_for(LONGEST_WAIT) {
        0 => Ok(false),
        waiting => Err(Error::precondition(format!(
            "mpi_cuda: {waiting} launches wait for their peers, and a program whose results have less \
             than 8 bits cannot be dispatched behind them: wait for earlier results first \
             (block_until_ready), or return int8"
        ))),
    }
}

/// Defers a launch.
///
/// # Safety
/// The arguments must be valid, and [`deferred::is_possible`] for them.
unsafe fn defer(
    args: &mut PJRT_LoadedExecutable_Execute_Args,
    launch_id: i32,
    mut completion: Completion,
) -> Result<(), Error> {
    let watched = completion.ticket.is_some() && !args.device_complete_events.is_null();
    // SAFETY: as the caller promises; the options of `args` are valid when it runs, and the
    // framework's event is there when it was deferred.
    unsafe {
        deferred::defer(args, move |args, ends| {
            completion.ends = ends;
            with_launch_id(args, launch_id, |args| launch(args, completion))
        })?;
        if watched {
            event::watch_completion(*args.device_complete_events);
        }
    }
    Ok(())
}

/// Runs what a callback launches while its own program is in the background: to the end, here.
///
/// # Safety
/// The arguments must be valid.
unsafe fn launch_in_background(
    args: &mut PJRT_LoadedExecutable_Execute_Args,
    program: Option<ProgramInfo>,
) -> Result<(), Error> {
    let with_callbacks = program.is_some_and(|program| program.callbacks);
    let mut own = None;
    let ticket = match (program, world()) {
        (Some(program), Some(world)) if program.operations => {
            CALLBACK_OF.get().unwrap_or_else(|| {
                let ticket = world.engine.issue_ticket_now();
                own = Some(TicketGuard(ticket));
                ticket
            })
        }
        _ => Ticket(0),
    };
    // SAFETY: as the caller promises.
    let result = unsafe {
        with_launch_id(args, ticket.0 as i32, |args| {
            in_callback::execute(args, with_callbacks)
        })
    };
    drop(own);
    result
}

/// Launches a program with operations, under a ticket.
///
/// # Safety
/// The arguments must be valid.
unsafe fn launch_operations(
    args: &mut PJRT_LoadedExecutable_Execute_Args,
    program: ProgramInfo,
    context: execute_context::KeptContext,
) -> Result<(), Error> {
    let Some(world) = world() else {
        return Err(Error::internal(
            "a program with operations was launched before the world",
        ));
    };
    if crate::fork::is_child() {
        return Err(Error::precondition(
            "mpi_cuda: this process was forked from a rank and cannot communicate; start worker \
             processes with the spawn method and JAX_PLATFORMS=cpu",
        ));
    }
    if plugin().inner.device == Device::Cuda && is_xlas_gpu_thread() {
        return Err(Error::precondition(
            "mpi_cuda: a host callback has called an operation with arrays on the GPU, which waits there until \
             the callback has returned: call operations outside of callbacks",
        ));
    }
    if let Some(error) = world.engine.take_unread_error() {
        return Err(Error::internal(format!(
            "{error} (reported by the launch after it)"
        )));
    }
    let order = LAUNCHING.lock();
    let nested = CALLBACK_OF.get();
    let waits = program.status && nested.is_none() && LAUNCHES_HERE.get() == 0;
    let launches = 1 + usize::from(program.cheap);
    // SAFETY: valid arguments.
    let deferred = world.size > 1 && nested.is_none() && unsafe { must_defer(args, launches)? };
    let ticket = nested.unwrap_or_else(|| world.engine.issue_ticket());
    // The outer launch retires the ticket of what its callbacks launch.
    let own = if nested.is_none() {
        Some(TicketGuard(ticket))
    } else {
        None
    };
    // Alone in the world nothing waits for a peer, and with everybody here nothing for long.
    // SAFETY: valid arguments.
    let on_caller = world.size == 1 || !deferred && unsafe { all_are_here(world, program, args) };
    let completion = Completion {
        inputs: if on_caller {
            Vec::new()
        } else {
            // SAFETY: valid arguments.
            unsafe { buffer::keep_inputs(args) }
        },
        context,
        callbacks: program.callbacks.then(WithCallbacks::new),
        ticket: own,
        slot: (world.size > 1).then(|| inflight_limit::InFlightSlot::new(launches, true)),
        ends: Vec::new(),
    };
    let launch_id = ticket.0 as i32;
    if deferred {
        // SAFETY: valid arguments.
        unsafe { defer(args, launch_id, completion)? };
        drop(order);
        if waits {
            world.engine.wait_idle();
        }
        return Ok(());
    }
    let context = (program.cheap && !on_caller).then(|| hold_async_barrier(args.executable));
    // SAFETY: valid arguments.
    let result = unsafe { with_launch_id(args, launch_id, |args| launch(args, completion)) };
    drop(context);
    if on_caller && program.uniform.is_some() && world.size > 1 {
        ON_CALLERS.fetch_add(1, Ordering::Relaxed);
    }
    drop(order);
    if waits {
        world.engine.wait_idle();
    }
    result
}

/// Whether this is the thread on which XLA:GPU launches everything, so that nothing else is launched before
/// it returns. XLA names it (`py_xla_dispatch`).
fn is_xlas_gpu_thread() -> bool {
    let mut name = [0u8; 16];
    // SAFETY: a buffer as long as names are (prctl(2), PR_GET_NAME).
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name.starts_with(b"py_xla_dispatch")
}

/// Launches that ran on the calling thread because all ranks were there.
static ON_CALLERS: AtomicUsize = AtomicUsize::new(0);

/// How many launches of operations ran on the thread that dispatched them.
pub fn launches_on_callers() -> usize {
    ON_CALLERS.load(Ordering::Relaxed)
}

/// Whether this launch may wait for its peers on the calling thread: all of them have dispatched it,
/// and nothing that it waits for here needs more than this rank's own arithmetic.
///
/// # Safety
/// The arguments must be valid.
unsafe fn all_are_here(
    world: &World,
    program: ProgramInfo,
    args: &PJRT_LoadedExecutable_Execute_Args,
) -> bool {
    let Some(uniform) = program.uniform else {
        return false;
    };
    // XLA:GPU runs every launch on a thread of its own.
    if plugin().inner.device == Device::Cuda {
        return false;
    }
    // SAFETY: as the caller promises; there is one device.
    let inputs = unsafe { slice(*args.argument_lists, args.num_args) };
    WITH_CALLBACKS.load(Ordering::Acquire) == 0
        && inputs.iter().all(|&buffer| is_ready(buffer))
        && world.engine.all_have_arrived(uniform)
}

fn is_ready(buffer: *mut PJRT_Buffer) -> bool {
    let api = plugin().inner.api();
    let mut event = new_args::<PJRT_Buffer_ReadyEvent_Args>();
    event.buffer = buffer;
    // SAFETY: a live buffer.
    if unsafe { call(api.PJRT_Buffer_ReadyEvent, &mut event) }.is_err() {
        return false;
    }
    let mut ready = new_args::<PJRT_Event_IsReady_Args>();
    ready.event = event.event;
    // SAFETY: the event of the call above.
    let asked = unsafe { call(api.PJRT_Event_IsReady, &mut ready) };
    let mut error = new_args::<PJRT_Event_Error_Args>();
    error.event = event.event;
    // With an error in an input XLA would run nothing, and the others would wait.
    // SAFETY: as above; it is ready.
    let usable = asked.is_ok()
        && ready.is_ready
        && unsafe { call(api.PJRT_Event_Error, &mut error) }.is_ok();
    destroy_event(event.event);
    usable
}

/// Runs `body` with a copy of the options that carries `launch_id`.
///
/// # Safety
/// The arguments must be valid.
unsafe fn with_launch_id(
    args: &mut PJRT_LoadedExecutable_Execute_Args,
    launch_id: i32,
    body: impl FnOnce(&mut PJRT_LoadedExecutable_Execute_Args) -> Result<(), Error>,
) -> Result<(), Error> {
    // SAFETY: the framework's options are valid.
    let mut options = unsafe { Options::borrow(args.options) };
    options.get().launch_id = launch_id;
    let user_options = std::mem::replace(&mut args.options, options.get());
    let result = body(args);
    args.options = user_options;
    result
}

/// What a launch holds until it has ended.
struct Completion {
    #[expect(dead_code, reason = "context for its drop")]
    inputs: Vec<buffer::KeptBuffer>,
    #[expect(dead_code, reason = "context for its drop")]
    context: execute_context::KeptContext,
    #[expect(dead_code, reason = "context for its drop")]
    callbacks: Option<WithCallbacks>,
    ticket: Option<TicketGuard>,
    #[expect(dead_code, reason = "context for its drop")]
    slot: Option<inflight_limit::InFlightSlot>,
    /// What the framework waits for, if the launch was deferred.
    ends: Vec<End>,
}

impl Completion {
    /// The launch has ended, or failed.
    fn reach(mut self, error: Option<&str>) {
        let ends = std::mem::take(&mut self.ends);
        drop(self);
        for end in ends {
            end.reach(error);
        }
    }
}

/// Launches in flight of programs with callbacks, which may wait for anything.
static WITH_CALLBACKS: AtomicUsize = AtomicUsize::new(0);

/// Counts one of them until it is dropped.
struct WithCallbacks;

impl WithCallbacks {
    /// Call with the launching lock context if there are several ranks: not while another thread makes
    /// sure that there are none.
    fn new() -> WithCallbacks {
        WITH_CALLBACKS.fetch_add(1, Ordering::AcqRel);
        WithCallbacks
    }
}

impl Drop for WithCallbacks {
    fn drop(&mut self) {
        WITH_CALLBACKS.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Retires its ticket when dropped, so that no path forgets it.
struct TicketGuard(Ticket);

impl Drop for TicketGuard {
    fn drop(&mut self) {
        if let Some(world) = world() {
            world.engine.retire(self.0);
        }
    }
}

/// Launches a program and lets go of `completion` when it has ended.
///
/// # Safety
/// The arguments must be valid.
unsafe fn launch(
    args: &mut PJRT_LoadedExecutable_Execute_Args,
    completion: Completion,
) -> Result<(), Error> {
    let user_events = args.device_complete_events;
    let mut own_event: *mut PJRT_Event = std::ptr::null_mut();
    if user_events.is_null() {
        args.device_complete_events = &mut own_event;
    }
    LAUNCHES_HERE.set(LAUNCHES_HERE.get() + 1);
    // SAFETY: valid arguments, with room for the events.
    let result = unsafe { call(plugin().inner.api().PJRT_LoadedExecutable_Execute, args) };
    LAUNCHES_HERE.set(LAUNCHES_HERE.get() - 1);
    // SAFETY: on success the inner plugin filled in the events, one per device.
    let event = result
        .as_ref()
        .ok()
        .map(|()| unsafe { *args.device_complete_events });
    args.device_complete_events = user_events;
    if let Err(error) = result {
        completion.reach(Some(&error.to_string()));
        return Err(error);
    }
    let Some(event) = event else { return Ok(()) };
    if own_event.is_null() && completion.ticket.is_some() {
        event::watch_completion(event);
    }
    let mut ready = new_args::<PJRT_Event_OnReady_Args>();
    ready.event = event;
    ready.callback = Some(launch_ended);
    ready.user_arg = Box::into_raw(Box::new(Ended {
        completion,
        own_event,
    }))
    .cast();
    // SAFETY: a live event; the callback takes `Ended` over.
    unsafe { call(plugin().inner.api().PJRT_Event_OnReady, &mut ready) }
}

/// What the callback of a launch's completion owns.
struct Ended {
    completion: Completion,
    /// The event, if the framework did not ask for it.
    own_event: *mut PJRT_Event,
}

unsafe extern "C" fn launch_ended(error: *mut PJRT_Error, ended: *mut c_void) {
    boundary::quiet((), || {
        // SAFETY: made by `launch`; called once.
        let Ended {
            completion,
            own_event,
        } = *unsafe { Box::from_raw(ended.cast::<Ended>()) };
        // The callback owns the error (`pjrt_c_api.h`, PJRT_Event_OnReadyCallback).
        let error = (!error.is_null()).then_some(Error::Inner(error));
        completion.reach(error.as_ref().map(Error::to_string).as_deref());
        if let Some(error) = error {
            error.discard();
        }
        destroy_event(own_event);
    });
}

/// Call with the launching lock context.
fn hold_async_barrier(executable: *mut PJRT_LoadedExecutable) -> Option<async_barrier::Hold> {
    let context = client::of_executable(executable)
        .and_then(|(client, _)| client.async_barrier.hold(&client));
    context
        .map_err(|error| {
            eprintln!("mpi_cuda: small programs may block the calling thread: {error}");
            error.discard();
        })
        .ok()
}

/// Makes the async barrier, which a program now compiled may need.
pub fn prepare_async_barrier(executable: *mut PJRT_LoadedExecutable) {
    if world().is_some_and(|world| world.size > 1) {
        let made = client::of_executable(executable)
            .and_then(|(client, _)| client.async_barrier.prepare(&client));
        // The launch that needs it tries again, and says so.
        made.map_err(Error::discard).ok();
    }
}
