//! Launches for which the inner plugin has no slot (`inflight_limit.rs`): the framework gets alias buffers as results at
//! once, and a thread of ours launches them in order. That thread may wait for peers.

use std::collections::{HashMap, VecDeque};

use parking_lot::{Condvar, Mutex};
use pjrt_sys::*;

use crate::boundary;
use crate::error::Error;
use crate::inner::call::{bytes, call, new_args, slice};
use crate::inner::handles::{Owned, with_executable};
use crate::inner::layouts;
use crate::launch;
use crate::launch::alias_buffer::{AliasBuffer, AliasShape, End};
use crate::launch::execute_options::Options;
use crate::launch::inflight_limit;
use crate::pjrt::buffer;
use crate::pjrt::client;
use crate::plugin::plugin;

/// What promising the results of an executable takes.
#[derive(Clone)]
struct OutputSpec {
    client: *mut PJRT_Client,
    device: *mut PJRT_Device,
    memory: *mut PJRT_Memory,
    /// `None` for a token.
    outputs: Vec<Option<AliasShape>>,
}

// SAFETY: handles of the inner plugin, which is thread-safe.
unsafe impl Send for OutputSpec {}

/// By executable; `None` if its results cannot be alias buffers.
static OUTPUT_SPECS: Mutex<Option<HashMap<usize, Option<OutputSpec>>>> = Mutex::new(None);

/// Runs a launch whose time has come, with its arguments and what is to be told of its end.
type Run =
    Box<dyn FnOnce(&mut PJRT_LoadedExecutable_Execute_Args, Vec<End>) -> Result<(), Error> + Send>;

struct Launch {
    executable: launch::KeptExecutable,
    execute_device: *mut PJRT_Device,
    options: Options,
    inputs: Vec<*mut PJRT_Buffer>,
    /// `None` for a token, which is one of the `ends`.
    outputs: Vec<Option<AliasBuffer>>,
    ends: Vec<End>,
    run: Run,
    #[expect(dead_code, reason = "held for its drop")]
    counted: inflight_limit::Deferred,
}

// SAFETY: handles of the inner plugin, which is thread-safe.
unsafe impl Send for Launch {}

static QUEUE: Mutex<VecDeque<Launch>> = Mutex::new(VecDeque::new());
static PUSHED: Condvar = Condvar::new();

/// Whether a launch can be deferred.
///
/// # Safety
/// The arguments must be valid.
pub unsafe fn is_possible(args: &PJRT_LoadedExecutable_Execute_Args) -> bool {
    // SAFETY: as the caller promises.
    let options = unsafe { &*args.options };
    options.num_send_ops == 0
        && options.num_recv_ops == 0
        && options.num_tasks == 0
        && output_spec(args.executable).is_some()
}

/// Puts a launch at the end of the queue: `run` gets arguments like `args` when its time has come.
///
/// # Safety
/// The arguments must be valid, and [`is_possible`] for them; the inputs must be held until `run` has
/// been called.
pub unsafe fn defer(
    args: &PJRT_LoadedExecutable_Execute_Args,
    run: impl FnOnce(&mut PJRT_LoadedExecutable_Execute_Args, Vec<End>) -> Result<(), Error>
    + Send
    + 'static,
) -> Result<(), Error> {
    let Some(output_spec) = output_spec(args.executable) else {
        return Err(Error::internal("a launch was deferred that cannot be"));
    };
    start_thread()?;
    let mut promised = AliasResults::default();
    let event = match promised.make(&output_spec, !args.device_complete_events.is_null()) {
        Ok(event) => event,
        Err(error) => {
            promised.results.into_iter().for_each(buffer::give_up);
            return Err(error);
        }
    };
    // SAFETY: as the caller promises; there is one device, and the lists have room for its event
    // and every output.
    let launch = unsafe {
        for (index, result) in promised.results.into_iter().enumerate() {
            (*args.output_lists).add(index).write(result);
        }
        if let Some(event) = event {
            args.device_complete_events.write(event);
        }
        Launch {
            executable: launch::keep(args.executable),
            execute_device: args.execute_device,
            options: Options::copy(args.options),
            inputs: slice(*args.argument_lists, args.num_args).to_vec(),
            outputs: promised.outputs,
            ends: promised.ends,
            run: Box::new(run),
            counted: inflight_limit::Deferred::new(),
        }
    };
    QUEUE.lock().push_back(launch);
    PUSHED.notify_one();
    Ok(())
}

