//! Launches of a program on several devices of this rank at once (`MPI_CUDA_LOCAL_DEVICES`). Each
//! device has an inner client, with a queue and threads of its own, and gets its part of the
//! launch. All parts have one ticket. What communicates in them is a meeting: the parts wait for
//! each other at every collective, in the order of the program, and the last to come executes it
//! for all of them.

use std::sync::Arc;

use mpi_runtime::World;
use mpi_runtime::engine::recorder::RECORDER;

use crate::error::Error;
use crate::inner::execute_args::ExecuteArgs;
use crate::launch::completion::{self, Completion};
use crate::launch::deferred::{self, Needs};
use crate::launch::executables::{self, ProgramInfo};
use crate::launch::inflight_limit::InFlightSlot;
use crate::launch::keep_alive::{self, Kept};
use crate::launch::local_devices::LocalDevices;
use crate::launch::meeting::Several;
use crate::launch::on_caller::WithCallbacks;
use crate::launch::thread_order::{self, ThreadOrder};
use crate::launch::ticket::{self, RunId, TicketGuard};
use crate::launch::{self as launches, async_barrier, donation};
use crate::plugin::{config, world};

/// Launches a program for the framework on devices of this rank: a part on each.
pub fn execute(local: &Arc<LocalDevices>, parts: &mut [ExecuteArgs<'_>]) -> Result<(), Error> {
    let program = parts
        .first()
        .and_then(|first| executables::find(first.executable));
    let deleted = refuse_transfers(parts).and_then(|()| {
        let mut parts = parts.iter();
        parts.try_for_each(|part| donation::refuse_deleted(part))
    });
    let has_operations = program.is_some_and(|program| program.operations);
    if !has_operations {
        deleted.and_then(|()| refuse_in_callbacks())?;
        let callbacks = program.is_some_and(|program| program.callbacks);
        let order = world().map_or_else(thread_order::first, thread_order::of);
        let several = Several::new(RunId::of(&order), None, &local.ids, parts.len());
        let mut own = several.parts().into_iter();
        return all_or_none(parts, |args| {
            launches::launch_others(args, callbacks, own.next())
        });
    }
    let Some(program) = program else {
        return Err(Error::internal("a launch of no program"));
    };
    launches::count_by_main();
    let ready = deleted
        .and_then(|()| refuse_here())
        .and_then(|()| launches::world_for_operations());
    let world = ready.inspect_err(|error| launches::tell_refused(&program, error))?;
    launch(world, local, &program, parts)
}

/// What the options say of transfers is of one device.
fn refuse_transfers(parts: &[ExecuteArgs<'_>]) -> Result<(), Error> {
    match parts.iter().any(ExecuteArgs::has_transfers) {
        false => Ok(()),
        true => Err(Error::unimplemented(
            "a program on several devices of this rank is launched with callbacks for its sends \
             and receives, or with tasks: leave them out, or MPI_CUDA_LOCAL_DEVICES",
        )),
    }
}

/// Whether the calling thread is in a callback of a program.
fn is_in_callback() -> bool {
    ticket::callback_of().is_some()
        || ticket::callback_in_background().is_some()
        || ticket::is_inside_launch()
}

/// A callback of one device's part would wait for the parts of all.
fn refuse_in_callbacks() -> Result<(), Error> {
    match is_in_callback() {
        false => Ok(()),
        true => Err(Error::unimplemented(
            "a host callback launches a program on several devices of this rank: launch it outside \
             of callbacks, or leave MPI_CUDA_LOCAL_DEVICES out",
        )),
    }
}

/// Refuses operations of callbacks where ranks have several devices: the callbacks of those run at
/// once, and on each rank in an order of its own.
pub fn refuse_operations_of_callbacks() -> Result<(), Error> {
    if config().local_devices == 1 || !is_in_callback() {
        return Ok(());
    }
    Err(Error::unimplemented(
        "a host callback launches operations of mpi_cuda or mpi4jax, and ranks have several \
         devices, whose callbacks run in no order: call them outside of callbacks, or leave \
         MPI_CUDA_LOCAL_DEVICES out",
    ))
}

/// Where several devices cannot be launched on.
fn refuse_here() -> Result<(), Error> {
    refuse_in_callbacks()?;
    let is_first = world().is_none_or(|world| thread_order::of(world).is_first());
    match is_first {
        true => Ok(()),
        false => Err(Error::unimplemented(
            "a thread other than the main one launches a program with collectives on several \
             devices of this rank: launch it from the main thread, let all threads share one order \
             (MPI_CUDA_THREAD_ORDER=one), or leave MPI_CUDA_LOCAL_DEVICES out",
        )),
    }
}

fn launch(
    world: &'static World,
    local: &Arc<LocalDevices>,
    program: &ProgramInfo,
    parts: &mut [ExecuteArgs<'_>],
) -> Result<(), Error> {
    let order = thread_order::of(world);
    let _lock = order.lock();
    let place = program.order(order.number);
    let needs = Needs {
        launches: 1 + usize::from(program.cheap),
        order: Some(&place),
        apart: false,
    };
    let mut deferred = false;
    for part in parts.iter().filter(|_| world.size > 1) {
        deferred |= deferred::is_needed(&order, part, &needs)
            .inspect_err(|error| launches::tell_refused(program, error))?;
    }
    let ticket = world.engine.issue_ticket(place);
    let several = {
        let guard = Some(TicketGuard(ticket));
        Several::new(RunId::Ticket(ticket), guard, &local.ids, parts.len())
    };
    let mut own = several.parts().into_iter();
    if let RunId::By(thread) = RunId::of(&order) {
        world.engine.note_thread();
        launches::note_launch(world, ticket, program, thread);
    }
    RECORDER.launch(ticket, program.name, parts[0].call_location());
    let result = all_or_none(parts, |args| {
        let Some(part) = own.next() else {
            return Err(Error::internal("a launch has more devices than parts"));
        };
        let launch_id = part.launch_id();
        let completion = Completion {
            inputs: launches::keep_inputs(args),
            context: args.context.map(Kept::new),
            callbacks: program.callbacks.then(WithCallbacks::new),
            ticket: None,
            part: Some(part),
            slot: (world.size > 1).then(|| InFlightSlot::new(&order.limit, needs.launches, true)),
            ends: Vec::new(),
            deferred: false,
        };
        match deferred {
            true => defer(&order, args, launch_id, program.cheap, completion),
            false => launch_part(args, launch_id, program.cheap, completion),
        }
    });
    result.inspect_err(|error| {
        several.fail(format!("another part of the launch was refused: {error}"));
        world.engine.withdraw();
        // What is not deferred tells it when its part ends.
        if deferred {
            launches::tell_refused(program, error);
        }
    })
}

/// Gives a part to its device, on whose threads it runs: it must not run on this one, which has the
/// other parts to launch.
fn launch_part(
    args: &mut ExecuteArgs<'_>,
    launch_id: i32,
    cheap: bool,
    completion: Completion,
) -> Result<(), Error> {
    let barrier = cheap.then(|| async_barrier::hold(args.executable));
    if let Some(None) = barrier {
        let error = Error::internal(
            "a small program cannot be launched on several devices of this rank: its device takes \
             no program before it",
        );
        completion.reach(Some(&error.to_string()));
        return Err(error);
    }
    let result = args.with_launch_id(launch_id, |args| launches::launch(args, completion));
    drop(barrier);
    result
}

/// Defers a part.
fn defer(
    order: &Arc<ThreadOrder>,
    args: &mut ExecuteArgs<'_>,
    launch_id: i32,
    cheap: bool,
    mut completion: Completion,
) -> Result<(), Error> {
    let ticket = completion.ticket();
    let event = deferred::defer(order, args, ticket, move |args, ends| {
        completion.ends = ends;
        completion.deferred = true;
        launch_part(args, launch_id, cheap, completion)
    })?;
    if let Some(event) = event {
        completion::watch(event);
    }
    Ok(())
}

/// The framework gets nothing of a part that was launched.
fn take_back(part: &mut ExecuteArgs<'_>) {
    if let Ok((results, event)) = part.take_back() {
        if let Some(event) = &event {
            completion::forget(event.get());
        }
        results.into_iter().for_each(keep_alive::give_up);
    }
}

/// Launches every part; if one is refused, nothing is left of those before it.
fn all_or_none(
    parts: &mut [ExecuteArgs<'_>],
    mut launch: impl FnMut(&mut ExecuteArgs<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    for place in 0..parts.len() {
        if let Err(error) = launch(&mut parts[place]) {
            parts[..place].iter_mut().for_each(take_back);
            return Err(error);
        }
    }
    Ok(())
}
