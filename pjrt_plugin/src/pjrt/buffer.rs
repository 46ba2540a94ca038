//! Buffers. Every way to create one is guarded: a device of another rank is not the inner client's,
//! or is local to it, and data for it would silently be lost. And the inputs of launches that may
//! wait for a peer are kept when the framework gives them up: a deferred launch still needs them,
//! and the inner plugin waits for the end of the launch when a donated one is destroyed. What a
//! deferred launch is to get is deleted to everybody else (`launch/donation.rs`).

use pjrt_sys::*;

use crate::clients;
use crate::error::Error;
use crate::inner::handles::{
    BufferHandle, ClientHandle, EventHandle, FromRaw, Handle, HostArray, Owned, with_references,
};
use crate::inner::{api, on_gpu};
use crate::launch::{completion, donation, executables, keep_alive};
use crate::pjrt::entry::entry;

/// Refuses a device or memory of another rank; has the inner client of one that is not that of the
/// first of this rank's devices.
fn check_local<T>(function: &str, target: *const T) -> Result<Option<ClientHandle>, Error> {
    let address = target as usize;
    let Some((client, owner)) = (!target.is_null())
        .then(|| clients::owner(address))
        .flatten()
    else {
        return Ok(None);
    };
    match client.home_of(address) {
        Some(home) => Ok((home.client != client.handle).then_some(home.client)),
        None => Err(Error::invalid(format!(
            "{function} on rank {}: the target device belongs to rank {}, and data cannot be \
             placed there from here; use jax.local_devices(), or send it with mpi_cuda.send",
            client.rank,
            client.devices.rank_of(owner)
        ))),
    }
}

/// Entries that check some members of the arguments, then pass the call on, to the inner client of
/// the device or memory.
macro_rules! guarded {
    ($($name:ident = $function:ident($Args:ident: $($member:ident),+);)+) => {entry! {$(
        #[doc = concat!("`", stringify!($function), "`")]
        pub fn $name(args: $Args) {
            let given = args.client;
            $(
                if let Some(other) = check_local(stringify!($function), args.$member)? {
                    // SAFETY: a live client, of the device or the memory.
                    unsafe { args.members() }.client = other.raw();
                }
            )+
            let done = args.pass_on(api().$function);
            // SAFETY: as it was.
            unsafe { args.members() }.client = given;
            done
        }
    )+}};
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
}

/// Entries that refuse a buffer which has been deleted or donated, then pass the call on.
macro_rules! uses {
    ($($name:ident = $function:ident($Args:ident: $buffer:ident $(, to $member:ident)?);)+) => {
        entry! {$(
            #[doc = concat!("`", stringify!($function), "`")]
            pub fn $name(args: $Args, $buffer: BufferHandle) {
                $(check_local(stringify!($function), args.$member)?;)?
                donation::refuse_use(stringify!($function), $buffer)?;
                args.pass_on(api().$function)
            }
        )+}
    };
}

uses! {
    copy_to_device = PJRT_Buffer_CopyToDevice(
        PJRT_Buffer_CopyToDevice_Args: buffer, to dst_device);
    copy_to_memory = PJRT_Buffer_CopyToMemory(
        PJRT_Buffer_CopyToMemory_Args: buffer, to dst_memory);
    to_host_buffer = PJRT_Buffer_ToHostBuffer(
        PJRT_Buffer_ToHostBuffer_Args: src);
    copy_raw_to_host = PJRT_Buffer_CopyRawToHost(
        PJRT_Buffer_CopyRawToHost_Args: buffer);
}

/// Entries that tell where a buffer lies, once it lies there: the inner plugin of a GPU ends the
/// process if it is asked while the launch that makes the buffer has only been dispatched.
macro_rules! places {
    ($($name:ident = $function:ident($Args:ident);)+) => {entry! {$(
        #[doc = concat!("`", stringify!($function), "`")]
        pub fn $name(args: $Args, buffer: BufferHandle) {
            donation::refuse_use(stringify!($function), buffer)?;
            if on_gpu() {
                buffer.wait_ready()?;
            }
            args.pass_on(api().$function)
        }
    )+}};
}

