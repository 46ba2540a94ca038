//! Targets of other packages: FFI handlers (jaxlib's LAPACK and any `jax.ffi.register_ffi_target`),
//! whatever FFI version they were built for, and functions of the interface before FFI. XLA gets a
//! handler of ours, which answers the version query and passes calls on. A handler carries no data,
//! so each target has a function of its own.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicPtr, Ordering};

use parking_lot::Mutex;
use pjrt_sys::*;

use super::frame::Frame;
use super::handler::{Handler, answer_metadata};
use super::{register, untyped};
use crate::boundary::guarded;
use crate::error::Error;

/// How many targets can be forwarded.
pub const CAPACITY: usize = 2048;

type Functions = [AtomicPtr<c_void>; CAPACITY];

/// FFI handlers.
static TARGETS: Functions = [const { AtomicPtr::new(null_mut()) }; CAPACITY];

/// Functions of the interface before FFI. A name may have one of each, as in XLA.
static UNTYPED: Functions = [const { AtomicPtr::new(null_mut()) }; CAPACITY];

#[derive(Default)]
struct Slots {
    by_name: HashMap<String, usize>,
    /// Named before the inner plugin had a client.
    waiting: Vec<String>,
    ready: bool,
}

static SLOTS: Mutex<Option<Slots>> = Mutex::new(None);

/// Forwards calls of target `name` to `handler`; null means that the target cannot be executed
/// (it has stages that PJRT cannot register), which calling it then says. Registering a name again
/// replaces its handler.
pub fn register_foreign(name: &str, handler: Option<Handler>) -> Result<(), Error> {
    let handler = handler.map_or(null_mut(), |function| function as *mut _);
    store(name, &TARGETS, handler).map(drop)
}

/// Forwards calls of target `name` that `_jax_patches/untyped_calls.py` has rewritten to
/// `function`, and has the handler that does it. Registering a name again replaces its function.
///
/// # Safety
/// `function` must be one of `untyped::Function`'s conventions, and stay.
pub unsafe fn register_untyped(name: &str, function: NonNull<c_void>) -> Result<Handler, Error> {
    store(name, &UNTYPED, function.as_ptr()).map(|slot| FORWARDERS[slot])
}

/// Stores a target's function, and has its slot.
fn store(name: &str, functions: &Functions, function: *mut c_void) -> Result<usize, Error> {
    let mut slots = SLOTS.lock();
    let slots = slots.get_or_insert_with(Slots::default);
    let next = slots.by_name.len();
    let known = slots.by_name.get(name).copied();
    let slot = known.unwrap_or(next);
    if slot >= CAPACITY {
        return Err(Error::unimplemented(format!(
            "no room for the FFI target {name}: {CAPACITY} are registered"
        )));
    }
    functions[slot].store(function, Ordering::Release);
    if known.is_some() {
        return Ok(slot);
    }
    slots.by_name.insert(name.to_owned(), slot);
    if slots.ready {
        register(name, FORWARDERS[slot])?;
    } else {
        slots.waiting.push(name.to_owned());
    }
    Ok(slot)
}

/// The target that has a slot.
fn name_of(slot: usize) -> String {
    let slots = SLOTS.lock();
    let mut names = slots.iter().flat_map(|slots| &slots.by_name);
    let found = names.find(|(_, of)| **of == slot);
    found.map_or_else(String::new, |(name, _)| name.clone())
}

/// Registers what was named before the first client.
pub fn register_waiting() -> Result<(), Error> {
    let mut slots = SLOTS.lock();
    let slots = slots.get_or_insert_with(Slots::default);
    slots.ready = true;
    for name in std::mem::take(&mut slots.waiting) {
        register(&name, FORWARDERS[slots.by_name[&name]])?;
    }
    Ok(())
}

unsafe extern "C" fn forward<const SLOT: usize>(
    frame: *mut XLA_FFI_CallFrame,
) -> *mut XLA_FFI_Error {
    // SAFETY: XLA passes a valid frame, and `register_foreign` alone stores targets, which are
    // handlers.
    unsafe {
        if answer_metadata(frame) {
            return null_mut();
        }
        if let Some(function) = NonNull::new(UNTYPED[SLOT].load(Ordering::Acquire))
            && let Some(done) = forward_untyped(&Frame::new(&*frame), SLOT, function)
        {
            return done;
        }
        let target = TARGETS[SLOT].load(Ordering::Acquire);
        if target.is_null() {
            return Frame::new(&*frame).error(&not_executable(SLOT));
        }
        std::mem::transmute::<*mut c_void, Handler>(target)(frame)
    }
}

/// Calls a function of the interface before FFI, with the call's error; none if the call is typed.
///
/// # Safety
/// `function` must be as [`register_untyped`] demands.
unsafe fn forward_untyped(
    frame: &Frame<'_>,
    slot: usize,
    function: NonNull<c_void>,
) -> Option<*mut XLA_FFI_Error> {
    let call = untyped::Call::of(frame)?;
    // SAFETY: the caller's promise.
    let done = guarded(|| unsafe { call.run(frame, function) });
    Some(match done {
        Ok(()) => null_mut(),
        Err(error) => {
            let words = format!("custom call {}: {}", name_of(slot), error.bare());
            frame.error(&Error::internal(words).to_string())
        }
    })
}

/// Why a target has no handler.
fn not_executable(slot: usize) -> String {
    let name = name_of(slot);
    match UNTYPED[slot].load(Ordering::Acquire).is_null() {
        true => format!(
            "mpi_cuda: the FFI target {name} has instantiate, prepare or initialize stages, which \
             cannot be registered through PJRT"
        ),
        false => format!(
            "mpi_cuda: {name} is registered with api_version=0, and called as a typed target; \
             register it with api_version=1, or call it with custom_call_api_version 1, 2 or 3"
        ),
    }
}

/// `[forward::<0>, forward::<1>, …]`, eight slots a line, eight lines a block, and so on.
static FORWARDERS: [Handler; CAPACITY] = {
    const fn fill() -> [Handler; CAPACITY] {
        let mut all: [Handler; CAPACITY] = [forward::<0>; CAPACITY];
        macro_rules! eight {
            ($next:ident, $base:expr, $step:expr) => {
                $next!($base);
                $next!($base + $step);
                $next!($base + 2 * $step);
                $next!($base + 3 * $step);
                $next!($base + 4 * $step);
                $next!($base + 5 * $step);
                $next!($base + 6 * $step);
                $next!($base + 7 * $step);
            };
        }
        macro_rules! one {
            ($n:expr) => {
                all[$n] = forward::<{ $n }>;
            };
        }
        macro_rules! line {
            ($n:expr) => {
                eight!(one, $n, 1);
            };
        }
        macro_rules! block {
            ($n:expr) => {
                eight!(line, $n, 8);
            };
        }
        macro_rules! page {
            ($n:expr) => {
                eight!(block, $n, 64);
            };
        }
        page!(0);
        page!(512);
        page!(1024);
        page!(1536);
        all
    }
    fill()
};
