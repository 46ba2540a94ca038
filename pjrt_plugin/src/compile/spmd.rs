//! Programs for several devices. The inner plugin partitions one for all of them; what it made of
//! it is rewritten (`hlo_rewrite`), and compiled again for this rank's device alone. Towards the
//! framework the result is still the program for all of them.

use std::borrow::Cow;
use std::ffi::c_int;
use std::sync::Arc;

use hlo_rewrite::{Devices, Envelope, Options, Refused, Sizes};
use mpi_runtime::World;
use parking_lot::Mutex;

use crate::clients::{self, Client, Home};
use crate::compile::contents::Contents;
use crate::compile::{partitioner, shared};
use crate::config::Overlap;
use crate::error::Error;
use crate::ffi::replica_groups;
use crate::ffi::targets::has_operations;
use crate::inner::handles::{ClientHandle, Handle, LoadedHandle, Owned, Program};
use crate::inner::side_table::SideTable;
use crate::inner::{on_gpu, serialized};
use crate::launch::local_devices::{self, LocalDevices};
use crate::plugin::{config, world};

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
    /// Replica and partition of each of this rank's devices in the program, in its order, as
    /// `PJRT_LogicalDeviceIds`.
    pub logical: Vec<[c_int; 2]>,
}

/// By executable and by loaded executable.
static KNOWN: SideTable<Arc<Spmd>> = SideTable::new();

/// Loaded executables for devices of other ranks alone.
static ELSEWHERE: SideTable<()> = SideTable::new();

/// The options that the framework compiled a program for one device with, where the inner client
/// got others.
static GIVEN: SideTable<Arc<[u8]>> = SideTable::new();

/// What is known of an executable or a loaded executable; none if it is for one device.
pub fn find(address: usize) -> Option<Arc<Spmd>> {
    KNOWN.get(address)
}

/// What is known of a loaded executable is known of the executable behind it.
pub fn share(loaded: usize, executable: usize) {
    if let Some(spmd) = find(loaded) {
        KNOWN.insert(executable, spmd);
    }
    if let Some(given) = GIVEN.get(loaded) {
        GIVEN.insert(executable, given);
    }
}

/// Notes the options that the framework compiled a new executable with, if the inner client got
/// others.
pub fn note_given(address: usize, given: &[u8], to_inner: &[u8]) {
    if given != to_inner {
        GIVEN.insert(address, given.into());
    } else if GIVEN.has(address) {
        // Of one of ours that was there before.
        GIVEN.edit(|rows| rows.remove(&address));
    }
}

/// The options that the framework compiled an executable with; none if the inner plugin knows them.
pub fn given(address: usize) -> Result<Option<Vec<u8>>, Error> {
    Ok(match find(address) {
        Some(spmd) => Some(spmd.options.write()?),
        None => GIVEN.get(address).map(|given| given.to_vec()),
    })
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
    /// On one device of this rank's alone, as far as we can read, which is on that inner client.
    Here(ClientHandle),
    /// On devices of other ranks alone.
    Elsewhere(Box<Options>),
    /// On several devices, of which some are this rank's.
    Several(Box<Options>),
}

/// Where a program with these serialized options is to run.
pub fn place(client: ClientHandle, serialized: &[u8]) -> RunsOn {
    // What we cannot read is for the inner plugin to refuse.
    let (Ok(options), Some(client)) = (Options::read(serialized), clients::find(client)) else {
        return RunsOn::Here(client);
    };
    let devices = options.devices();
    let local = |&device: &i64| client.devices.local(device);
    match &devices {
        Ok(devices)
            if !devices.ids().iter().any(|device| local(device).is_some())
                && (options.is_assigned() || !options.is_for_one()) =>
        {
            RunsOn::Elsewhere(Box::new(options))
        }
        Ok(devices) if options.is_for_one() => {
            let place = devices.ids().first().and_then(local).unwrap_or(0);
            RunsOn::Here(client.home(place).client)
        }
        _ if options.is_for_one() => RunsOn::Here(client.handle),
        _ => RunsOn::Several(Box::new(options)),
    }
}

/// The inner client of the device that a program with these serialized options is for: that of the
/// first of this rank's, if it is not for one device of this rank's alone.
pub fn home(client: ClientHandle, serialized: &[u8]) -> ClientHandle {
    match place(client, serialized) {
        RunsOn::Here(home) => home,
        _ => client,
    }
}