places! {
    unsafe_pointer = PJRT_Buffer_UnsafePointer(PJRT_Buffer_UnsafePointer_Args);
    device_pointer = PJRT_Buffer_OpaqueDeviceMemoryDataPointer(
        PJRT_Buffer_OpaqueDeviceMemoryDataPointer_Args);
}

entry! {
    /// `PJRT_Buffer_Destroy`
    pub fn destroy(args: PJRT_Buffer_Destroy_Args, buffer: BufferHandle) {
        // SAFETY: the framework gives it up, and does not use it any more.
        let given_up = unsafe { Owned::taken(buffer) };
        let Some(unused) = keep_alive::postpone_destroy(given_up) else {
            return Ok(());
        };
        unused.release();
        args.pass_on(api().PJRT_Buffer_Destroy)
    }

    /// `PJRT_Buffer_Delete`
    pub fn delete(args: PJRT_Buffer_Delete_Args, buffer: BufferHandle) {
        if keep_alive::postpone_delete(buffer) {
            return Ok(());
        }
        args.pass_on(api().PJRT_Buffer_Delete)
    }

    /// `PJRT_Buffer_IsDeleted`
    pub fn is_deleted(args: PJRT_Buffer_IsDeleted_Args, buffer: BufferHandle) {
        if keep_alive::is_deleted(buffer) {
            // SAFETY: an answer for the framework.
            unsafe { args.members() }.is_deleted = true;
            return Ok(());
        }
        args.pass_on(api().PJRT_Buffer_IsDeleted)
    }

    /// `PJRT_Buffer_ReadyEvent`: of a deleted or donated buffer an event with that error, since
    /// clients in C++ end the process if there is none.
    pub fn ready_event(args: PJRT_Buffer_ReadyEvent_Args, buffer: BufferHandle) {
        if keep_alive::is_deleted(buffer) {
            let event = event_of_deleted(buffer)?.release().raw();
            // SAFETY: the framework gets the event.
            unsafe { args.members() }.event = event;
            return Ok(());
        }
        args.pass_on(api().PJRT_Buffer_ReadyEvent)?;
        if executables::have_callbacks_beside_operations()
            && (buffer.is_token() || buffer.is_empty_of_booleans())
        {
            // JAX looks at these, and no user does.
            // SAFETY: the inner plugin has filled it in, with an event of its own.
            let event = unsafe { EventHandle::from_raw(args.members().event) };
            completion::watch(event?);
        }
        Ok(())
    }

    /// `PJRT_Buffer_IncreaseExternalReferenceCount`
    pub fn add_reference(
        args: PJRT_Buffer_IncreaseExternalReferenceCount_Args, buffer: BufferHandle
    ) {
        donation::refuse_use("PJRT_Buffer_IncreaseExternalReferenceCount", buffer)?;
        with_references(buffer, || {
            args.pass_on(api().PJRT_Buffer_IncreaseExternalReferenceCount)
        })?;
        donation::reference_added(buffer);
        Ok(())
    }

    /// `PJRT_Buffer_DecreaseExternalReferenceCount`
    pub fn remove_reference(
        args: PJRT_Buffer_DecreaseExternalReferenceCount_Args, buffer: BufferHandle
    ) {
        donation::reference_removed(buffer);
        with_references(buffer, || {
            args.pass_on(api().PJRT_Buffer_DecreaseExternalReferenceCount)
        })
    }
}

/// The event that the inner plugin gives for a buffer like `buffer` which is deleted.
fn event_of_deleted(buffer: BufferHandle) -> Result<Owned<EventHandle>, Error> {
    let device = buffer.device()?;
    let home = clients::owner(device.address())
        .and_then(|(client, _)| client.home_of(device.address()))
        .ok_or_else(|| Error::internal("a buffer is on a device of no client"))?;
    let nothing = HostArray {
        element_type: PJRT_Buffer_Type_PRED,
        dims: &[0],
        data: &[0],
    };
    let deleted = home.client.copy_from_host(device, &nothing)?;
    deleted.get().delete();
    deleted.get().ready_event()
}
