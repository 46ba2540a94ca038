//! Buffers: their content, views of it, and buffers that are filled later.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::Mutex;
use pjrt_sys::*;

use super::handle::{
    BufferHandle, ClientHandle, DeviceHandle, EventHandle, FromRaw, Handle, MemoryHandle, Owned,
};
use crate::boundary;
use crate::error::Error;
use crate::inner::call::{new_args, slice};

impl BufferHandle {
    /// An event that happens when the buffer has its content.
    pub fn ready_event(self) -> Result<Owned<EventHandle>, Error> {
        let args = ask!(PJRT_Buffer_ReadyEvent { buffer: self.raw() })?;
        // SAFETY: the event is the caller's to destroy.
        unsafe { Owned::new(args.event) }
    }

    /// Waits until it has its content.
    pub fn wait_ready(self) -> Result<(), Error> {
        self.ready_event()?.get().wait()
    }

    /// Whether it has its content.
    pub fn has_content(self) -> bool {
        self.ready_event()
            .is_ok_and(|event| event.get().has_succeeded())
    }

    /// The error that it has in place of content, if that is known by now.
    pub fn failure(self) -> Option<Error> {
        match self.ready_event() {
            Ok(event) => event.get().failure(),
            Err(error) => Some(error),
        }
    }

    /// The device that it is on.
    pub fn device(self) -> Result<DeviceHandle, Error> {
        let args = ask!(PJRT_Buffer_Device { buffer: self.raw() })?;
        // SAFETY: the device lives as long as its client.
        unsafe { DeviceHandle::from_raw(args.device) }
    }

    /// Whether it is a token, which has neither layout nor memory.
    pub fn is_token(self) -> bool {
        ask!(PJRT_Buffer_ElementType { buffer: self.raw() })
            .is_ok_and(|args| args.type_ == PJRT_Buffer_Type_TOKEN)
    }

    /// Whether it is empty and of booleans, as what JAX passes from program to program for a token.
    pub fn is_empty_of_booleans(self) -> bool {
        let is_boolean = ask!(PJRT_Buffer_ElementType { buffer: self.raw() })
            .is_ok_and(|args| args.type_ == PJRT_Buffer_Type_PRED);
        is_boolean
            && ask!(PJRT_Buffer_Dimensions { buffer: self.raw() }).is_ok_and(|args| {
                // SAFETY: the buffer owns that many dimensions.
                args.num_dims == 1 && unsafe { *args.dims } == 0
            })
    }

    /// Deletes the content, and keeps the handle.
    pub fn delete(self) {
        // A failure would leave nothing to do.
        let _ = ask!(PJRT_Buffer_Delete { buffer: self.raw() });
    }

    /// The same memory, which must be ready, on a device of another client. `backing` is dropped
    /// when the view is gone.
    pub fn view_on(
        self,
        client: ClientHandle,
        device: DeviceHandle,
        backing: Option<Owned<BufferHandle>>,
    ) -> Result<Owned<BufferHandle>, Error> {
        let kept = backing.map_or(std::ptr::null_mut(), |backing| {
            Box::into_raw(Box::new(backing))
        });
        self.create_view(client, device, kept.cast())
            .inspect_err(|_| {
                // SAFETY: made above; no view refers to it.
                unsafe { release(std::ptr::null_mut(), kept.cast()) };
            })
    }

    /// `kept` is for [`release`], once the view is gone.
    fn create_view(
        self,
        client: ClientHandle,
        device: DeviceHandle,
        kept: *mut c_void,
    ) -> Result<Owned<BufferHandle>, Error> {
        // What is read from the buffer lives as long as it, and its memory until `release`.
        let element = ask!(PJRT_Buffer_ElementType { buffer: self.raw() })?;
        let dims = ask!(PJRT_Buffer_Dimensions { buffer: self.raw() })?;
        let memory = ask!(PJRT_Buffer_OpaqueDeviceMemoryDataPointer { buffer: self.raw() })?;
        // Row-major is what no layout means. Newer plugins refuse to be told it for types of less
        // than 8 bits, since that does not say that the elements are packed.
        let mut layout = ask!(PJRT_Buffer_GetMemoryLayout { buffer: self.raw() })
            .ok()
            .filter(|args| !is_row_major(&args.layout));
        let view = ask!(PJRT_Client_CreateViewOfDeviceBuffer {
            client: client.raw(),
            device: device.raw(),
            device_buffer_ptr: memory.device_memory_ptr,
            dims: dims.dims,
            num_dims: dims.num_dims,
            element_type: element.type_,
            layout: layout
                .as_mut()
                .map_or(std::ptr::null_mut(), |args| &mut args.layout),
            // The inner plugin calls it even if it is null.
            on_delete_callback: Some(release),
            on_delete_callback_arg: kept,
        })?;
        // SAFETY: the view is the caller's.
        unsafe { Owned::new(view.buffer) }
    }
}

