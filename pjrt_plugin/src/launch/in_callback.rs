//! Programs that a host callback launches while its own program runs in the background. XLA:CPU would
//! queue them behind that program, which waits for the callback: they run to their end on a spare
//! inner client instead, which has a queue of its own. Buffers are shared, not copied.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use pjrt_sys::*;

use crate::error::Error;
use crate::inner::call::{call, new_args, slice};
use crate::inner::handles::{
    Owned, destroy_event, destroy_loaded, discard, wait, wait_ready, with_executable,
};
use crate::pjrt::client::{self, Client};
use crate::plugin::plugin;

/// Callbacks in callbacks in callbacks; beyond this a program is refused.
const DEEPEST: usize = 8;

/// An inner client that the framework does not know of.
struct Spare {
    client: Client,
    /// Programs with callbacks now running here; what their callbacks launch must go elsewhere.
    busy: AtomicUsize,
    /// The copies loaded here, by the address of the framework's executable.
    loaded: Mutex<HashMap<usize, Loaded>>,
}

#[derive(Clone, Copy)]
struct Loaded(*mut PJRT_LoadedExecutable);

// SAFETY: a handle of the inner plugin, which is thread-safe.
unsafe impl Send for Loaded {}

static SPARES: Mutex<Vec<Arc<Spare>>> = Mutex::new(Vec::new());

/// Runs a program to its end, with results on the framework's own client.
///
/// # Safety
/// The arguments must be valid.
pub unsafe fn execute(
    args: &mut PJRT_LoadedExecutable_Execute_Args,
    with_callbacks: bool,
) -> Result<(), Error> {
    let api = plugin().inner.api();
    let (home, _) = client::of_executable(args.executable)?;
    let spare = choose(&home, with_callbacks)?;
    let _busy = with_callbacks.then(|| Busy(spare.clone()));
    // SAFETY: as the caller promises; there is one device.
    let (inputs, original) = unsafe {
        let inputs = slice(*args.argument_lists, args.num_args);
        (inputs, args.executable)
    };
    let mut in_use = Vec::with_capacity(inputs.len());
    let mut views = Vec::with_capacity(inputs.len());
    for &buffer in inputs {
        wait_ready(buffer)?;
        in_use.extend(InUse::mark(buffer));
        views.push(Owned(view(&spare.client, buffer, None)?));
    }
    let (executable, num_outputs) = spare.load(original)?;
    let mut outputs = vec![std::ptr::null_mut::<PJRT_Buffer>(); num_outputs];
    let arguments: Vec<_> = views.iter().map(|view| view.0).collect();
    let (argument_lists, output_lists) = ([arguments.as_ptr()], [outputs.as_mut_ptr()]);
    let mut event: *mut PJRT_Event = std::ptr::null_mut();
    let mut own = new_args::<PJRT_LoadedExecutable_Execute_Args>();
    own.executable = executable.0;
    own.options = args.options;
    own.argument_lists = argument_lists.as_ptr();
    own.num_devices = 1;
    own.num_args = args.num_args;
    own.output_lists = output_lists.as_ptr();
    own.device_complete_events = &mut event;
    if !args.execute_device.is_null() {
        own.execute_device = spare.client.addressable[0];
    }
    // SAFETY: live handles, lists of the right lengths, and room for one event.
    unsafe { call(api.PJRT_LoadedExecutable_Execute, &mut own) }?;
    let ended = wait(event);
    drop(in_use);
    let outputs: Vec<Owned> = outputs.into_iter().map(Owned).collect();
    if let Err(error) = ended {
        destroy_event(event);
        return Err(error);
    }
    let shared: Result<Vec<Owned>, Error> = outputs
        .into_iter()
        .map(|output| {
            wait_ready(output.0)?;
            let buffer = output.0;
            view(&home, buffer, Some(output)).map(Owned)
        })
        .collect();
    let shared = match shared {
        Ok(shared) => shared,
        Err(error) => {
            destroy_event(event);
            return Err(error);
        }
    };
    for (index, output) in shared.into_iter().enumerate() {
        // SAFETY: the framework's list has room for every output.
        unsafe { (*args.output_lists).add(index).write(output.into_raw()) };
    }
    if args.device_complete_events.is_null() {
        destroy_event(event);
    } else {
        // SAFETY: the framework's list has room for one event.
        unsafe { args.device_complete_events.write(event) };
    }
    Ok(())
}

