//! JAX's host callbacks on CPU. jaxlib's own handlers cannot be registered with another plugin,
//! but JAX attaches its callbacks to every launch as user data, so handlers of ours find them and
//! call them through a trampoline that the Python package installs.

use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicI64, AtomicPtr, Ordering};

use pjrt_sys::*;

use super::frame::{Frame, dims};
use super::handler::{Handler, handler};
use crate::error::Error;
use crate::launch::ticket::{in_callback_of, ticket_of};
use crate::plugin::world;

/// An array as the trampoline sees it.
#[repr(C)]
pub struct CallbackArray {
    /// `XLA_FFI_DataType`.
    dtype: c_int,
    /// Number of dimensions.
    rank: c_int,
    /// Dimensions, outermost first.
    dims: *const i64,
    /// Row-major data.
    data: *mut c_void,
}

/// Calls a Python callback: `callback` is its `PyObject*`; returns 1 if it was done, or fills in
/// `error` and returns 0, which is also what an exception inside the trampoline becomes.
/// `in_place` is 1 for callbacks that write into their results themselves.
pub type Trampoline = unsafe extern "C" fn(
    callback: *mut c_void,
    in_place: c_int,
    num_args: c_int,
    args: *const CallbackArray,
    num_rets: c_int,
    rets: *const CallbackArray,
    error: *mut c_char,
    error_capacity: usize,
) -> c_int;

static TRAMPOLINE: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Installs the trampoline; null removes it.
pub fn set_trampoline(trampoline: Option<Trampoline>) {
    let pointer = trampoline.map_or(std::ptr::null_mut(), |function| function as *mut c_void);
    TRAMPOLINE.store(pointer, Ordering::Release);
}

/// The type id under which the framework last attached user data (JAX: its host callbacks).
static USER_DATA_TYPE: AtomicI64 = AtomicI64::new(0);

/// The framework has attached user data of this type to a launch.
pub fn note_user_data(type_id: i64) {
    USER_DATA_TYPE.store(type_id, Ordering::Release);
}

/// Targets that JAX's lowering for the CPU uses (`jax/_src/callback.py`, `buffer_callback.py`).
pub const HANDLERS: &[(&str, Handler)] = &[
    ("xla_ffi_python_cpu_callback", handler(callback)),
    ("xla_ffi_partitioned_python_cpu_callback", handler(callback)),
    ("xla_buffer_python_cpu_callback", handler(callback_in_place)),
];

fn callback(frame: &Frame<'_>) -> Result<(), Error> {
    call_python(frame, 0)
}

/// One that writes into its results itself.
fn callback_in_place(frame: &Frame<'_>) -> Result<(), Error> {
    call_python(frame, 1)
}

fn call_python(frame: &Frame<'_>, in_place: c_int) -> Result<(), Error> {
    let trampoline = TRAMPOLINE.load(Ordering::Acquire);
    if trampoline.is_null() {
        return Err(Error::internal(
            "host callbacks need the Python package mpi_cuda, which is not loaded",
        ));
    }
    let callback = find_callback(frame)?;
    let (args, rets) = (arrays(frame.args), arrays(frame.rets));
    let mut text = vec![0u8; 1 << 16];
    let done = in_callback_of(frame.run_id(), || {
        // SAFETY: `set_trampoline` alone stores there. The arrays live through the call, and the
        // trampoline takes Python's lock itself.
        unsafe {
            std::mem::transmute::<*mut c_void, Trampoline>(trampoline)(
                callback,
                in_place,
                args.len() as c_int,
                args.as_ptr(),
                rets.len() as c_int,
                rets.as_ptr(),
                text.as_mut_ptr().cast(),
                text.len(),
            )
        }
    });
    if done == 1 {
        return Ok(());
    }
    let end = text
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(text.len());
    // What JAX's own callbacks say.
    let message = format!(
        "CpuCallback error calling callback: {}",
        String::from_utf8_lossy(&text[..end])
    );
    // Beside operations nothing else may show it: the program's token does not.
    if let (Some(ticket), Some(world)) = (ticket_of(frame.run_id()), world()) {
        let thread = world.engine.thread(ticket);
        world.engine.note_unread(&message, thread);
    }
    Err(Error::verbatim(PJRT_Error_Code_INTERNAL, message))
}

fn find_callback(frame: &Frame<'_>) -> Result<*mut c_void, Error> {
    let index = frame
        .integer("index")
        .and_then(|index| usize::try_from(index).ok());
    let index = index.ok_or_else(|| Error::internal("a host callback lacks its index"))?;
    let data = frame.user_data(USER_DATA_TYPE.load(Ordering::Acquire));
    if data.is_null() {
        return Err(Error::internal(
            "the framework attached no host callbacks to this launch; this version \
                    of JAX is not supported (see docs/compatibility.md)",
        ));
    }
    // SAFETY: jaxlib's FfiLoadedHostCallbacks begins with the array of PyObject*
    // (`xla/pjrt/host_callback.h`); the index is one that JAX put into the program.
    let callback = unsafe { *(*data.cast::<*const *mut c_void>()).add(index) };
    if callback.is_null() {
        Err(Error::internal("a host callback is null"))
    } else {
        Ok(callback)
    }
}

fn arrays(buffers: &[&XLA_FFI_Buffer]) -> Vec<CallbackArray> {
    let describe = |buffer: &&XLA_FFI_Buffer| CallbackArray {
        dtype: buffer.dtype as c_int,
        rank: buffer.rank as c_int,
        dims: dims(buffer).as_ptr(),
        data: buffer.data,
    };
    buffers.iter().map(describe).collect()
}