/// Results and their alias buffers, one after the other.
#[derive(Default)]
struct AliasResults {
    results: Vec<*mut PJRT_Buffer>,
    outputs: Vec<Option<AliasBuffer>>,
    ends: Vec<End>,
}

impl AliasResults {
    /// Promises the results and, if asked, the event of the end.
    fn make(
        &mut self,
        output_spec: &OutputSpec,
        with_event: bool,
    ) -> Result<Option<*mut PJRT_Event>, Error> {
        let end = || End::new(output_spec.client, output_spec.device, output_spec.memory);
        for shape in &output_spec.outputs {
            if let Some(shape) = shape {
                let (result, alias) = AliasBuffer::new(output_spec.client, shape)?;
                self.results.push(result);
                self.outputs.push(Some(alias));
            } else {
                let (result, end) = end()?;
                self.results.push(result);
                self.outputs.push(None);
                self.ends.push(end);
            }
        }
        if !with_event {
            return Ok(None);
        }
        let (buffer, end) = end()?;
        let event = end.event();
        // Only the event is of use; the alias keeps the buffer.
        buffer::give_up(buffer);
        self.ends.push(end);
        event.map(Some)
    }
}

/// The framework destroys an executable.
pub fn forget(executable: *const PJRT_LoadedExecutable) {
    if let Some(specs) = OUTPUT_SPECS.lock().as_mut() {
        specs.remove(&(executable as usize));
    }
}

fn start_thread() -> Result<(), Error> {
    static STARTED: Mutex<bool> = Mutex::new(false);
    let mut started = STARTED.lock();
    if !*started {
        std::thread::Builder::new()
            .name("mpi_cuda launch".into())
            .spawn(work)
            .map_err(|error| Error::internal(format!("cannot start a thread: {error}")))?;
        *started = true;
    }
    Ok(())
}

fn work() {
    loop {
        let launch = {
            let mut queue = QUEUE.lock();
            loop {
                match queue.pop_front() {
                    Some(launch) => break launch,
                    None => PUSHED.wait(&mut queue),
                }
            }
        };
        boundary::quiet((), || launch.start());
    }
}

impl Launch {
    fn start(mut self) {
        let mut outputs = vec![std::ptr::null_mut::<PJRT_Buffer>(); self.outputs.len()];
        let (argument_lists, output_lists) = ([self.inputs.as_ptr()], [outputs.as_mut_ptr()]);
        let mut args = new_args::<PJRT_LoadedExecutable_Execute_Args>();
        args.executable = self.executable.handle();
        args.options = self.options.get();
        args.argument_lists = argument_lists.as_ptr();
        args.num_devices = 1;
        args.num_args = self.inputs.len();
        args.output_lists = output_lists.as_ptr();
        args.execute_device = self.execute_device;
        let result = (self.run)(&mut args, self.ends);
        let text = result.as_ref().err().map(Error::to_string);
        for (alias, output) in self.outputs.into_iter().zip(outputs) {
            match (alias, &text) {
                (Some(alias), None) => alias.fulfil(Owned(output)),
                (Some(alias), Some(error)) => alias.fail(error),
                (None, _) => drop(Owned(output)),
            }
        }
        if let Err(error) = result {
            error.discard();
        }
    }
}

/// What promising the results of `executable` takes; `None` if that cannot be.
fn output_spec(executable: *mut PJRT_LoadedExecutable) -> Option<OutputSpec> {
    let mut known = OUTPUT_SPECS.lock();
    known
        .get_or_insert_with(HashMap::new)
        .entry(executable as usize)
        .or_insert_with(|| {
            // SAFETY: the framework launches it, so it is live.
            let found = unsafe { look_at(executable) };
            found.map_err(Error::discard).ok().flatten()
        })
        .clone()
}

/// # Safety
/// `loaded` must be live.
unsafe fn look_at(loaded: *mut PJRT_LoadedExecutable) -> Result<Option<OutputSpec>, Error> {
    let (client, device) = client::of_executable(loaded)?;
    // SAFETY: `loaded` is live; the lists of the executable got from it live as long as that.
    unsafe {
        let memory = default_memory(device)?;
        let outputs = with_executable(loaded, |executable| {
            shapes(executable, memory, &client.memories)
        })?;
        Ok(outputs.map(|outputs| OutputSpec {
            client: client.handle,
            device,
            memory,
            outputs,
        }))
    }
}