/// The framework destroys an executable.
pub fn forget(original: *const PJRT_LoadedExecutable) {
    for spare in SPARES.lock().iter() {
        if let Some(copy) = spare.loaded.lock().remove(&(original as usize)) {
            destroy_loaded(copy.0);
        }
    }
}

/// The framework destroys its client.
pub fn destroy_all() {
    for spare in std::mem::take(&mut *SPARES.lock()) {
        for (_, copy) in spare.loaded.lock().drain() {
            destroy_loaded(copy.0);
        }
        discard(plugin().inner.api().PJRT_Client_Destroy, {
            let mut args = new_args::<PJRT_Client_Destroy_Args>();
            args.client = spare.client.handle;
            args
        });
    }
}

/// A spare client in which no program with callbacks runs; counts one there if asked.
fn choose(home: &Client, with_callbacks: bool) -> Result<Arc<Spare>, Error> {
    let mut spares = SPARES.lock();
    let idle = spares
        .iter()
        .find(|spare| spare.busy.load(Ordering::Acquire) == 0);
    let spare = match idle {
        Some(spare) => spare.clone(),
        None if spares.len() == DEEPEST => {
            return Err(Error::unimplemented(format!(
                "mpi_cuda: {DEEPEST} host callbacks, each in a program launched by another, launch \
                 a further JAX program: use numpy in the innermost callback"
            )));
        }
        None => {
            let spare = Arc::new(Spare {
                client: client::create_inner(home.rank, home.size, Vec::new())?,
                busy: AtomicUsize::new(0),
                loaded: Mutex::default(),
            });
            spares.push(spare.clone());
            spare
        }
    };
    if with_callbacks {
        spare.busy.fetch_add(1, Ordering::AcqRel);
    }
    Ok(spare)
}

