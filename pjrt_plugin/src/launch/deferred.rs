//! Launches for which the inner plugin has no slot (`inflight_limit.rs`): the framework gets alias
//! buffers as results at once, and a thread of ours launches them in order. That thread may wait
//! for peers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use pjrt_sys::*;

use crate::boundary;
use crate::clients::{self, Client};
use crate::error::Error;
use crate::inner::execute_args::{ExecuteArgs, OwnLaunch};
use crate::inner::execute_options::ExecuteOptions;
use crate::inner::handles::{
    BufferHandle, BufferShape, ClientHandle, DeviceHandle, EventHandle, Handle, LoadedHandle,
    MemoryHandle, Output, Owned,
};
use crate::inner::side_table::SideTable;
use crate::launch::alias_buffer::{AliasBuffer, End};
use crate::launch::keep_alive::{Kept, give_up};
use crate::launch::{donation, inflight_limit, ticket};

/// How long a program that cannot be deferred waits for those that are.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Whether the dispatching thread would wait for a peer, and a thread of ours can do so instead.
/// Call with the order of launches locked.
pub fn is_needed(args: &ExecuteArgs<'_>, launches: usize) -> Result<bool, Error> {
    // The launch whose callback this is would wait for what is deferred.
    if ticket::is_inside_launch() || crate::fork::is_child() || inflight_limit::wait_for(launches) {
        return Ok(false);
    }
    if !args.has_transfers() && output_spec(args.executable).is_some() {
        return Ok(true);
    }
    match inflight_limit::wait_none_deferred_for(LONGEST_WAIT) {
        0 => Ok(false),
        waiting => Err(Error::precondition(format!(
            "{waiting} launches wait for their peers, and a program whose results have less than 8 \
             bits cannot be dispatched behind them: wait for earlier results first \
             (block_until_ready), or return int8"
        ))),
    }
}

/// Runs a launch whose time has come, with its arguments and what is to be told of its end.
type Run = Box<dyn FnOnce(&mut ExecuteArgs<'_>, Vec<End>) -> Result<(), Error> + Send>;

struct Launch {
    executable: Kept<LoadedHandle>,
    device: Option<DeviceHandle>,
    options: ExecuteOptions,
    inputs: Vec<BufferHandle>,
    /// `None` for a token, which is one of the `ends`.
    outputs: Vec<Option<AliasBuffer>>,
    ends: Vec<End>,
    run: Run,
    #[expect(dead_code, reason = "held for its drop")]
    counted: inflight_limit::Deferred,
}

static QUEUE: Mutex<VecDeque<Launch>> = Mutex::new(VecDeque::new());
static PUSHED: Condvar = Condvar::new();

/// Puts a launch at the end of the queue, if [`is_needed`] says so: `run` gets arguments like
/// `args` when its time has come, and must hold the inputs until then. Has the framework's event of
/// the launch's end, if it wants one.
pub fn defer(
    args: &mut ExecuteArgs<'_>,
    run: impl FnOnce(&mut ExecuteArgs<'_>, Vec<End>) -> Result<(), Error> + Send + 'static,
) -> Result<Option<EventHandle>, Error> {
    let Some(output_spec) = output_spec(args.executable) else {
        return Err(Error::internal("a launch was deferred that cannot be"));
    };
    start_thread()?;
    let donated = donation::find(args)?;
    let mut aliased = AliasResults::default();
    let event = match aliased.make(&output_spec, args.wants_event()) {
        Ok(event) => event,
        Err(error) => {
            aliased.results.into_iter().for_each(give_up);
            return Err(error);
        }
    };
    args.give_results(aliased.results);
    let handle = event.as_ref().map(Owned::get);
    if let Some(event) = event {
        args.give_event(event);
    }
    let mut options = args.copy_options();
    donation::donate(&donated, args.inputs, &mut options);
    let launch = Launch {
        executable: Kept::new(args.executable),
        device: args.device,
        options,
        inputs: args.inputs.to_vec(),
        outputs: aliased.outputs,
        ends: aliased.ends,
        run: Box::new(run),
        counted: inflight_limit::Deferred::new(),
    };
    QUEUE.lock().push_back(launch);
    PUSHED.notify_one();
    Ok(handle)
}

/// Results and their alias buffers, one after the other.
#[derive(Default)]
struct AliasResults {
    results: Vec<BufferHandle>,
    outputs: Vec<Option<AliasBuffer>>,
    ends: Vec<End>,
}

impl AliasResults {
    /// Makes the results and, if asked, the event of the end.
    fn make(
        &mut self,
        output_spec: &OutputSpec,
        with_event: bool,
    ) -> Result<Option<Owned<EventHandle>>, Error> {
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
        give_up(buffer);
        self.ends.push(end);
        event.map(Some)
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
        let (run, ends) = (self.run, self.ends);
        let mut results: Vec<_> = self.outputs.iter().map(|_| None).collect();
        let launch = OwnLaunch::new(self.executable.get(), &self.inputs, self.options.get());
        let launched = launch
            .on(self.device)
            .run(&mut results, |args| run(args, ends));
        let error = launched.err().map(|error| error.to_string());
        for (alias, result) in self.outputs.into_iter().zip(results) {
            match (alias, result, &error) {
                (Some(alias), Some(result), None) => alias.fulfil(result),
                (Some(alias), _, Some(error)) => alias.fail(error),
                // A token's end is told of by what ran; an alias that is left says so itself.
                _ => {}
            }
        }
    }
}

/// What making alias buffers for the results of an executable takes.
struct OutputSpec {
    client: ClientHandle,
    device: DeviceHandle,
    memory: MemoryHandle,
    /// `None` for a token.
    outputs: Vec<Option<BufferShape>>,
}

/// By loaded executable; `None` if its results cannot be alias buffers.
static OUTPUT_SPECS: SideTable<Option<Arc<OutputSpec>>> = SideTable::new();

/// What making alias buffers for the results of `executable` takes; `None` if that cannot be.
fn output_spec(executable: LoadedHandle) -> Option<Arc<OutputSpec>> {
    if let Some(known) = OUTPUT_SPECS.get(executable.address()) {
        return known;
    }
    let found = look_at(executable).ok().flatten().map(Arc::new);
    OUTPUT_SPECS.insert(executable.address(), found.clone());
    found
}

fn look_at(loaded: LoadedHandle) -> Result<Option<OutputSpec>, Error> {
    let (client, device) = clients::of_executable(loaded)?;
    let memory = device.default_memory()?;
    let outputs = loaded.executable()?.get().outputs()?;
    let mut shapes = Vec::with_capacity(outputs.len());
    for output in outputs {
        match shape(output, memory, &client) {
            Ok(shape) => shapes.push(shape),
            Err(NotAliased) => return Ok(None),
        }
    }
    Ok(Some(OutputSpec {
        client: client.handle,
        device,
        memory,
        outputs: shapes,
    }))
}

/// A result cannot be an alias buffer.
struct NotAliased;

/// The shape of a result; none for a token.
fn shape(
    output: Output,
    default: MemoryHandle,
    client: &Client,
) -> Result<Option<BufferShape>, NotAliased> {
    if output.element_type == PJRT_Buffer_Type_TOKEN {
        return Ok(None);
    }
    let memory = match &output.memory_kind {
        Some(kind) => client.memories.iter().find(|memory| memory.is_kind(kind)),
        None => Some(&default),
    };
    match memory {
        Some(&memory) if can_be_aliased(output.element_type) => Ok(Some(BufferShape {
            memory,
            element_type: output.element_type,
            dims: output.dims,
            order: output.order,
        })),
        _ => Err(NotAliased),
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