unsafe extern "C" fn release(_: *mut c_void, backing: *mut c_void) {
    boundary::quiet((), || {
        if !backing.is_null() {
            // SAFETY: made by `view_on`; called once, when the view is gone.
            drop(unsafe { Box::from_raw(backing.cast::<Owned<BufferHandle>>()) });
        }
    });
}

/// Keeps the memory of a buffer while somebody may delete its content.
pub struct ExternalReference(BufferHandle);

impl ExternalReference {
    /// None if the inner plugin cannot do that. The buffer must outlive it.
    pub fn new(buffer: BufferHandle) -> Option<ExternalReference> {
        let added = with_references(buffer, || {
            ask!(PJRT_Buffer_IncreaseExternalReferenceCount {
                buffer: buffer.raw()
            })
        });
        added.ok().map(|_| ExternalReference(buffer))
    }
}

/// Adds or removes an external reference of a buffer while nobody else does: the inner plugin keeps
/// them in a list without a lock, and threads of ours do it beside those of the framework. Each
/// buffer has a lock of its own, since adding one waits for the content.
pub fn with_references<R>(buffer: BufferHandle, change: impl FnOnce() -> R) -> R {
    let lock = REFERENCE_LOCKS
        .lock()
        .get_or_insert_default()
        .entry(buffer.address())
        .or_default()
        .clone();
    let held = lock.lock();
    let result = change();
    drop(held);
    let mut locks = REFERENCE_LOCKS.lock();
    drop(lock);
    if let Some(locks) = locks.as_mut()
        && let Entry::Occupied(found) = locks.entry(buffer.address())
        && Arc::strong_count(found.get()) == 1
    {
        found.remove();
    }
    result
}

/// Of the buffers whose references change at this moment, by address.
static REFERENCE_LOCKS: Mutex<Option<HashMap<usize, Arc<Mutex<()>>>>> = Mutex::new(None);

impl Drop for ExternalReference {
    fn drop(&mut self) {
        // A failure would leave nothing to do.
        let _ = with_references(self.0, || {
            ask!(PJRT_Buffer_DecreaseExternalReferenceCount {
                buffer: self.0.raw()
            })
        });
    }
}

/// What a buffer will be like.
#[derive(Clone)]
pub struct BufferShape {
    /// Where.
    pub memory: MemoryHandle,
    /// Of what.
    pub element_type: PJRT_Buffer_Type,
    /// How many.
    pub dims: Vec<i64>,
    /// The order of its dimensions, the fastest varying first; empty if it is row-major.
    pub order: Vec<i64>,
}

/// Fills an alias buffer (`pjrt_c_api.h`, `PJRT_Client_FulfillAliasBuffer`), once.
pub struct AliasFiller {
    client: ClientHandle,
    callback: NonNull<PJRT_FulfillAliasBufferCallback>,
}

// SAFETY: handles of the inner plugin, which is thread-safe.
unsafe impl Send for AliasFiller {}

impl ClientHandle {
    /// A buffer whose content comes later, and what fills it.
    pub fn create_alias_buffer(
        self,
        shape: &BufferShape,
    ) -> Result<(Owned<BufferHandle>, AliasFiller), Error> {
        let order = shape.order();
        let mut layout = tiled_layout(&order);
        let args = ask!(PJRT_Client_CreateAliasBuffer {
            client: self.raw(),
            memory: shape.memory.raw(),
            shape_element_type: shape.element_type,
            shape_dims: shape.dims.as_ptr(),
            shape_num_dims: shape.dims.len(),
            shape_layout: &mut layout,
        })?;
        // SAFETY: the buffer is the caller's.
        let buffer = unsafe { Owned::new(args.alias_buffer) }?;
        let callback = NonNull::new(args.fulfill_alias_buffer_cb)
            .ok_or_else(|| Error::internal("an alias buffer that nobody can fill"))?;
        let client = self;
        Ok((buffer, AliasFiller { client, callback }))
    }