/// One program with callbacks running on a spare client.
struct Busy(Arc<Spare>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Spare {
    /// The copy of an executable on this client, and the number of its outputs.
    fn load(&self, original: *mut PJRT_LoadedExecutable) -> Result<(Loaded, usize), Error> {
        let api = plugin().inner.api();
        let mut outputs = new_args::<PJRT_Executable_NumOutputs_Args>();
        // SAFETY: the framework's executable is live, and so is the one got from it.
        unsafe {
            with_executable(original, |executable| {
                outputs.executable = executable;
                call(api.PJRT_Executable_NumOutputs, &mut outputs)?;
                let mut loaded = self.loaded.lock();
                if let Some(&copy) = loaded.get(&(original as usize)) {
                    return Ok((copy, outputs.num_outputs));
                }
                let copy = self.load_copy(executable)?;
                loaded.insert(original as usize, copy);
                Ok((copy, outputs.num_outputs))
            })
        }
    }

    /// # Safety
    /// `executable` must be live.
    unsafe fn load_copy(&self, executable: *mut PJRT_Executable) -> Result<Loaded, Error> {
        let api = plugin().inner.api();
        let mut serialized = new_args::<PJRT_Executable_Serialize_Args>();
        serialized.executable = executable;
        // SAFETY: as the caller promises; the bytes live until the deleter is called.
        unsafe {
            call(api.PJRT_Executable_Serialize, &mut serialized)?;
            let mut load = new_args::<PJRT_Executable_DeserializeAndLoad_Args>();
            load.client = self.client.handle;
            load.serialized_executable = serialized.serialized_bytes;
            load.serialized_executable_size = serialized.serialized_bytes_size;
            let result = call(api.PJRT_Executable_DeserializeAndLoad, &mut load);
            if let Some(delete) = serialized.serialized_executable_deleter {
                delete(serialized.serialized_executable);
            }
            result?;
            Ok(Loaded(load.loaded_executable))
        }
    }
}

/// Keeps the memory of a buffer of the framework's, even if somebody deletes the array.
struct InUse(*mut PJRT_Buffer);

impl InUse {
    /// None if the inner plugin cannot do that.
    fn mark(buffer: *mut PJRT_Buffer) -> Option<InUse> {
        let mut args = new_args::<PJRT_Buffer_IncreaseExternalReferenceCount_Args>();
        args.buffer = buffer;
        let increase = plugin()
            .inner
            .api()
            .PJRT_Buffer_IncreaseExternalReferenceCount;
        // SAFETY: a live buffer; the framework's call keeps the handle until it returns.
        unsafe { call(increase, &mut args) }
            .ok()
            .map(|()| InUse(buffer))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let decrease = plugin()
            .inner
            .api()
            .PJRT_Buffer_DecreaseExternalReferenceCount;
        discard(decrease, {
            let mut args = new_args::<PJRT_Buffer_DecreaseExternalReferenceCount_Args>();
            args.buffer = self.0;
            args
        });
    }
}

/// The same memory as `buffer`, which must be ready, on the device of `client`. `backing` is
/// dropped when the view is gone.
fn view(
    client: &Client,
    buffer: *mut PJRT_Buffer,
    backing: Option<Owned>,
) -> Result<*mut PJRT_Buffer, Error> {
    let api = plugin().inner.api();
    let mut element = new_args::<PJRT_Buffer_ElementType_Args>();
    element.buffer = buffer;
    let mut dims = new_args::<PJRT_Buffer_Dimensions_Args>();
    dims.buffer = buffer;
    let mut layout = new_args::<PJRT_Buffer_GetMemoryLayout_Args>();
    layout.buffer = buffer;
    let mut pointer = new_args::<PJRT_Buffer_OpaqueDeviceMemoryDataPointer_Args>();
    pointer.buffer = buffer;
    let mut args = new_args::<PJRT_Client_CreateViewOfDeviceBuffer_Args>();
    // SAFETY: a live buffer, which outlives what is read from it here.
    unsafe {
        call(api.PJRT_Buffer_ElementType, &mut element)?;
        call(api.PJRT_Buffer_Dimensions, &mut dims)?;
        call(api.PJRT_Buffer_OpaqueDeviceMemoryDataPointer, &mut pointer)?;
        if call(api.PJRT_Buffer_GetMemoryLayout, &mut layout).is_ok() {
            args.layout = &mut layout.layout;
        }
    }
    args.client = client.handle;
    args.device_buffer_ptr = pointer.device_memory_ptr;
    args.dims = dims.dims;
    args.num_dims = dims.num_dims;
    args.element_type = element.type_;
    args.device = client.addressable[0];
    // The inner plugin calls it even if it is null.
    args.on_delete_callback = Some(release);
    let kept = backing.map_or(std::ptr::null_mut(), |backing| {
        Box::into_raw(Box::new(backing))
    });
    args.on_delete_callback_arg = kept.cast();
    // SAFETY: valid arguments; the memory lives until the view's callback.
    let result = unsafe { call(api.PJRT_Client_CreateViewOfDeviceBuffer, &mut args) };
    if result.is_err() {
        // SAFETY: made above; no view refers to it.
        unsafe { release(std::ptr::null_mut(), kept.cast()) };
    }
    result.map(|()| args.buffer)
}

unsafe extern "C" fn release(_: *mut c_void, backing: *mut c_void) {
    crate::boundary::quiet((), || {
        if !backing.is_null() {
            // SAFETY: made by `view`; called once, when the view is gone.
            drop(unsafe { Box::from_raw(backing.cast::<Owned>()) });
        }
    });
}
