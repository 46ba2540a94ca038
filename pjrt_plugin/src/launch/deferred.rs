//! Launches that the calling thread cannot give to the inner plugin without waiting: for a slot
//! (`inflight_limit.rs`), for a launch of another thread, or, of threads other than the first, for
//! peers. The framework gets alias buffers as results at once, and a thread of ours launches them
//! in order, one for each order (`thread_order.rs`). That thread may wait.

use std::sync::Arc;
use std::time::Duration;

use mpi_runtime::{LaunchOrder, Ticket};
use pjrt_sys::*;

use crate::clients;
use crate::error::Error;
use crate::inner::execute_args::{ExecuteArgs, OwnLaunch};
use crate::inner::execute_options::ExecuteOptions;
use crate::inner::handles::{
    BufferHandle, BufferShape, ClientHandle, DeviceHandle, EventHandle, Handle, LoadedHandle,
    MemoryHandle, Output, Owned,
};
use crate::inner::side_table::SideTable;
use crate::launch::alias_buffer::{self, AliasBuffer, End};
use crate::launch::keep_alive::{Kept, give_up};
use crate::launch::thread_order::{self, ThreadOrder};
use crate::launch::{donation, inflight_limit, ticket};
use crate::plugin::world;

/// How long a program that cannot be deferred waits for those that are.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What a launch takes that may have to be deferred.
pub struct Needs<'a> {
    /// So many launches of the inner plugin.
    pub launches: usize,
    /// What its operations are ordered with, if it has any.
    pub order: Option<&'a LaunchOrder>,
    /// It must not get into XLA's queue, where it would wait for launches of other threads.
    pub apart: bool,
}

/// Whether the dispatching thread would wait, and a thread of ours can do so instead. Call with the
/// order of launches locked.
pub fn is_needed(
    order: &ThreadOrder,
    args: &ExecuteArgs<'_>,
    needs: &Needs<'_>,
) -> Result<bool, Error> {
    // The launch whose callback this is would wait for what is deferred.
    if ticket::is_inside_launch() || crate::fork::is_child() || !would_wait(order, args, needs) {
        return Ok(false);
    }
    if !args.has_transfers() && output_spec(args.executable).is_some() {
        return Ok(true);
    }
    match order.limit.wait_none_deferred_for(LONGEST_WAIT) {
        0 => Ok(false),
        waiting => Err(Error::precondition(format!(
            "{waiting} launches wait for their peers, and a program whose results have less than 8 \
             bits cannot be dispatched behind them: wait for earlier results first \
             (block_until_ready), or return int8"
        ))),
    }
}

fn would_wait(order: &ThreadOrder, args: &ExecuteArgs<'_>, needs: &Needs<'_>) -> bool {
    if needs.apart || alias_buffer::any_unfulfilled(args.inputs) {
        return true;
    }
    if !order.is_first() {
        return false;
    }
    let behind = |own: &LaunchOrder| {
        thread_order::are_others()
            && world().is_some_and(|world| world.engine.has_other_threads(own))
    };
    needs.order.is_some_and(behind) || !order.limit.wait_for(needs.launches)
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
    /// Of a launch with operations.
    ticket: Option<Ticket>,
    run: Run,
    #[expect(dead_code, reason = "held for its drop")]
    counted: inflight_limit::Deferred,
}

/// Puts a launch at the end of its order's queue, if [`is_needed`] says so: `run` gets arguments
/// like `args` when its time has come, and must hold the inputs until then. Has the framework's
/// event of the launch's end, if it wants one.
pub fn defer(
    order: &Arc<ThreadOrder>,
    args: &mut ExecuteArgs<'_>,
    ticket: Option<Ticket>,
    run: impl FnOnce(&mut ExecuteArgs<'_>, Vec<End>) -> Result<(), Error> + Send + 'static,
) -> Result<Option<EventHandle>, Error> {
    let Some(output_spec) = output_spec(args.executable) else {
        return Err(Error::internal("a launch was deferred that cannot be"));
    };
    let own = order.clone();
    order.queue.start(move || thread_order::adopt(own))?;
    let donated = donation::find(args)?;
    let mut aliased = AliasResults::default();
    let event = match aliased.make(&output_spec, args.wants_event()) {
        Ok(event) => event,
        Err(error) => {
            aliased.results.into_iter().for_each(give_up);
            return Err(error);
        }
    };
    args.give_results(&mut aliased.results)?;
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
        ticket,
        run: Box::new(run),
        counted: inflight_limit::Deferred::new(&order.limit),
    };
    let is_first = order.is_first();
    order.queue.push(Box::new(move || {
        launch.wait(is_first);
        launch.start();
    }));
    Ok(handle)
}

/// Results and their alias buffers, one after the other. The aliases are dropped first.
#[derive(Default)]
struct AliasResults {
    outputs: Vec<Option<AliasBuffer>>,
    ends: Vec<End>,
    results: Vec<Owned<BufferHandle>>,
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

impl Launch {
    /// Waits for what the inner plugin must not wait for: its threads are few.
    fn wait(&self, is_first: bool) {
        alias_buffer::wait_fulfilled(&self.inputs);
        if let (Some(ticket), Some(world)) = (self.ticket, world()) {
            match is_first {
                true => world.engine.wait_for_other_threads(ticket),
                false => world.engine.wait_turn(ticket),
            }
        }
    }

    fn start(mut self) {
        let (run, ends) = (self.run, self.ends);
        let mut results: Vec<_> = self.outputs.iter().map(|_| None).collect();
        let launch = OwnLaunch::new(self.executable.get(), &self.inputs, &mut self.options);
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
    let (_, home) = clients::of_executable(loaded)?;
    let memory = home.device.default_memory()?;
    let memories = home.device.memories()?;
    let outputs = loaded.executable()?.get().outputs()?;
    let mut shapes = Vec::with_capacity(outputs.len());
    for output in outputs {
        match shape(output, memory, &memories) {
            Ok(shape) => shapes.push(shape),
            Err(NotAliased) => return Ok(None),
        }
    }
    Ok(Some(OutputSpec {
        client: home.client,
        device: home.device,
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
    memories: &[MemoryHandle],
) -> Result<Option<BufferShape>, NotAliased> {
    if output.element_type == PJRT_Buffer_Type_TOKEN {
        return Ok(None);
    }
    let memory = match &output.memory_kind {
        Some(kind) => memories.iter().find(|memory| memory.is_kind(kind)),
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