/// Refuses operations of ours in a program that runs on several devices of some rank: they are
/// between ranks.
fn refuse_operations(client: &Client, devices: &Devices, program: &[u8]) -> Result<(), Error> {
    let rank_of = |&id: &i64| id / i64::from(client.devices.of_rank());
    let mut ranks: Vec<_> = devices.ids().iter().map(rank_of).collect();
    ranks.sort_unstable();
    ranks.dedup();
    // The same on all ranks, whichever of them has one device there.
    if ranks.len() == devices.ids().len() {
        return Ok(());
    }
    let ours = |target: &str| has_operations(target.as_bytes()).then_some(0);
    match hlo_rewrite::attributes(program, "comm", ours)? {
        found if !found.is_empty() => Err(Error::unimplemented(format!(
            "a program that runs on {} devices of {} ranks has operations of mpi_cuda or mpi4jax, \
             which are between ranks (this is rank {}): use jax.lax.psum, all_gather, ppermute and \
             so on there, call them in a program for one device of each rank, or leave \
             MPI_CUDA_LOCAL_DEVICES out",
            devices.ids().len(),
            ranks.len(),
            client.rank
        ))),
        _ => Ok(()),
    }
}

fn find_client(client: ClientHandle) -> Result<Arc<Client>, Error> {
    clients::find(client).ok_or_else(|| Error::invalid("unknown client"))
}

/// Serialized options of a program for one device as the inner client takes them: where that has
/// this rank's device alone, the program is compiled for it, whatever device it is for. What we
/// cannot read is for the inner plugin to refuse.
pub fn for_inner<'a>(client: &Client, serialized: &'a [u8]) -> Result<Cow<'a, [u8]>, Error> {
    let options = match Options::read(serialized) {
        Ok(options) if client.devices.is_alone() && options.is_for_one() => options,
        _ => return Ok(serialized.into()),
    };
    match options.devices() {
        Ok(devices) if options.is_assigned() => client.devices.check(devices.ids())?,
        _ => return Ok(serialized.into()),
    }
    let options = options.on_device(client.devices.inner_id());
    Ok(options.write()?.into())
}

/// The serialized device assignment of a loaded executable, as the framework knows the devices;
/// none if the inner plugin knows them by the same numbers.
pub fn assignment(loaded: LoadedHandle) -> Result<Option<Vec<u8>>, Error> {
    let address = loaded.address();
    if let Some(spmd) = find(address) {
        return Ok(Some(spmd.devices.to_assignment()?));
    }
    if let Some(given) = GIVEN.get(address) {
        return Ok(Some(Options::read(&given)?.devices()?.to_assignment()?));
    }
    let device = loaded.device()?;
    let Some((client, id)) = device.and_then(|device| clients::owner(device.address())) else {
        return Ok(None);
    };
    if !client.devices.is_alone() {
        return Ok(None);
    }
    let own = Devices::new(1, 1, vec![i64::from(id)])?;
    Ok(Some(own.to_assignment()?))
}

/// Notes that `loaded`, compiled for one device, runs on that of another rank.
pub fn note_elsewhere(loaded: LoadedHandle) {
    ELSEWHERE.insert(loaded.address(), ());
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
    if let Some(partitioned) = partitioner::partition(program, options)? {
        return Ok(partitioned);
    }
    let options = options.without_code()?;
    shared::module(program, &options, || {
        partition_alone(&known, program, &options)
    })
}

/// Has the inner plugin partition a program on this rank.
fn partition_alone(known: &Client, program: Program<'_>, options: &[u8]) -> Result<Vec<u8>, Error> {
    if let Some(topology) = known.devices.lacking_topology() {
        match topology.compile(program, options) {
            Err(error) if is_for_a_client(&error) => (),
            compiled => return compiled?.get().optimized_program(),
        }
    }
    // XLA's for the CPU compiled for devices of a client only, before 2026. One with threads for
    // each device ends with the compilation.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _others_wait = ONE_AT_A_TIME.lock();
    let all = clients::create_for_all(known.devices.all().len() as i32)?;
    optimized_program(all.get().compile(program, options)?.get())
}

/// Whether an inner plugin says that it compiles for devices of a client only: it has no compiler,
/// or lacks the function, or looks for the devices.
fn is_for_a_client(error: &Error) -> bool {
    let words = [
        "No compiler registered",
        "lacks the function",
        "No matching device found",
    ];
    let said = error.to_string();
    words.iter().any(|words| said.contains(words))
}

