//! Programs for several devices. The inner plugin partitions one for all devices of the world; what
//! it made of it is rewritten (`hlo_rewrite`), and compiled again for this rank's device alone.
//! Towards the framework the result is still the program for all of them.

use std::sync::Arc;

use hlo_rewrite::{Devices, Envelope, Options, Refused};

use crate::clients::{self, Client};
use crate::compile::contents::Contents;
use crate::error::Error;
use crate::ffi::replica_groups;
use crate::inner::handles::{ClientHandle, Handle, LoadedHandle, Owned, Program};
use crate::inner::on_gpu;
use crate::inner::side_table::SideTable;
use crate::plugin::world;

/// What the framework is told about an executable for several devices.
pub struct Spmd {
    /// Those it is for.
    pub devices: Devices,
    /// The partitioned, optimized program, before rewriting.
    pub optimized: Vec<u8>,
    /// What it was compiled with.
    options: Options,
    /// It calls back into the host.
    callbacks: bool,
}

/// By executable and by loaded executable.
static KNOWN: SideTable<Arc<Spmd>> = SideTable::new();

/// Loaded executables for devices of other ranks alone: the first of them.
static ELSEWHERE: SideTable<i64> = SideTable::new();

/// What is known of an executable or a loaded executable; none if it is for one device.
pub fn find(address: usize) -> Option<Arc<Spmd>> {
    KNOWN.get(address)
}

/// What is known of a loaded executable is known of the executable behind it.
pub fn share(loaded: usize, executable: usize) {
    if let Some(spmd) = find(loaded) {
        KNOWN.insert(executable, spmd);
    }
}

/// Whether a loaded executable runs on devices of other ranks alone.
pub fn is_elsewhere(loaded: LoadedHandle) -> bool {
    ELSEWHERE.has(loaded.address())
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Error {
        let remedy = match refused {
            Refused::Instruction { .. } => {
                "express it by psum, pmax, pmin, all_gather, psum_scatter, all_to_all or ppermute"
            }
            _ => {
                "this version of the inner plugin (MPI_CUDA_INNER_PLUGIN) is one that mpi_cuda \
                 does not know; use the one that scripts/setup installs, or report it"
            }
        };
        Error::unimplemented(format!("{refused}; {remedy}"))
    }
}

/// Where a program is to run.
pub enum RunsOn {
    /// On this rank's device alone, as far as we can read.
    Here,
    /// On devices of other ranks alone.
    Elsewhere(Box<Options>),
    /// On several devices, of which one is this rank's.
    Several(Box<Options>),
}

/// Where a program with these serialized options is to run.
pub fn place(client: ClientHandle, serialized: &[u8]) -> RunsOn {
    // What we cannot read is for the inner plugin to refuse.
    let (Ok(options), Some(client)) = (Options::read(serialized), clients::find(client)) else {
        return RunsOn::Here;
    };
    match options.devices() {
        Ok(devices)
            if !devices.ids().contains(&i64::from(client.rank))
                && (options.is_assigned() || !options.is_for_one()) =>
        {
            RunsOn::Elsewhere(Box::new(options))
        }
        _ if options.is_for_one() => RunsOn::Here,
        _ => RunsOn::Several(Box::new(options)),
    }
}

/// The options of a program for one device as the inner client takes them: where that has this
/// rank's device alone, the program is compiled for it, whatever device it is for.
pub fn for_inner(client: ClientHandle, options: &Options) -> Result<Options, Error> {
    let known = find_client(client)?;
    known.devices.check(options.devices()?.ids())?;
    Ok(match known.devices.is_alone() && options.is_assigned() {
        true => options.on_device(known.devices.inner_id()),
        false => options.clone(),
    })
}

fn find_client(client: ClientHandle) -> Result<Arc<Client>, Error> {
    clients::find(client).ok_or_else(|| Error::invalid("unknown client"))
}

/// Serialized options for the inner plugin; what we cannot read is for it to refuse.
pub fn serialized_for_inner(client: ClientHandle, serialized: &[u8]) -> Result<Vec<u8>, Error> {
    match Options::read(serialized) {
        Ok(options) if options.is_for_one() => Ok(for_inner(client, &options)?.write()?),
        _ => Ok(serialized.to_vec()),
    }
}

/// The serialized device assignment of a loaded executable, as the framework knows the devices;
/// none if the inner plugin knows them by the same numbers.
pub fn assignment(loaded: LoadedHandle) -> Result<Option<Vec<u8>>, Error> {
    let devices = match (find(loaded.address()), ELSEWHERE.get(loaded.address())) {
        (Some(spmd), _) => spmd.devices.clone(),
        (None, Some(device)) => Devices::new(1, 1, vec![device])?,
        (None, None) => {
            let (client, _) = clients::of_executable(loaded)?;
            if !client.devices.is_alone() {
                return Ok(None);
            }
            Devices::new(1, 1, vec![i64::from(client.rank)])?
        }
    };
    Ok(Some(devices.to_assignment()?))
}

/// Notes that `loaded`, compiled with `options` for one device, runs on that of another rank.
pub fn note_elsewhere(loaded: LoadedHandle, options: &Options) -> Result<(), Error> {
    let first = options.devices()?.ids().first().copied();
    ELSEWHERE.insert(loaded.address(), first.unwrap_or(0));
    Ok(())
}

