//! Launching programs: everything between `PJRT_LoadedExecutable_Execute` and XLA's queue. Programs
//! with operations of ours take a ticket, which the operations find again through the run id; they
//! run on the calling thread only if all ranks are there.

#![forbid(unsafe_code)]

mod alias_buffer;
pub mod async_barrier;
pub mod completion;
mod deferred;
pub mod donation;
pub mod executables;
mod inflight_limit;
pub mod keep_alive;
pub mod local_devices;
pub mod meeting;
pub mod meeting_call;
mod on_caller;
mod queue_entrance;
mod several;
pub mod spare_client;
mod task_queue;
pub mod thread_order;
pub mod ticket;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mpi_runtime::engine::Launch;
use mpi_runtime::engine::recorder::RECORDER;
use mpi_runtime::node::process::is_main_thread;
use mpi_runtime::{Ticket, World};
use pjrt_sys::PJRT_Error_Code_INTERNAL;

use crate::clients;
use crate::error::Error;
use crate::inner::execute_args::{EndEvent, ExecuteArgs};
use crate::inner::handles::{BufferHandle, ClientHandle};
use crate::inner::{dispatch_thread, on_gpu};
use crate::plugin::world;

use completion::Completion;
use deferred::Needs;
use executables::ProgramInfo;
use inflight_limit::InFlightSlot;
use keep_alive::Kept;
use meeting::Part;
use on_caller::WithCallbacks;
use queue_entrance::Ahead;
use thread_order::ThreadOrder;
use ticket::{Dispatcher, RunId, TicketGuard};

pub use on_caller::launches_on_callers;
pub use several::execute as execute_several;

/// Launches a program for the framework.
pub fn execute(args: &mut ExecuteArgs<'_>) -> Result<(), Error> {
    let deleted = donation::refuse_deleted(args);
    let program = executables::find(args.executable);
    if let Some(program) = program.filter(|program| program.operations) {
        several::refuse_operations_of_callbacks()
            .inspect_err(|error| tell_refused(&program, error))?;
    }
    if let Some(outer) = ticket::callback_in_background() {
        deleted?;
        return launch_in_background(args, program, outer);
    }
    match program {
        Some(program) if program.operations => {
            // What has come here is told by the library, if it is not launched.
            count_by_main();
            let world = deleted.and_then(|()| world_for_operations());
            let world = world.inspect_err(|error| tell_refused(&program, error))?;
            launch_operations(args, program, world)
        }
        _ if deleted.is_err() => deleted,
        Some(program) => launch_others(args, program.callbacks, None),
        None if dispatch_thread::is_main() && !queue_entrance::may_wait() => args.pass_on(),
        None => match Ahead::new() {
            Some(_ahead) => args.pass_on(),
            None => launch_others(args, false, None),
        },
    }
}

/// Waits for everything that was dispatched, before a client is destroyed.
pub fn finish_client(client: ClientHandle) {
    inflight_limit::wait_none_deferred();
    if let Some(world) = world() {
        world.engine.wait_idle();
    }
    for home in clients::find(client)
        .iter()
        .flat_map(|client| client.homes())
    {
        async_barrier::destroy(home.client);
    }
}