/// Compiles the optimized program of `whole`, which is for this rank's device alone, again as it is
/// (`MPI_CUDA_RECOMPILE`).
pub fn recompile(
    home: ClientHandle,
    whole: Owned<LoadedHandle>,
    options: &[u8],
) -> Result<Owned<LoadedHandle>, Error> {
    let optimized = optimized_program(whole.get());
    drop(whole);
    let optimized = optimized?;
    let options = Options::read(options)?;
    let layouts = hlo_rewrite::layouts_of(&optimized)?;
    // On CPUs, where each inner client has one device of this rank's.
    let own = clients::find(home).map_or(0, |client| client.devices.inner_id());
    let for_device = options.for_device(own, &layouts)?;
    compile_module(home, &hlo_rewrite::module_of(&optimized)?, &for_device)
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
    known.devices.check(devices.ids())?;
    let of_rank = known.devices.of_rank();
    let started = (of_rank == 1).then(|| started(world)).flatten();
    refuse_operations(&known, &devices, &optimized)?;
    let rewritten = hlo_rewrite::rewrite_started(&optimized, &devices, started)?;
    replica_groups::register(&rewritten, devices.ids(), world, of_rank)?;
    let ranks = replica_groups::ranks(devices.ids(), of_rank)?;
    let contents = Contents::of_rewritten(&rewritten, &devices, ranks.len(), world, callbacks);
    let for_device = options.for_device(known.devices.inner_id(), &rewritten.layouts)?;
    let places: Vec<(i64, Home)> = devices
        .ids()
        .iter()
        .filter_map(|&id| Some((id, known.home(known.devices.local(id)?))))
        .collect();
    let (_, first) = *places
        .first()
        .ok_or_else(|| Error::internal("a program for no device of this rank"))?;
    let loaded = compile_module(first.client, &rewritten.module, &for_device)?;
    if of_rank > 1 {
        load_others(loaded.get(), &places)?;
    }
    let spmd = Arc::new(Spmd {
        logical: places
            .iter()
            .filter_map(|&(id, _)| devices.logical(id))
            .collect(),
        devices,
        optimized,
        options: options.clone(),
        callbacks,
    });
    KNOWN.insert(loaded.get().address(), spmd);
    Ok((loaded, contents))
}

/// Loads what is loaded on the first of this rank's devices of a program on the others.
fn load_others(loaded: LoadedHandle, places: &[(i64, Home)]) -> Result<(), Error> {
    let others = places[1..].iter();
    let copies = others.map(|(_, home)| serialized::copy(loaded, home.client));
    let local = LocalDevices::new(
        places.iter().map(|(id, _)| *id).collect(),
        places.iter().map(|(_, home)| home.device).collect(),
        copies.collect::<Result<_, _>>()?,
    );
    local_devices::remember(loaded, Arc::new(local));
    Ok(())
}

/// Which all-reduces are started before they are waited for; none if all are whole. The same on all
/// ranks.
fn started(world: &World) -> Option<Sizes> {
    // A GPU's arrays are copied on its stream, in the order of the program.
    if world.size == 1 || world.transfer.is_some() {
        return None;
    }
    let (smallest, small) = match config().overlap {
        Overlap::BetweenNodes if world.node_size < world.size => (16 << 10, 256 << 10),
        Overlap::Never | Overlap::BetweenNodes => return None,
        Overlap::Always => (0, 256),
    };
    Some(Sizes {
        smallest,
        small,
        largest: config().part_bytes.unsigned_abs(),
    })
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
    let known = find_client(client)?;
    let devices = options.devices()?;
    known.devices.check(devices.ids())?;
    let rewritten = hlo_rewrite::rewrite(&optimized, &devices)?;
    let for_device = options.for_device(known.devices.inner_id(), &rewritten.layouts)?;
    let without_code = Options::read(&for_device)?.without_code()?;
    let loaded = compile_module(client, &rewritten.module, &without_code)?;
    let address = loaded.get().address();
    ELSEWHERE.insert(address, ());
    let spmd = Spmd {
        logical: Vec::new(),
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
        RunsOn::Here(_) => {
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
    shared::executable(client, program, options, || {
        client.compile(program, options)
    })
}

fn optimized_program(loaded: LoadedHandle) -> Result<Vec<u8>, Error> {
    loaded.executable()?.get().optimized_program()
}