/// Has the inner plugin partition a program for several devices, and optimize it: `inner` has its
/// client compile the program, with the options that it gets.
pub fn partition(
    client: ClientHandle,
    program: Program<'_>,
    options: &Options,
    inner: impl FnOnce(&[u8]) -> Result<Owned<LoadedHandle>, Error>,
) -> Result<Vec<u8>, Error> {
    let known = find_client(client)?;
    if !known.devices.is_alone() {
        let options = match on_gpu() {
            true => options.tuned_alone()?,
            false => options.without_code()?,
        };
        return optimized_program(inner(&options)?.get());
    }
    known.devices.check(options.devices()?.ids())?;
    let options = options.without_code()?;
    if let Some(topology) = known.devices.lacking_topology() {
        match topology.compile(program, &options) {
            Err(error) if is_for_a_client(&error) => (),
            compiled => return compiled?.get().optimized_program(),
        }
    }
    // It has threads for each device, and ends with the compilation.
    let all = clients::create_for_all(known.size)?;
    optimized_program(all.get().compile(program, &options)?.get())
}

/// Whether an inner plugin says that it compiles for devices of a client only, as XLA's for the CPU
/// did before 2026.
fn is_for_a_client(error: &Error) -> bool {
    error.to_string().contains("No compiler registered")
}

/// Compiles the optimized program of `whole`, which is for this rank's device alone, again as it is
/// (`MPI_CUDA_RECOMPILE`).
pub fn recompile(
    client: ClientHandle,
    whole: Owned<LoadedHandle>,
    options: &[u8],
) -> Result<Owned<LoadedHandle>, Error> {
    let optimized = optimized_program(whole.get());
    drop(whole);
    let optimized = optimized?;
    let options = Options::read(options)?;
    let layouts = hlo_rewrite::layouts_of(&optimized)?;
    let own = options.devices()?.ids().first().copied().unwrap_or(0);
    let for_device = options.for_device(own, &layouts)?;
    compile_module(client, &hlo_rewrite::module_of(&optimized)?, &for_device)
}

/// Compiles a partitioned, optimized program for this rank's device.
pub fn load(
    client: ClientHandle,
    optimized: Vec<u8>,
    options: &Options,
    callbacks: bool,
) -> Result<(Owned<LoadedHandle>, Contents), Error> {
    let world = world().ok_or_else(|| Error::internal("a program before the world"))?;
    let known = find_client(client)?;
    let devices = options.devices()?;
    let rewritten = hlo_rewrite::rewrite(&optimized, &devices)?;
    replica_groups::register(&rewritten, devices.ids(), world)?;
    let contents = Contents::of_rewritten(&rewritten, &devices, world, callbacks);
    let for_device = options.for_device(known.devices.inner_id(), &rewritten.layouts)?;
    let loaded = compile_module(client, &rewritten.module, &for_device)?;
    let spmd = Arc::new(Spmd {
        devices,
        optimized,
        options: options.clone(),
        callbacks,
    });
    KNOWN.insert(loaded.get().address(), spmd);
    Ok((loaded, contents))
}

/// Has an executable for a partitioned, optimized program of devices of other ranks alone. It never
/// runs; but the framework asks it what it would, and other ranks may load what this one
/// serializes.
pub fn load_elsewhere(
    client: ClientHandle,
    optimized: Vec<u8>,
    options: &Options,
    callbacks: bool,
) -> Result<Owned<LoadedHandle>, Error> {
    let devices = options.devices()?;
    let rewritten = hlo_rewrite::rewrite(&optimized, &devices)?;
    let own = find_client(client)?.devices.inner_id();
    let for_device = options.for_device(own, &rewritten.layouts)?;
    let without_code = Options::read(&for_device)?.without_code()?;
    let loaded = compile_module(client, &rewritten.module, &without_code)?;
    let address = loaded.get().address();
    ELSEWHERE.insert(address, devices.ids().first().copied().unwrap_or(0));
    let spmd = Spmd {
        devices,
        optimized,
        options: options.clone(),
        callbacks,
    };
    KNOWN.insert(address, Arc::new(spmd));
    Ok(loaded)
}

/// Loads what [`Spmd::serialize`] wrote, with the options given or those that it was compiled with;
/// none if the bytes are something else.
pub fn deserialize(
    client: ClientHandle,
    serialized: &[u8],
    options: &[u8],
) -> Result<Option<(Owned<LoadedHandle>, Contents)>, Error> {
    let Some(envelope) = Envelope::read(serialized)? else {
        return Ok(None);
    };
    let given = if options.is_empty() {
        &envelope.options[..]
    } else {
        options
    };
    let loaded = match place(client, given) {
        RunsOn::Several(options) => load(client, envelope.optimized, &options, envelope.callbacks)?,
        RunsOn::Elsewhere(options) => (
            load_elsewhere(client, envelope.optimized, &options, envelope.callbacks)?,
            Contents::default(),
        ),
        RunsOn::Here => {
            return Err(Error::invalid(
                "a program for several devices cannot be loaded for one: give the options that it \
                 was compiled with, or none",
            ));
        }
    };
    Ok(Some(loaded))
}

impl Spmd {
    /// The program as any rank can load it.
    pub fn serialize(&self) -> Result<Vec<u8>, Error> {
        let envelope = Envelope {
            optimized: self.optimized.clone(),
            options: self.options.write()?,
            callbacks: self.callbacks,
        };
        Ok(envelope.write()?)
    }
}

/// Compiles a module with the inner plugin.
fn compile_module(
    client: ClientHandle,
    module: &[u8],
    options: &[u8],
) -> Result<Owned<LoadedHandle>, Error> {
    let program = Program {
        code: module,
        format: b"hlo",
    };
    client.compile(program, options)
}

fn optimized_program(loaded: LoadedHandle) -> Result<Vec<u8>, Error> {
    loaded.executable()?.get().optimized_program()
}
