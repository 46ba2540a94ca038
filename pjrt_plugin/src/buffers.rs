//! Every way to create a buffer, guarded: to the inner client every device is local, and data for
//! another rank's device would silently be lost.

use pjrt_sys::*;

use crate::boundary;
use crate::call::call;
use crate::client;
use crate::error::Error;
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
