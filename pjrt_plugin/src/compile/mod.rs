//! Compiling and loading programs: what is ours in them is noted, what we cannot run is refused.

#![forbid(unsafe_code)]

pub mod communicators;
mod contents;
pub mod partitioner;
pub mod shared;
pub mod spmd;

use std::time::{Duration, Instant};

use mpi_runtime::engine::KnownCollectives;
use mpi_runtime::engine::recorder::RECORDER;
use mpi_runtime::log;
use mpi_runtime::watch::place;

use crate::clients;
use crate::compile::contents::Contents;
use crate::compile::spmd::RunsOn;
use crate::config::Log;
use crate::error::Error;
use crate::inner::handles::{
    ClientHandle, ExecutableHandle, Handle, LoadedHandle, Owned, Program, TopologyHandle,
};
use crate::inner::{on_gpu, serialized, side_table};
use crate::launch::executables::ProgramComms;
use crate::launch::executables::{self, ProgramInfo};
use crate::launch::{async_barrier, local_devices};
use crate::plugin::config;
use crate::search::find;

/// XLA runs a program with fewer floating-point operations on the calling thread
/// (`xla/pjrt/cpu/cpu_client.cc`, `cheap_computation_`).
const CHEAP_FLOPS: f32 = 1000.0;

/// The name of a program of JAX's, as it stands in its module.
fn name(program: &[u8]) -> String {
    const JITTED: &[u8] = b"jit_";
    let Some(start) = find(program, JITTED) else {
        return "a program".into();
    };
    let name = program[start + JITTED.len()..].iter();
    let name = name.take_while(|&&byte| byte.is_ascii_alphanumeric() || byte == b'_');
    name.map(|&byte| char::from(byte)).collect()
}

/// Compiles a program for the framework: `inner` has the inner plugin compile it for the client and
/// with the options that it gets.
pub fn compile(
    client: ClientHandle,
    program: Program<'_>,
    options: &[u8],
    inner: impl FnOnce(ClientHandle, &[u8]) -> Result<Owned<LoadedHandle>, Error>,
) -> Result<Owned<LoadedHandle>, Error> {
    let _activity = place::enter(format!("a compilation of {}", name(program.code)));
    let mut contents = Contents::of(program.code);
    let start = Instant::now();
    match spmd::place(client, options) {
        RunsOn::Here(home) => {
            let whole = for_one(client, options, |options| {
                shared::executable(home, program, options, || inner(home, options))
            });
            let whole = whole.map_err(with_remedy)?;
            if !config().recompile {
                return note(whole, contents);
            }
            let again = spmd::recompile(home, whole, options)?;
            spmd::note_given(again.get().address(), options, options);
            log::line("compiled an optimized program again as it is");
            note(again, contents)
        }
        RunsOn::Elsewhere(_) if contents.operations => Err(elsewhere()),
        RunsOn::Elsewhere(target) if target.is_for_one() => {
            let loaded = for_one(client, options, |options| inner(client, options));
            let loaded = loaded.map_err(with_remedy)?;
            spmd::note_elsewhere(loaded.get());
            Ok(loaded)
        }
        RunsOn::Elsewhere(options) => {
            let inner = |options: &[u8]| inner(client, options);
            let whole = spmd::partition(client, program, &options, inner).map_err(with_remedy)?;
            spmd::load_elsewhere(client, whole, &options, contents.callbacks)
        }
        RunsOn::Several(options) => {
            let inner = |options: &[u8]| inner(client, options);
            let whole = spmd::partition(client, program, &options, inner).map_err(with_remedy)?;
            let first = start.elapsed();
            let (own, rewritten) = spmd::load(client, whole, &options, contents.callbacks)?;
            contents.merge(rewritten);
            log_times(start.elapsed(), first);
            note(own, contents)
        }
    }
}

/// Has the inner plugin compile or load a program for one device: `inner` does it with the options
/// that it gets.
fn for_one(
    client: ClientHandle,
    given: &[u8],
    inner: impl FnOnce(&[u8]) -> Result<Owned<LoadedHandle>, Error>,
) -> Result<Owned<LoadedHandle>, Error> {
    let Some(known) = clients::find(client) else {
        return inner(given);
    };
    let options = spmd::for_inner(&known, given)?;
    let loaded = inner(&options)?;
    spmd::note_given(loaded.get().address(), given, &options);
    Ok(loaded)
}

/// Logs how long a program for several devices took, and how long the first compilation of it.
fn log_times(whole: Duration, first: Duration) {
    if config().log >= Log::Debug {
        log::line(&format!(
            "compiled a program for several devices in {:.1} ms: {:.1} ms for all of \
             them, the rest for this rank's",
            whole.as_secs_f64() * 1e3,
            first.as_secs_f64() * 1e3
        ));
    }
}

/// XLA's words for a custom call of the interface before FFI that has stayed one, with what to do.
fn with_remedy(error: Error) -> Error {
    let message = error.to_string();
    if !message.contains("untyped custom call") {
        return error;
    }
    Error::unimplemented(format!(
        "{message}: import what registers it before the program is compiled; \
         jax.ffi.register_ffi_target registers it, with platform=\"cpu\" and api_version=0, or 1 \
         for a typed target (https://docs.jax.dev/en/latest/ffi.html)"
    ))
}

/// On this rank a program with operations would not run, and the others would wait for it.
fn elsewhere() -> Error {
    Error::precondition(
        "a program with operations is to run on the device of another rank: jax.devices() has \
         those of all ranks; put its arguments on jax.local_devices()[0], or leave device= out; \
         MPI_CUDA_TOPOLOGY=local shows each rank its own device alone",
    )
}

