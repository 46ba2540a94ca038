//! Buffers. Every way to create one is guarded: to the inner client every device is local, and data
//! for another rank's device would silently be lost. And the inputs of launches that may wait for a
//! peer are kept when the framework gives them up: a deferred launch still needs them, and the
//! inner plugin waits for the end of the launch when a donated one is destroyed.

use pjrt_sys::*;

use crate::boundary;
use crate::error::Error;
use crate::inner::call::{call, slice};
use crate::inner::handles::{destroy_buffer, discard};
use crate::pjrt::client;
use crate::pjrt::keep_alive::KeepAlive;
use crate::plugin::plugin;

/// Refuses a device or memory of another rank.
fn check_local<T>(function: &str, target: *const T) -> Result<(), Error> {
    if target.is_null() {
        return Ok(());
    }
    match client::owner(target) {
        Some((client, owner)) if owner != client.rank => Err(Error::invalid(format!(
            "mpi_cuda: {function} on rank {}: the target device belongs to rank {owner}, and data \
             cannot be placed there from here; use jax.local_devices(), or send it with mpi_cuda.send",
            client.rank
        ))),
        _ => Ok(()),
    }
}

/// Defines an override that checks some members of the arguments, then passes the call through.
macro_rules! guarded {
    ($($name:ident = $function:ident($args:ident: $($member:ident),+);)+) => {$(
        #[doc = concat!("`", stringify!($function), "`")]
        pub unsafe extern "C" fn $name(args: *mut $args) -> *mut PJRT_Error {
            boundary::pjrt(|| {
                // SAFETY: the framework passes valid arguments.
                unsafe {
                    $(check_local(stringify!($function), (*args).$member)?;)+
                    call(plugin().inner.api().$function, args)
                }
            })
        }
    )+};
}

guarded! {
    from_host_buffer = PJRT_Client_BufferFromHostBuffer(
        PJRT_Client_BufferFromHostBuffer_Args: device, memory);
    create_uninitialized = PJRT_Client_CreateUninitializedBuffer(
        PJRT_Client_CreateUninitializedBuffer_Args: device, memory);
    create_view = PJRT_Client_CreateViewOfDeviceBuffer(
        PJRT_Client_CreateViewOfDeviceBuffer_Args: device, memory);
    create_alias = PJRT_Client_CreateAliasBuffer(
        PJRT_Client_CreateAliasBuffer_Args: memory);
    create_for_async_transfer = PJRT_Client_CreateBuffersForAsyncHostToDevice(
        PJRT_Client_CreateBuffersForAsyncHostToDevice_Args: memory);
    copy_to_device = PJRT_Buffer_CopyToDevice(
        PJRT_Buffer_CopyToDevice_Args: dst_device);
    copy_to_memory = PJRT_Buffer_CopyToMemory(
        PJRT_Buffer_CopyToMemory_Args: dst_memory);
}

static BUFFERS: KeepAlive = KeepAlive::new();

/// Keeps a buffer and its content until dropped.
pub struct KeptBuffer(*mut PJRT_Buffer);

// SAFETY: only an address, given back to the thread-safe inner plugin.
unsafe impl Send for KeptBuffer {}

/// Keeps `buffer` until what is returned is dropped.
pub fn keep(buffer: *mut PJRT_Buffer) -> KeptBuffer {
    BUFFERS.keep(buffer as usize);
    KeptBuffer(buffer)
}

/// Keeps the inputs of a launch.
///
/// # Safety
/// The arguments must be valid.
pub unsafe fn keep_inputs(args: &PJRT_LoadedExecutable_Execute_Args) -> Vec<KeptBuffer> {
    // SAFETY: as the caller promises; there is one device.
    let inputs = unsafe { slice(*args.argument_lists, args.num_args) };
    inputs.iter().map(|&buffer| keep(buffer)).collect()
}

impl KeptBuffer {
    /// The buffer.
    pub fn handle(&self) -> *mut PJRT_Buffer {
        self.0
    }
}

impl Drop for KeptBuffer {
    fn drop(&mut self) {
        let postponed = BUFFERS.release(self.0 as usize);
        if postponed.delete && !postponed.destroy {
            discard(plugin().inner.api().PJRT_Buffer_Delete, {
                let mut args = crate::inner::call::new_args::<PJRT_Buffer_Delete_Args>();
                args.buffer = self.0;
                args
            });
        }
        if postponed.destroy {
            destroy_buffer(self.0);
        }
    }
}

/// Destroys a buffer, or has it destroyed when it is not held any more.
pub fn give_up(buffer: *mut PJRT_Buffer) {
    if !BUFFERS.postpone(buffer as usize, |postponed| postponed.destroy = true) {
        destroy_buffer(buffer);
    }
}

/// `PJRT_Buffer_Destroy`
pub unsafe extern "C" fn destroy(args: *mut PJRT_Buffer_Destroy_Args) -> *mut PJRT_Error {
    // SAFETY: the framework passes valid arguments.
    let buffer = unsafe { (*args).buffer };
    if BUFFERS.postpone(buffer as usize, |postponed| postponed.destroy = true) {
        return std::ptr::null_mut();
    }
    match plugin().inner.api().PJRT_Buffer_Destroy {
        // SAFETY: passed through.
        Some(function) => unsafe { function(args) },
        None => std::ptr::null_mut(),
    }
}

/// `PJRT_Buffer_Delete`
pub unsafe extern "C" fn delete(args: *mut PJRT_Buffer_Delete_Args) -> *mut PJRT_Error {
    // SAFETY: the framework passes valid arguments.
    let buffer = unsafe { (*args).buffer };
    if BUFFERS.postpone(buffer as usize, |postponed| postponed.delete = true) {
        return std::ptr::null_mut();
    }
    match plugin().inner.api().PJRT_Buffer_Delete {
        // SAFETY: passed through.
        Some(function) => unsafe { function(args) },
        None => std::ptr::null_mut(),
    }
}

/// `PJRT_Buffer_IsDeleted`
pub unsafe extern "C" fn is_deleted(args: *mut PJRT_Buffer_IsDeleted_Args) -> *mut PJRT_Error {
    // SAFETY: the framework passes valid arguments.
    let buffer = unsafe { (*args).buffer };
    if BUFFERS.postponed(buffer as usize).delete {
        // SAFETY: as above.
        unsafe { (*args).is_deleted = true };
        return std::ptr::null_mut();
    }
    match plugin().inner.api().PJRT_Buffer_IsDeleted {
        // SAFETY: passed through.
        Some(function) => unsafe { function(args) },
        None => std::ptr::null_mut(),
    }
}