/// Launches a program with operations, under a ticket.
fn launch_operations(
    args: &mut ExecuteArgs<'_>,
    program: ProgramInfo,
    world: &'static World,
) -> Result<(), Error> {
    let context = args.context.map(Kept::new);
    let order = thread_order::of(world);
    let lock = order.lock();
    let outer = ticket::callback_of();
    let waits = program.status && outer.is_none() && !ticket::is_inside_launch();
    let launches = 1 + usize::from(program.cheap);
    let place = program.order(order.number);
    let needs = Needs {
        launches,
        order: Some(&place),
        apart: !order.is_first(),
    };
    let deferred = world.size > 1
        && outer.is_none()
        && deferred::is_needed(&order, args, &needs)
            .inspect_err(|error| tell_refused(&program, error))?;
    let ticket = outer.unwrap_or_else(|| world.engine.issue_ticket(place));
    if let RunId::By(thread) = RunId::of(&order) {
        world.engine.note_thread();
        note_launch(world, ticket, &program, thread);
    }
    RECORDER.launch(ticket, program.name, args.call_location());
    // The outer launch retires the ticket of what its callbacks launch.
    let own = outer.is_none().then(|| TicketGuard(ticket));
    // What cannot be deferred runs at once: in XLA's queue it might wait for what waits for it.
    let apart = !deferred && !order.is_first() && outer.is_none() && !ticket::is_inside_launch();
    // Alone in the world nothing waits for a peer, and with everybody here nothing for long.
    let on_caller = world.size == 1
        || !deferred && !apart && on_caller::is_possible(world, ticket, &program, args);
    let completion = Completion {
        inputs: if on_caller {
            Vec::new()
        } else {
            keep_inputs(args)
        },
        context,
        callbacks: program.callbacks.then(WithCallbacks::new),
        ticket: own,
        part: None,
        slot: (world.size > 1).then(|| InFlightSlot::new(&order.limit, launches, true)),
        ends: Vec::new(),
        deferred: false,
    };
    let launch_id = RunId::Ticket(ticket).launch_id();
    let result = if deferred {
        defer(&order, args, launch_id, completion)
            .inspect_err(|error| tell_refused(&program, error))
    } else if apart {
        world.engine.wait_turn(ticket);
        args.with_launch_id(launch_id, |args| launch_apart(args, completion))
    } else {
        let barrier = (program.cheap && !on_caller).then(|| async_barrier::hold(args.executable));
        let result = args.with_launch_id(launch_id, |args| launch(args, completion));
        drop(barrier);
        if on_caller && program.uniform.is_some() && world.size > 1 {
            on_caller::count();
        }
        result
    };
    if result.is_err() && !deferred {
        world.engine.withdraw();
    }
    drop(lock);
    if waits && (result.is_ok() || !deferred) {
        world.engine.wait_launch(ticket);
    }
    result
}

/// Tells the comparison between ranks of a launch that has taken `ticket`.
fn note_launch(world: &World, ticket: Ticket, program: &ProgramInfo, thread: Dispatcher) {
    if world.size > 1 {
        let launch = Launch {
            uniform: program.uniform,
            collectives: program.collectives,
            by_main_thread: thread.is_main,
        };
        world.engine.note_launch(ticket, launch);
    }
}

/// Launches with operations that the main thread has asked for, whatever came of them.
static BY_MAIN: AtomicU64 = AtomicU64::new(0);

fn count_by_main() {
    if is_main_thread() {
        BY_MAIN.fetch_add(1, Ordering::Relaxed);
    }
}

/// How many launches with operations the main thread has asked for: what it refuses before that
/// counts one more, only the framework knows.
pub fn launches_by_main() -> &'static AtomicU64 {
    &BY_MAIN
}

/// A launch is refused before it has a ticket: tells the other ranks, which may wait in it.
#[cold]
fn tell_refused(program: &ProgramInfo, error: &Error) {
    if let (Some(world), Some(collectives)) = (world(), &program.collectives)
        && (is_main_thread() || thread_order::is_one())
        && ticket::callback_of().is_none()
        && !ticket::is_inside_launch()
        && !crate::fork::is_child()
    {
        world.engine.refuse_launch(collectives, &error.to_string());
    }
}

/// The world, if a launch with operations may communicate now.
fn world_for_operations() -> Result<&'static World, Error> {
    let Some(world) = world() else {
        return Err(Error::internal(
            "a program with operations was launched before the world",
        ));
    };
    if crate::fork::is_child() {
        return Err(Error::precondition(
            "this process was forked from a rank and cannot communicate; start worker processes \
             with the spawn method and JAX_PLATFORMS=cpu",
        ));
    }
    if on_gpu() && dispatch_thread::is_current() {
        return Err(Error::precondition(
            "a host callback has called an operation with arrays on the GPU, which waits there \
             until the callback has returned: call operations outside of callbacks",
        ));
    }
    let thread = thread_order::of(world).number;
    match world.engine.take_unread_error(Some(thread)) {
        Some(error) => Err(Error::verbatim(
            PJRT_Error_Code_INTERNAL,
            format!("{error} (reported by the launch after it)"),
        )),
        None => Ok(world),
    }
}

