//! Buffers that the framework gets before the launch that fills them: alias buffers of the inner
//! plugin (`pjrt_c_api.h`, `PJRT_Client_CreateAliasBuffer`).

use std::ffi::c_void;

use pjrt_sys::*;

use crate::boundary;
use crate::config::Device;
use crate::error::Error;
use crate::inner::call::{call, new_args};
use crate::inner::handles::{Owned, destroy_event};
use crate::pjrt::buffer::{self, KeptBuffer};
use crate::plugin::plugin;

/// What an alias buffer will be like.
#[derive(Clone)]
pub struct AliasShape {
    /// Where.
    pub memory: *mut PJRT_Memory,
    /// Of what.
    pub element_type: PJRT_Buffer_Type,
    /// How many.
    pub dims: Vec<i64>,
    /// The order of its dimensions, the fastest varying first; empty if it is row-major.
    pub order: Vec<i64>,
}

/// An alias buffer; it is kept until it is fulfilled, whatever the framework does with it.
pub struct AliasBuffer {
    client: *mut PJRT_Client,
    callback: *mut PJRT_FulfillAliasBufferCallback,
    buffer: KeptBuffer,
}

// SAFETY: handles of the inner plugin, which is thread-safe.
unsafe impl Send for AliasBuffer {}

impl AliasBuffer {
    /// The buffer, for the framework, and the alias to fill it.
    pub fn new(
        client: *mut PJRT_Client,
        shape: &AliasShape,
    ) -> Result<(*mut PJRT_Buffer, AliasBuffer), Error> {
        let mut args = new_args::<PJRT_Client_CreateAliasBuffer_Args>();
        args.client = client;
        args.memory = shape.memory;
        args.shape_element_type = shape.element_type;
        args.shape_dims = shape.dims.as_ptr();
        args.shape_num_dims = shape.dims.len();
        // XLA:GPU knows no layout where none is given.
        let row_major: Vec<i64> = (0..shape.dims.len() as i64).rev().collect();
        let order = match shape.order.is_empty() {
            true => &row_major,
            false => &shape.order,
        };
        let mut tiled = new_args::<PJRT_Buffer_MemoryLayout_Tiled>();
        tiled.minor_to_major = order.as_ptr();
        tiled.minor_to_major_size = order.len();
        let mut layout = new_args::<PJRT_Buffer_MemoryLayout>();
        layout.type_ = PJRT_Buffer_MemoryLayout_Type_Tiled;
        layout.__bindgen_anon_1.tiled = tiled;
        args.shape_layout = &mut layout;
        // SAFETY: live handles, and dimensions and a layout that outlive the call.
        unsafe {
            call(
                plugin().inner.api().PJRT_Client_CreateAliasBuffer,
                &mut args,
            )
        }?;
        let alias = AliasBuffer {
            client,
            callback: args.fulfill_alias_buffer_cb,
            buffer: buffer::keep(args.alias_buffer),
        };
        Ok((args.alias_buffer, alias))
    }

    /// The alias buffer becomes `buffer`, which need not be ready.
    pub fn fulfil(self, buffer: Owned) {
        // A result of XLA:GPU that fails has no memory, which the inner plugin would follow.
        if plugin().inner.device == Device::Cuda {
            self.fulfil_when_ready(buffer);
        } else {
            self.fulfil_now(buffer);
        }
    }

    fn fulfil_now(mut self, buffer: Owned) {
        let mut args = new_args::<PJRT_Client_FulfillAliasBuffer_Args>();
        args.buffer = buffer.0;
        self.settle(args);
    }

    fn fulfil_when_ready(self, buffer: Owned) {
        let event = match ready_event(buffer.0) {
            Ok(event) => event,
            Err(error) => return self.fail(&error.into_text()),
        };
        let mut ready = new_args::<PJRT_Event_OnReady_Args>();
        ready.event = event;
        ready.callback = Some(is_ready);
        let waiting = Box::into_raw(Box::new(Waiting {
            alias: self,
            buffer,
            event,
        }));
        ready.user_arg = waiting.cast();
        // SAFETY: a live event; the callback takes `Waiting` over, and is not called if that fails.
        if let Err(error) = unsafe { call(plugin().inner.api().PJRT_Event_OnReady, &mut ready) } {
            // SAFETY: made above.
            let waiting = *unsafe { Box::from_raw(waiting) };
            waiting.alias.fail(&error.into_text());
            destroy_event(event);
        }
    }

    /// Whoever waits for the alias buffer gets this error.
    pub fn fail(mut self, message: &str) {
        self.settle_with(message);
    }

