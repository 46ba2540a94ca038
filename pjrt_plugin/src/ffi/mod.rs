//! The XLA FFI side: our custom-call targets, JAX's host callbacks, and targets of other packages.

mod huge_pages;
pub mod memory;
pub mod replica_groups;
pub mod status;
pub mod user_reductions;

use std::ffi::c_void;
use std::mem::size_of;

use parking_lot::Mutex;
use pjrt_sys::*;

use crate::config::Device;
use crate::error::Error;
use crate::inner::call::call;
use crate::pjrt::extension::inner_ffi;
use crate::plugin::plugin;
use crate::search::contains;

mod callbacks;
mod collectives;
mod forward;
pub mod frame;
mod operations;

pub use callbacks::{Trampoline, set_trampoline};
pub use forward::register_foreign;

/// What all our targets' names begin with.
const TARGET_PREFIX: &str = "mpi_cuda_";

/// mpi4jax's target for an operation.
fn mpi4jax_target(operation: &str) -> String {
    format!("mpi_{operation}_ffi")
}

/// Whether a program, in any format, calls operations of ours or of mpi4jax.
pub fn has_operations(program: &[u8]) -> bool {
    contains(program, TARGET_PREFIX.as_bytes())
        || contains(program, b"_ffi")
            && operations::MPI4JAX_HANDLERS
                .iter()
                .any(|(name, _)| contains(program, mpi4jax_target(name).as_bytes()))
}

/// Whether a program, in any format, may receive messages with operations of mpi4jax's.
pub fn receives(program: &[u8]) -> bool {
    let mut targets = ["recv", "sendrecv"].iter().map(|name| mpi4jax_target(name));
    targets.any(|target| contains(program, target.as_bytes()))
}

/// What the names of all targets for host callbacks contain.
pub const CALLBACK_MARK: &str = "_python_cpu_callback";

/// What the name of an attribute begins with that says: the operations of this program are the same
/// on every rank (`include/mpi_cuda.h`, mpi_cuda_uniform).
pub const UNIFORM_MARK: &str = "mpi_cuda_uniform_";
/// A name of it that is still accepted.
pub const OLD_UNIFORM_MARK: &str = "mpi_cuda_alike_";

/// An FFI handler as XLA calls it (`xla/ffi/api/c_api.h`, XLA_FFI_Handler).
pub type Handler = unsafe extern "C" fn(*mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error;

/// Registers what the library itself brings, once.
pub fn register_all() -> Result<(), Error> {
    static DONE: Mutex<bool> = Mutex::new(false);
    let mut done = DONE.lock();
    if *done {
        return Ok(());
    }
    for (name, handler) in operations::HANDLERS {
        register(&format!("{TARGET_PREFIX}{name}"), *handler)?;
    }
    for (name, handler) in operations::MPI4JAX_HANDLERS {
        register(&mpi4jax_target(name), *handler)?;
    }
    for (name, handler) in collectives::HANDLERS {
        register(&format!("{}{name}", hlo_rewrite::TARGET_PREFIX), *handler)?;
    }
    register(
        crate::launch::async_barrier::TARGET,
        operations::async_barrier,
    )?;
    // On GPUs JAX's own package has registered its own.
    if plugin().inner.device == Device::Cpu {
        for (name, handler) in callbacks::HANDLERS {
            register(name, *handler)?;
        }
    }
    forward::register_waiting()?;
    *done = true;
    Ok(())
}

/// Registers a handler with the inner plugin. It reports no refusal: a handler that XLA does not
/// like is missing when a program is compiled.
fn register(name: &str, handler: Handler) -> Result<(), Error> {
    let platform = match plugin().inner.device {
        Device::Cuda => "CUDA",
        _ => "HOST",
    };
    let mut args = PJRT_FFI_Register_Handler_Args {
        struct_size: size_of::<PJRT_FFI_Register_Handler_Args>(),
        target_name: name.as_ptr().cast(),
        target_name_size: name.len(),
        handler: handler as *mut c_void,
        platform_name: platform.as_ptr().cast(),
        platform_name_size: platform.len(),
        traits: 0,
    };
    // SAFETY: valid arguments; XLA copies the name.
    unsafe { call(inner_ffi().and_then(|ffi| ffi.register_handler), &mut args) }
}
