//! Where JAX's coordinator is, and who has died (`mpi_runtime/src/watch/coordinator.rs`).

use std::ffi::{CString, c_char, c_int};

use mpi_runtime::watch::coordinator::{BringUp, Coordinator};
use parking_lot::Mutex;

use super::answer::{fail, world_of_this_process};
use crate::boundary::quiet;
use crate::error::Error;

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
