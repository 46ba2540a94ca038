//! Programs for several devices. The inner plugin partitions one for all devices of the world; what
//! it made of it is rewritten (`hlo_rewrite`), and compiled again for this rank's device alone.
//! Towards the framework the result is still the program for all of them.

use std::sync::Arc;

use hlo_rewrite::{Devices, Envelope, Options, Refused};

use crate::clients;
use crate::compile::contents::Contents;
use crate::error::Error;
use crate::ffi::replica_groups;
use crate::inner::handles::{ClientHandle, Handle, LoadedHandle, Owned};
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

/// Loaded executables for devices of other ranks alone.
static ELSEWHERE: SideTable<()> = SideTable::new();

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

/// Notes that `loaded`, compiled with `options`, runs on devices of other ranks alone.
pub fn note_elsewhere(
    loaded: LoadedHandle,
    options: &Options,
    callbacks: bool,
) -> Result<(), Error> {
    if !options.is_for_one() {
        // Other ranks may load what this one serializes.
        let spmd = Spmd {
            optimized: optimized_program(loaded)?,
            devices: options.devices()?,
            options: options.clone(),
            callbacks,
        };
        KNOWN.insert(loaded.address(), Arc::new(spmd));
    }
    ELSEWHERE.insert(loaded.address(), ());
    Ok(())
}

/// Replaces what the inner plugin compiled for all devices, with `options`, by a program for this
/// rank's.
pub fn specialise(
    client: ClientHandle,
    whole: Owned<LoadedHandle>,
    options: &Options,
    callbacks: bool,
) -> Result<(Owned<LoadedHandle>, Contents), Error> {
    let optimized = optimized_program(whole.get());
    // What was compiled for all devices is not needed any more.
    drop(whole);
    load(client, optimized?, options, callbacks)
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
fn load(
    client: ClientHandle,
    optimized: Vec<u8>,
    options: &Options,
    callbacks: bool,
) -> Result<(Owned<LoadedHandle>, Contents), Error> {
    let world = world().ok_or_else(|| Error::internal("a program before the world"))?;
    let known = clients::find(client).ok_or_else(|| Error::invalid("unknown client"))?;
    let devices = options.devices()?;
    let rewritten = hlo_rewrite::rewrite(&optimized, &devices)?;
    replica_groups::register(&rewritten, devices.ids(), world)?;
    let contents = Contents::of_rewritten(&rewritten, &devices, world, callbacks);
    let for_device = options.for_device(i64::from(known.rank), &rewritten.layouts)?;
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
        RunsOn::Elsewhere(options) => {
            let module = hlo_rewrite::module_of(&envelope.optimized)?;
            let loaded = compile_module(client, &module, &options.without_passes()?)?;
            note_elsewhere(loaded.get(), &options, envelope.callbacks)?;
            (loaded, Contents::default())
        }
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
    client.compile(module, "hlo", options)
}

fn optimized_program(loaded: LoadedHandle) -> Result<Vec<u8>, Error> {
    loaded.executable()?.get().optimized_program()
}