    fn settle_with(&mut self, message: &str) {
        let mut args = new_args::<PJRT_Client_FulfillAliasBuffer_Args>();
        args.status_code = PJRT_Error_Code_INTERNAL;
        args.error_message = message.as_ptr().cast();
        args.error_message_size = message.len();
        self.settle(args);
    }

    fn settle(&mut self, mut args: PJRT_Client_FulfillAliasBuffer_Args) {
        args.client = self.client;
        args.fulfill_alias_buffer_cb = std::mem::replace(&mut self.callback, std::ptr::null_mut());
        // SAFETY: the callback is used once. If that fails (as it says for every error passed on),
        // the alias buffer carries the error.
        let _ = unsafe {
            call(
                plugin().inner.api().PJRT_Client_FulfillAliasBuffer,
                &mut args,
            )
        };
    }

    /// An event that the framework owns, ready when the alias buffer is.
    fn ready_event(&self) -> Result<*mut PJRT_Event, Error> {
        ready_event(self.buffer.handle())
    }
}

/// An event, the caller's, ready when the live `buffer` is.
fn ready_event(buffer: *mut PJRT_Buffer) -> Result<*mut PJRT_Event, Error> {
    let mut ready = new_args::<PJRT_Buffer_ReadyEvent_Args>();
    ready.buffer = buffer;
    // SAFETY: as the caller promises.
    unsafe { call(plugin().inner.api().PJRT_Buffer_ReadyEvent, &mut ready) }?;
    Ok(ready.event)
}

/// A alias that is fulfilled once the buffer is ready.
struct Waiting {
    alias: AliasBuffer,
    buffer: Owned,
    event: *mut PJRT_Event,
}

unsafe extern "C" fn is_ready(error: *mut PJRT_Error, waiting: *mut c_void) {
    boundary::quiet((), || {
        // SAFETY: made by `fulfil_when_ready`; called once.
        let Waiting {
            alias,
            buffer,
            event,
        } = *unsafe { Box::from_raw(waiting.cast::<Waiting>()) };
        // The callback owns the error (`pjrt_c_api.h`, PJRT_Event_OnReadyCallback).
        match (!error.is_null()).then_some(Error::Inner(error)) {
            Some(error) => alias.fail(&error.into_text()),
            None => alias.fulfil_now(buffer),
        }
        destroy_event(event);
    });
}

impl Drop for AliasBuffer {
    fn drop(&mut self) {
        if !self.callback.is_null() {
            self.settle_with("mpi_cuda: the launch that computes this was given up");
        }
    }
}

/// The end of a launch, as an empty alias buffer: PJRT has no events of ours, and the inner
/// plugin no alias of a token.
pub struct End {
    alias: AliasBuffer,
    device: *mut PJRT_Device,
}

// SAFETY: as above.
unsafe impl Send for End {}

const EMPTY: [i64; 1] = [0];

impl End {
    /// The empty buffer, for the framework, and the alias of it.
    pub fn new(
        client: *mut PJRT_Client,
        device: *mut PJRT_Device,
        memory: *mut PJRT_Memory,
    ) -> Result<(*mut PJRT_Buffer, End), Error> {
        let shape = AliasShape {
            memory,
            element_type: PJRT_Buffer_Type_PRED,
            dims: EMPTY.to_vec(),
            order: Vec::new(),
        };
        let (buffer, alias) = AliasBuffer::new(client, &shape)?;
        Ok((buffer, End { alias, device }))
    }

    /// An event that the framework owns.
    pub fn event(&self) -> Result<*mut PJRT_Event, Error> {
        self.alias.ready_event()
    }

    /// The launch has ended.
    pub fn reach(self, error: Option<&str>) {
        if let Some(error) = error {
            return self.alias.fail(error);
        }
        static NOTHING: u8 = 0;
        let mut args = new_args::<PJRT_Client_BufferFromHostBuffer_Args>();
        args.client = self.alias.client;
        args.data = (&raw const NOTHING).cast();
        args.type_ = PJRT_Buffer_Type_PRED;
        args.dims = EMPTY.as_ptr();
        args.num_dims = EMPTY.len();
        args.host_buffer_semantics = PJRT_HostBufferSemantics_kImmutableOnlyDuringCall;
        args.device = self.device;
        let api = plugin().inner.api();
        // SAFETY: valid arguments; what they point to is static.
        match unsafe { call(api.PJRT_Client_BufferFromHostBuffer, &mut args) } {
            Ok(()) => {
                destroy_event(args.done_with_host_buffer);
                self.alias.fulfil(Owned(args.buffer));
            }
            Err(error) => self.alias.fail(&error.to_string()),
        }
    }
}
