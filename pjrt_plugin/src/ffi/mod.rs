//! The XLA FFI side: our custom-call targets, JAX's host callbacks, and targets of other packages.

mod attributes;
pub mod callbacks;
mod collective;
mod collective_contract;
mod collectives;
mod contract;
mod contracts;
mod forward;
mod frame;
#[cfg(test)]
mod fuzz;
mod handler;
mod huge_pages;
mod local_devices;
pub mod memory;
mod operations;
pub mod replica_groups;
pub mod status;
pub mod targets;
mod untyped;
pub mod user_reductions;

use std::ffi::c_void;
use std::mem::size_of;

use parking_lot::Mutex;
use pjrt_sys::*;

use crate::error::Error;
use crate::inner::call::call;
use crate::inner::{extensions, on_gpu};

pub use forward::{register_foreign, register_untyped};
pub use handler::Handler;

/// Registers what the library itself brings, once.
pub fn register_all() -> Result<(), Error> {
    static DONE: Mutex<bool> = Mutex::new(false);
    let mut done = DONE.lock();
    if *done {
        return Ok(());
    }
    for (name, (_, handler)) in own_targets().zip(operations::HANDLERS) {
        register(&name, *handler)?;
    }
    for (kind, handler) in operations::MPI4JAX_HANDLERS {
        register(&targets::mpi4jax_target(*kind), *handler)?;
    }
    for (name, handler) in collectives::HANDLERS.iter().chain(collectives::OTHERS) {
        register(name, *handler)?;
    }
    register(contracts::ASYNC_BARRIER.target, operations::ASYNC_BARRIER)?;
    // On GPUs JAX's own package has registered its own.
    if !on_gpu() {
        for (name, handler) in callbacks::HANDLERS {
            register(name, *handler)?;
        }
    }
    forward::register_waiting()?;
    *done = true;
    Ok(())
}

/// The targets of our operations.
pub fn own_targets() -> impl Iterator<Item = String> {
    let kinds = operations::HANDLERS.iter();
    kinds.map(|(kind, _)| format!("{}{}", targets::PREFIX, kind.name()))
}

/// In place of the handler of an operation, for an XLA that does not run programs.
pub const STAND_IN: Handler = handler::handler(|_: &frame::Frame<'_>| {
    Err(Error::internal(
        "an operation of mpi_cuda in a program that was to be partitioned only",
    ))
});

/// Registers a handler with the inner plugin. It reports no refusal: a handler that XLA does not
/// like is missing when a program is compiled.
fn register(name: &str, handler: Handler) -> Result<(), Error> {
    let platform = if on_gpu() { "CUDA" } else { "HOST" };
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
    unsafe {
        call(
            extensions::ffi().and_then(|ffi| ffi.register_handler),
            &mut args,
        )
    }
}
