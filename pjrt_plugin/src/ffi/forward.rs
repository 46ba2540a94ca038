//! FFI targets of other packages (jaxlib's LAPACK and any `jax.ffi.register_ffi_target`), whatever
//! FFI version they were built for: XLA gets a handler of ours, which answers the version query
//! and passes calls on. A handler carries no data, so each target has a function of its own.

use std::collections::HashMap;
use std::sync::atomic::{AtomicPtr, Ordering};

use parking_lot::Mutex;
use pjrt_sys::*;

use super::frame::Frame;
use super::handler::{Handler, answer_metadata};
use super::register;
use crate::error::Error;

/// How many targets can be forwarded.
pub const CAPACITY: usize = 2048;

static TARGETS: [AtomicPtr<std::ffi::c_void>; CAPACITY] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; CAPACITY];

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
    let handler = handler.map_or(std::ptr::null_mut(), |function| function as *mut _);
    TARGETS[slot].store(handler, Ordering::Release);
    if known.is_some() {
        return Ok(());
    }
    slots.by_name.insert(name.to_owned(), slot);
    if slots.ready {
        return register(name, FORWARDERS[slot]);
    }
    slots.waiting.push(name.to_owned());
    Ok(())
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
            return std::ptr::null_mut();
        }
        let target = TARGETS[SLOT].load(Ordering::Acquire);
        if target.is_null() {
            return Frame::new(&*frame).error(
                "mpi_cuda: this FFI target has instantiate, prepare or initialize stages, which \
                 cannot be registered through PJRT",
            );
        }
        std::mem::transmute::<*mut std::ffi::c_void, Handler>(target)(frame)
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