    /// A buffer with memory whose content is the error.
    pub fn create_failed_buffer(
        self,
        shape: &BufferShape,
        message: &str,
    ) -> Result<Owned<BufferHandle>, Error> {
        let order = shape.order();
        let mut layout = tiled_layout(&order);
        let mut layouts = [&raw mut layout];
        let mut spec = new_args::<PJRT_ShapeSpec>();
        spec.dims = shape.dims.as_ptr();
        spec.num_dims = shape.dims.len();
        spec.element_type = shape.element_type;
        let transfer = ask!(PJRT_Client_CreateBuffersForAsyncHostToDevice {
            client: self.raw(),
            shape_specs: &mut spec,
            num_shape_specs: 1,
            device_layouts: layouts.as_mut_ptr(),
            num_device_layouts: 1,
            memory: shape.memory.raw(),
        })?
        .transfer_manager;
        let made = ask!(PJRT_AsyncHostToDeviceTransferManager_RetrieveBuffer {
            transfer_manager: transfer,
            buffer_index: 0,
        });
        let failed = ask!(PJRT_AsyncHostToDeviceTransferManager_SetBufferError {
            transfer_manager: transfer,
            buffer_index: 0,
            error_code: PJRT_Error_Code_INTERNAL,
            error_message: message.as_ptr().cast(),
            error_message_size: message.len(),
        });
        // Nobody else has it.
        let _ = ask!(PJRT_AsyncHostToDeviceTransferManager_Destroy {
            transfer_manager: transfer,
        });
        // SAFETY: the buffer is the caller's.
        let buffer = unsafe { Owned::new(made?.buffer_out) }?;
        failed.map(|_| buffer)
    }
}

impl BufferShape {
    /// The order of its dimensions, also of one that is row-major: XLA:GPU knows no layout where
    /// none is given.
    fn order(&self) -> Vec<i64> {
        match self.order.is_empty() {
            true => (0..self.dims.len() as i64).rev().collect(),
            false => self.order.clone(),
        }
    }
}

/// The layout with dimensions in that order, to which it points.
fn tiled_layout(order: &[i64]) -> PJRT_Buffer_MemoryLayout {
    let mut tiled = new_args::<PJRT_Buffer_MemoryLayout_Tiled>();
    tiled.minor_to_major = order.as_ptr();
    tiled.minor_to_major_size = order.len();
    let mut layout = new_args::<PJRT_Buffer_MemoryLayout>();
    layout.type_ = PJRT_Buffer_MemoryLayout_Type_Tiled;
    layout.__bindgen_anon_1.tiled = tiled;
    layout
}

fn is_row_major(layout: &PJRT_Buffer_MemoryLayout) -> bool {
    if layout.type_ != PJRT_Buffer_MemoryLayout_Type_Tiled {
        return false;
    }
    // SAFETY: the type says which of the two it is, and the inner plugin's arrays are as long as it
    // says.
    let (tiled, order) = unsafe {
        let tiled = layout.__bindgen_anon_1.tiled;
        (
            tiled,
            slice(tiled.minor_to_major, tiled.minor_to_major_size),
        )
    };
    tiled.num_tiles == 0 && order.iter().rev().copied().eq(0..order.len() as i64)
}

impl AliasFiller {
    /// The alias buffer becomes the buffer, which need not be ready, or carries the error.
    pub fn fill(self, content: Result<BufferHandle, &str>) {
        let (buffer, code, message) = match content {
            Ok(buffer) => (buffer.raw(), 0, ""),
            Err(message) => (std::ptr::null_mut(), PJRT_Error_Code_INTERNAL, message),
        };
        // The callback is used once. If that fails (as it says for every error passed on), the
        // alias buffer carries the error.
        let _ = ask!(PJRT_Client_FulfillAliasBuffer {
            client: self.client.raw(),
            fulfill_alias_buffer_cb: self.callback.as_ptr(),
            buffer: buffer,
            status_code: code,
            error_message: message.as_ptr().cast(),
            error_message_size: message.len(),
        });
    }
}