/// Launches a program without operations, which may have callbacks, or a part of one.
fn launch_others(
    args: &mut ExecuteArgs<'_>,
    callbacks: bool,
    part: Option<Part>,
) -> Result<(), Error> {
    let context = args.context.map(Kept::new);
    let several = world().is_some_and(|world| world.size > 1) && !crate::fork::is_child();
    let order = world().map_or_else(thread_order::first, thread_order::of);
    let lock = several.then(|| order.lock());
    // In XLA's queue it must not wait for what another thread has launched, nor may the first
    // thread wait for its callbacks.
    let of_other = several && !order.is_first();
    let ahead = (of_other && !callbacks).then(Ahead::new).flatten();
    let apart = of_other && ahead.is_none();
    let needs = Needs {
        launches: 1,
        order: None,
        apart,
    };
    let deferred = several && deferred::is_needed(&order, args, &needs)?;
    // JAX's own launch ids must not look like a ticket.
    let own_id = part.as_ref().map(Part::launch_id);
    let launch_id = own_id.unwrap_or_else(|| RunId::of(&order).launch_id());
    let completion = Completion {
        inputs: if deferred || several && queue_entrance::may_wait() {
            keep_inputs(args)
        } else {
            Vec::new()
        },
        context,
        callbacks: callbacks.then(WithCallbacks::new),
        ticket: None,
        part,
        slot: several.then(|| InFlightSlot::new(&order.limit, 1, callbacks)),
        ends: Vec::new(),
        deferred: false,
    };
    if deferred {
        drop(ahead);
        return defer(&order, args, launch_id, completion);
    }
    // Only the order of deferring matters here, and a callback may wait for another thread's
    // launch.
    drop(lock);
    args.with_launch_id(launch_id, |args| match apart {
        true => launch_apart(args, completion),
        false => launch(args, completion),
    })
}

/// Runs what a callback of the launch `outer` launches while that is in the background: to the end,
/// here.
fn launch_in_background(
    args: &mut ExecuteArgs<'_>,
    program: Option<ProgramInfo>,
    outer: RunId,
) -> Result<(), Error> {
    let mut run_id = outer;
    let mut own = None;
    if let (Some(program), Some(world), RunId::By(thread)) = (program, world(), outer)
        && program.operations
    {
        let ticket = world.engine.issue_ticket_now(program.order(thread.order));
        own = Some(TicketGuard(ticket));
        note_launch(world, ticket, &program, thread);
        run_id = RunId::Ticket(ticket);
    }
    let result = args.with_launch_id(run_id.launch_id(), spare_client::execute);
    drop(own);
    result
}

/// Defers a launch.
fn defer(
    order: &Arc<ThreadOrder>,
    args: &mut ExecuteArgs<'_>,
    launch_id: i32,
    mut completion: Completion,
) -> Result<(), Error> {
    let ticket = completion.ticket();
    let watched = ticket.is_some();
    let is_first = order.is_first();
    let event = deferred::defer(order, args, ticket, move |args, ends| {
        completion.ends = ends;
        completion.deferred = true;
        args.with_launch_id(launch_id, |args| match is_first {
            true => launch(args, completion),
            false => launch_apart(args, completion),
        })
    })?;
    if let Some(event) = event.filter(|_| watched) {
        completion::watch(event);
    }
    Ok(())
}

/// Launches a program and lets go of `completion` when it has ended.
fn launch(args: &mut ExecuteArgs<'_>, completion: Completion) -> Result<(), Error> {
    let event = match ticket::inside_launch(|| args.execute()) {
        Ok(event) => event,
        Err(error) => {
            let error = completion.failed(error);
            completion.reach(Some(&error.to_string()));
            return Err(error);
        }
    };
    if completion.ticket().is_some()
        && let EndEvent::Shared(event) = &event
    {
        completion::watch(*event);
    }
    event.handle().on_ready(move |ended| {
        let error = ended.err().map(|error| error.to_string());
        completion.reach(error.as_deref());
        drop(event);
    });
    Ok(())
}

/// Runs a program of another thread than the first to its end, out of the way of the others.
fn launch_apart(args: &mut ExecuteArgs<'_>, completion: Completion) -> Result<(), Error> {
    let result = spare_client::execute(args);
    let error = result.as_ref().err().map(ToString::to_string);
    completion.reach(error.as_deref());
    result
}

/// Keeps the inputs of a launch.
fn keep_inputs(args: &ExecuteArgs<'_>) -> Vec<Kept<BufferHandle>> {
    args.inputs.iter().copied().map(Kept::new).collect()
}