/// Loads a serialized program for the framework, with the options given or, if they are empty,
/// those that it was compiled with: `inner` has the inner plugin load it on the client and with the
/// options that it gets.
pub fn load(
    client: ClientHandle,
    serialized: &[u8],
    options: &[u8],
    inner: impl FnOnce(ClientHandle, &[u8]) -> Result<Owned<LoadedHandle>, Error>,
) -> Result<Owned<LoadedHandle>, Error> {
    let mut contents = Contents::of(serialized);
    if let Some((loaded, rewritten)) = spmd::deserialize(client, serialized, options)? {
        contents.merge(rewritten);
        return note(loaded, contents);
    }
    let mut used = Vec::new();
    let given = options;
    let inner = |options: &[u8]| {
        used = options.to_vec();
        inner(spmd::home(client, given), options)
    };
    let mut loaded = match options {
        [] => inner(options).inspect(|loaded| {
            spmd::note_given(loaded.get().address(), options, options);
        })?,
        given => for_one(client, given, inner)?,
    };
    if !options.is_empty() && matches!(spmd::place(client, options), RunsOn::Elsewhere(_)) {
        spmd::note_elsewhere(loaded.get());
    } else {
        loaded = note(loaded, contents)?;
    }
    serialized::keep(loaded.get(), serialized, &used);
    Ok(loaded)
}

/// Loads a program that was compiled without a client: `inner` has the inner plugin load it on the
/// client and with the options that it gets.
pub fn load_compiled(
    client: ClientHandle,
    options: &[u8],
    inner: impl FnOnce(ClientHandle, &[u8]) -> Result<Owned<LoadedHandle>, Error>,
) -> Result<Owned<LoadedHandle>, Error> {
    let home = spmd::home(client, options);
    let loaded = for_one(client, options, |options| inner(home, options))?;
    let optimized = loaded.get().executable()?.get().optimized_program()?;
    let contents = Contents::of(&optimized);
    if !options.is_empty() && matches!(spmd::place(client, options), RunsOn::Elsewhere(_)) {
        if contents.operations {
            return Err(elsewhere());
        }
        spmd::note_elsewhere(loaded.get());
        return Ok(loaded);
    }
    note(loaded, contents)
}

/// Compiles a program for a topology: `inner` has the inner plugin compile it with the options that
/// it gets.
pub fn compile_ahead(
    topology: Option<TopologyHandle>,
    given: &[u8],
    inner: impl FnOnce(&[u8]) -> Result<Owned<ExecutableHandle>, Error>,
) -> Result<Owned<ExecutableHandle>, Error> {
    let Some(client) = topology.and_then(clients::of_topology) else {
        let compiled = inner(given)?;
        refuse_several_devices(compiled.get())?;
        return Ok(compiled);
    };
    let options = spmd::for_inner(&client, given)?;
    let compiled = inner(&options)?;
    refuse_several_devices(compiled.get())?;
    spmd::note_given(compiled.get().address(), given, &options);
    Ok(compiled)
}

/// Notes a loaded executable, or destroys and refuses it.
fn note(loaded: Owned<LoadedHandle>, contents: Contents) -> Result<Owned<LoadedHandle>, Error> {
    let handle = loaded.get();
    let cheap = is_cheap(handle, &contents).inspect_err(|_| {
        side_table::forget(handle.address());
    })?;
    if contents.operations || contents.callbacks {
        let name = handle.executable()?.get().name();
        let program = ProgramInfo {
            name: RECORDER.text(&name),
            operations: contents.operations,
            callbacks: contents.callbacks,
            cheap,
            status: contents.status,
            uniform: contents.uniform.filter(|_| !contents.callbacks),
            collectives: contents
                .collectives
                .map(|(comm, sequence)| KnownCollectives {
                    program: String::leak(String::from_utf8_lossy(&name).into_owned()),
                    comm,
                    sequence,
                }),
            long: contents.long,
            comms: match contents.operations {
                true => communicators::of(handle, contents.channel),
                false => ProgramComms::NONE,
            },
            channel: contents.channel,
        };
        executables::remember(handle, program);
        if cheap {
            async_barrier::prepare(handle);
            let local = local_devices::program(handle);
            local
                .iter()
                .flat_map(|local| local.others())
                .for_each(async_barrier::prepare);
        }
    }
    Ok(loaded)
}

/// Whether XLA would run a program with operations on the calling thread, which only XLA:CPU does.
fn is_cheap(loaded: LoadedHandle, contents: &Contents) -> Result<bool, Error> {
    let executable = loaded.executable()?;
    // A rewritten program is for one device by now.
    refuse_several_devices(executable.get())?;
    if !contents.operations || on_gpu() {
        return Ok(false);
    }
    // Unknown counts as cheap: the barrier is never wrong, only slower.
    let flops = executable.get().flops();
    Ok(flops.is_none_or(|flops| flops < 2.0 * CHEAP_FLOPS))
}

/// Refuses a program that is not for one device.
fn refuse_several_devices(executable: ExecutableHandle) -> Result<(), Error> {
    let (partitions, replicas) = (executable.partitions()?, executable.replicas()?);
    if partitions * replicas > 1 {
        return Err(Error::unimplemented(format!(
            "a program for {partitions} partitions and {replicas} replicas can only be compiled, \
             or loaded from what this version serialized, with a client, since each rank runs its \
             own part of it"
        )));
    }
    Ok(())
}