/// The shapes of the results, or `None` if one of them cannot be alias buffers.
///
/// # Safety
/// `executable` must be live.
unsafe fn shapes(
    executable: *mut PJRT_Executable,
    default: *mut PJRT_Memory,
    memories: &[*mut PJRT_Memory],
) -> Result<Option<Vec<Option<AliasShape>>>, Error> {
    let api = plugin().inner.api();
    let mut types = new_args::<PJRT_Executable_OutputElementTypes_Args>();
    types.executable = executable;
    let mut dims = new_args::<PJRT_Executable_OutputDimensions_Args>();
    dims.executable = executable;
    let mut kinds = new_args::<PJRT_Executable_OutputMemoryKinds_Args>();
    kinds.executable = executable;
    // SAFETY: as the caller promises; the lists live as long as the executable.
    unsafe {
        call(api.PJRT_Executable_OutputElementTypes, &mut types)?;
        call(api.PJRT_Executable_OutputDimensions, &mut dims)?;
        // XLA:CPU has them not: its results are in the default memory.
        let known = call(api.PJRT_Executable_OutputMemoryKinds, &mut kinds).map_err(Error::discard);
        let types = slice(types.output_types, types.num_output_types);
        let ranks = slice(dims.dim_sizes, dims.num_outputs);
        let mut dims = slice(dims.dims, ranks.iter().sum());
        let texts = slice(kinds.memory_kinds, kinds.num_outputs);
        let sizes = slice(kinds.memory_kind_sizes, kinds.num_outputs);
        // XLA:CPU has none for a program with a token.
        let orders = layouts::of_outputs(executable).map_err(Error::discard);
        let mut orders = orders.unwrap_or_default();
        if orders.len() != types.len() {
            orders.clear();
        }
        let mut shapes = Vec::with_capacity(types.len());
        for (index, &element_type) in types.iter().enumerate() {
            let (own, rest) = dims.split_at(ranks[index]);
            dims = rest;
            let memory = match known {
                Ok(()) => {
                    let kind = bytes(texts[index], sizes[index]);
                    memories
                        .iter()
                        .copied()
                        .find(|&memory| is_kind(memory, kind))
                }
                Err(()) => Some(default),
            };
            match memory {
                _ if element_type == PJRT_Buffer_Type_TOKEN => shapes.push(None),
                Some(memory) if can_be_aliased(element_type) => shapes.push(Some(AliasShape {
                    memory,
                    element_type,
                    dims: own.to_vec(),
                    order: orders
                        .get_mut(index)
                        .map(std::mem::take)
                        .unwrap_or_default(),
                })),
                _ => return Ok(None),
            }
        }
        Ok(Some(shapes))
    }
}

/// The memory of a device where results are if nothing else is said.
fn default_memory(device: *mut PJRT_Device) -> Result<*mut PJRT_Memory, Error> {
    let mut args = new_args::<PJRT_Device_DefaultMemory_Args>();
    args.device = device;
    // SAFETY: a live device.
    unsafe { call(plugin().inner.api().PJRT_Device_DefaultMemory, &mut args) }?;
    Ok(args.memory)
}

/// # Safety
/// `memory` must be live.
unsafe fn is_kind(memory: *mut PJRT_Memory, kind: &[u8]) -> bool {
    let mut args = new_args::<PJRT_Memory_Kind_Args>();
    args.memory = memory;
    // SAFETY: as the caller promises; the text lives as long as the memory.
    unsafe {
        call(plugin().inner.api().PJRT_Memory_Kind, &mut args).is_ok()
            && bytes(args.kind, args.kind_size) == kind
    }
}

/// The inner plugin makes alias buffers of whole bytes only: its check of a fulfilled alias
/// compares element sizes that it sets for results and not for alias buffers.
fn can_be_aliased(element_type: PJRT_Buffer_Type) -> bool {
    !matches!(
        element_type,
        PJRT_Buffer_Type_INVALID
            | PJRT_Buffer_Type_TOKEN
            | PJRT_Buffer_Type_S2
            | PJRT_Buffer_Type_U2
            | PJRT_Buffer_Type_S4
            | PJRT_Buffer_Type_U4
            | PJRT_Buffer_Type_F4E2M1FN
    )
}
