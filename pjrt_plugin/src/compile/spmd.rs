//! Programs for several devices. The inner plugin partitions one for all devices of the world; what it
//! made of it is rewritten (`hlo_rewrite`), and compiled again for this rank's device alone. Towards
//! the framework the result is still the program for all of them.

use std::collections::{HashMap, HashSet};
use std::ffi::{c_char, c_void};
use std::sync::{Arc, LazyLock};

use hlo_rewrite::{Devices, Envelope, Options, Refused, Rewritten};
use mpi_runtime::mpi::communicators::COLLECTIVES;
use mpi_runtime::{UniformProgram, World};
use parking_lot::RwLock;
use pjrt_sys::*;

use crate::boundary;
use crate::error::Error;
use crate::ffi::replica_groups;
use crate::inner::call::{call, new_args};
use crate::inner::handles::{destroy_loaded, with_executable};
use crate::pjrt::client;
use crate::plugin::{plugin, world};

/// Format of what [`PJRT_Executable_OptimizedProgram`] gives.
const OPTIMIZED: &str = "hlo_with_config";

/// Above these a launch takes long enough that a caller would rather not wait for it; the same for
/// operations in `python/mpi_cuda/_uniform.py`.
const LONGEST: u64 = 10_000;
const LARGEST: u64 = 16 << 20;

/// What the framework is told about an executable for several devices.
pub struct Spmd {
    devices: Devices,
    /// The partitioned, optimized program, before rewriting.
    optimized: Vec<u8>,
    /// What it was compiled with.
    options: Options,
    /// It calls back into the host.
    callbacks: bool,
}

/// What of ours is in a rewritten program.
#[derive(Clone, Copy, Default)]
pub struct SpmdContents {
    /// It has collectives.
    pub operations: bool,
    /// It calls back into the host.
    pub callbacks: bool,
    /// It is the same on all ranks of the world.
    pub uniform: Option<UniformProgram>,
}

/// By executable and by loaded executable.
static KNOWN: LazyLock<RwLock<HashMap<usize, Arc<Spmd>>>> = LazyLock::new(RwLock::default);

/// Loaded executables for devices of other ranks alone.
static ELSEWHERE: LazyLock<RwLock<HashSet<usize>>> = LazyLock::new(RwLock::default);

/// What is known of an executable or a loaded executable; none if it is for one device.
pub fn find<T>(handle: *const T) -> Option<Arc<Spmd>> {
    let known = KNOWN.read();
    if known.is_empty() {
        return None;
    }
    known.get(&(handle as usize)).cloned()
}

/// Addresses are reused, so this comes before destroying.
pub fn forget<T>(handle: *const T) {
    if find(handle).is_some() {
        KNOWN.write().remove(&(handle as usize));
    }
    if !ELSEWHERE.read().is_empty() {
        ELSEWHERE.write().remove(&(handle as usize));
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Error {
        let remedy = match refused {
            Refused::Instruction { .. } => {
                "express it by psum, pmax, pmin, all_gather, psum_scatter, all_to_all or ppermute"
            }
            _ => {
                "this version of the inner plugin (MPI_CUDA_INNER_PLUGIN) is one that mpi_cuda does \
                 not know; use the one that scripts/setup installs, or report it"
            }
        };
        Error::unimplemented(format!("mpi_cuda: {refused}; {remedy}"))
    }
}

/// Where a program is to run.
pub enum Place {
    /// On this rank's device alone, as far as we can read.
    Here,
    /// On devices of other ranks alone.
    Elsewhere(Box<Options>),
    /// On several devices, of which one is this rank's.
    Several(Box<Options>),
}

/// Where a program with these serialized options is to run.
pub fn place(client: *mut PJRT_Client, serialized: &[u8]) -> Place {
    // What we cannot read is for the inner plugin to refuse.
    let (Ok(options), Some(client)) = (Options::read(serialized), client::find(client)) else {
        return Place::Here;
    };
    match options.devices() {
        Ok(devices)
            if !devices.ids().contains(&i64::from(client.rank))
                && (options.is_assigned() || !options.is_for_one()) =>
        {
            Place::Elsewhere(Box::new(options))
        }
        _ if options.is_for_one() => Place::Here,
        _ => Place::Several(Box::new(options)),
    }
}

/// Notes that `loaded` runs on devices of other ranks alone, or destroys it.
///
/// # Safety
/// It must be live, and compiled by the inner plugin with `options`.
pub unsafe fn note_elsewhere(
    loaded: *mut PJRT_LoadedExecutable,
    options: &Options,
    callbacks: bool,
) -> Result<(), Error> {
    if !options.is_for_one() {
        // Other ranks may load what this one serializes.
        // SAFETY: as the caller promises.
        let whole = unsafe { optimized_program(loaded) }
            .and_then(|optimized| Ok((optimized, options.devices()?)));
        let (optimized, devices) = whole.inspect_err(|_| destroy_loaded(loaded))?;
        let spmd = Spmd {
            devices,
            optimized,
            options: options.clone(),
            callbacks,
        };
        KNOWN.write().insert(loaded as usize, Arc::new(spmd));
    }
    ELSEWHERE.write().insert(loaded as usize);
    Ok(())
}

/// `PJRT_LoadedExecutable_AddressableDevices`
pub unsafe extern "C" fn addressable_devices(
    args: *mut PJRT_LoadedExecutable_AddressableDevices_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            let inner = plugin()
                .inner
                .api()
                .PJRT_LoadedExecutable_AddressableDevices;
            call(inner, args)?;
            if ELSEWHERE.read().contains(&((*args).executable as usize)) {
                (*args).num_addressable_devices = 0;
            }
        }
        Ok(())
    })
}

/// Replaces what the inner plugin compiled for all devices by a program for this rank's.
///
/// # Safety
/// `whole` must be a live executable that was compiled with `options` and nobody uses.
pub unsafe fn specialise(
    client: *mut PJRT_Client,
    whole: *mut PJRT_LoadedExecutable,
    options: &Options,
    callbacks: bool,
) -> Result<(*mut PJRT_LoadedExecutable, SpmdContents), Error> {
    // SAFETY: as the caller promises.
    let optimized = unsafe { optimized_program(whole) };
    // What was compiled for all devices is not needed any more.
    destroy_loaded(whole);
    load(client, optimized?, options, callbacks)
}

/// Compiles the optimized program of `whole`, which is for this rank's device alone, again as it is
/// (`MPI_CUDA_RECOMPILE`).
///
/// # Safety
/// `whole` must be a live executable that was compiled with `options` and nobody uses.
pub unsafe fn recompile(
    client: *mut PJRT_Client,
    whole: *mut PJRT_LoadedExecutable,
    options: &[u8],
) -> Result<*mut PJRT_LoadedExecutable, Error> {
    // SAFETY: as the caller promises.
    let optimized = unsafe { optimized_program(whole) };
    destroy_loaded(whole);
    let optimized = optimized?;
    let options = Options::read(options)?;
    let layouts = hlo_rewrite::layouts_of(&optimized)?;
    let own = options.devices()?.ids().first().copied().unwrap_or(0);
    let for_device = options.for_device(own, &layouts)?;
    compile(client, &hlo_rewrite::module_of(&optimized)?, &for_device)
}

/// Compiles a partitioned, optimized program for this rank's device.
fn load(
    client: *mut PJRT_Client,
    optimized: Vec<u8>,
    options: &Options,
    callbacks: bool,
) -> Result<(*mut PJRT_LoadedExecutable, SpmdContents), Error> {
    let world = world().ok_or_else(|| Error::internal("a program before the world"))?;
    let own = i64::from(
        client::find(client)
            .ok_or_else(|| Error::invalid("mpi_cuda: unknown client"))?
            .rank,
    );
    let devices = options.devices()?;
    let rewritten = hlo_rewrite::rewrite(&optimized, &devices)?;
    replica_groups::register(&rewritten, devices.ids(), world)?;
    let contents = SpmdContents::of(&rewritten, &devices, world, callbacks);
    let for_device = options.for_device(own, &rewritten.layouts)?;
    let loaded = compile(client, &rewritten.module, &for_device)?;
    let spmd = Arc::new(Spmd {
        devices,
        optimized,
        options: options.clone(),
        callbacks,
    });
    KNOWN.write().insert(loaded as usize, spmd);
    Ok((loaded, contents))
}

/// Loads what [`serialize`] wrote, with the options given or those that it was compiled with; none if
/// the bytes are something else.
pub fn deserialize(
    client: *mut PJRT_Client,
    serialized: &[u8],
    options: &[u8],
) -> Result<Option<(*mut PJRT_LoadedExecutable, SpmdContents)>, Error> {
    let Some(envelope) = Envelope::read(serialized)? else {
        return Ok(None);
    };
    let given = if options.is_empty() {
        &envelope.options[..]
    } else {
        options
    };
    let loaded = match place(client, given) {
        Place::Several(options) => load(client, envelope.optimized, &options, envelope.callbacks)?,
        Place::Elsewhere(options) => {
            let without_passes = options.without_passes()?;
            let loaded = compile_for_all(client, &envelope.optimized, &without_passes)?;
            // SAFETY: just compiled.
            unsafe { note_elsewhere(loaded, &options, envelope.callbacks)? };
            (loaded, SpmdContents::default())
        }
        Place::Here => {
            return Err(Error::invalid(
                "mpi_cuda: a program for several devices cannot be loaded for one: give the options \
                 that it was compiled with, or none",
            ));
        }
    };
    Ok(Some(loaded))
}

fn compile_for_all(
    client: *mut PJRT_Client,
    optimized: &[u8],
    options: &[u8],
) -> Result<*mut PJRT_LoadedExecutable, Error> {
    compile(client, &hlo_rewrite::module_of(optimized)?, options)
}

/// `PJRT_Executable_Serialize`: a program for several devices as any rank can load it.
pub unsafe extern "C" fn serialize(args: *mut PJRT_Executable_Serialize_Args) -> *mut PJRT_Error {
    unsafe extern "C" fn free(serialized: *mut PJRT_SerializedExecutable) {
        // SAFETY: the box made below, freed once.
        drop(unsafe { Box::from_raw(serialized.cast::<Vec<u8>>()) });
    }
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            let Some(spmd) = find((*args).executable) else {
                return call(plugin().inner.api().PJRT_Executable_Serialize, args);
            };
            let envelope = Envelope {
                optimized: spmd.optimized.clone(),
                options: spmd.options.write()?,
                callbacks: spmd.callbacks,
            };
            let serialized = Box::new(envelope.write()?);
            (*args).serialized_bytes = serialized.as_ptr().cast();
            (*args).serialized_bytes_size = serialized.len();
            (*args).serialized_executable = Box::into_raw(serialized).cast::<c_void>().cast();
            (*args).serialized_executable_deleter = Some(free);
        }
        Ok(())
    })
}

impl SpmdContents {
    fn of(
        rewritten: &Rewritten,
        devices: &Devices,
        world: &World,
        callbacks: bool,
    ) -> SpmdContents {
        let everybody = devices.ids().len() == world.size as usize;
        let short = rewritten.executed <= LONGEST && rewritten.bytes <= LARGEST;
        let uniform = rewritten.collectives > 0 && rewritten.other_ordered == 0 && everybody;
        let uniform = uniform && short && !callbacks;
        SpmdContents {
            operations: rewritten.collectives > 0,
            callbacks,
            uniform: uniform.then_some(UniformProgram {
                comm: COLLECTIVES,
                sequence: rewritten.sequence,
                balance: None,
            }),
        }
    }
}

/// Compiles a module with the inner plugin.
fn compile(
    client: *mut PJRT_Client,
    module: &[u8],
    options: &[u8],
) -> Result<*mut PJRT_LoadedExecutable, Error> {
    const FORMAT: &str = "hlo";
    let mut program = new_args::<PJRT_Program>();
    program.code = module.as_ptr().cast_mut().cast();
    program.code_size = module.len();
    program.format = FORMAT.as_ptr().cast();
    program.format_size = FORMAT.len();
    let mut args = new_args::<PJRT_Client_Compile_Args>();
    args.client = client;
    args.program = &program;
    args.compile_options = options.as_ptr().cast();
    args.compile_options_size = options.len();
    // SAFETY: valid arguments, which the inner plugin copies.
    unsafe { call(plugin().inner.api().PJRT_Client_Compile, &mut args) }?;
    Ok(args.executable)
}

/// # Safety
/// `loaded` must be live.
unsafe fn optimized_program(loaded: *mut PJRT_LoadedExecutable) -> Result<Vec<u8>, Error> {
    let optimized = plugin().inner.api().PJRT_Executable_OptimizedProgram;
    // SAFETY: as the caller promises; the first call asks for the size, the second fills that many
    // bytes.
    unsafe {
        with_executable(loaded, |executable| {
            let mut program = new_args::<PJRT_Program>();
            let mut args = new_args::<PJRT_Executable_OptimizedProgram_Args>();
            args.executable = executable;
            args.program = &mut program;
            call(optimized, &mut args)?;
            let mut code = vec![0u8; program.code_size];
            (*args.program).code = code.as_mut_ptr().cast();
            call(optimized, &mut args)?;
            Ok(code)
        })
    }
}

/// `PJRT_LoadedExecutable_GetExecutable`
pub unsafe extern "C" fn get_executable(
    args: *mut PJRT_LoadedExecutable_GetExecutable_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            call(
                plugin().inner.api().PJRT_LoadedExecutable_GetExecutable,
                args,
            )?;
            if let Some(spmd) = find((*args).loaded_executable) {
                KNOWN.write().insert((*args).executable as usize, spmd);
            }
        }
        Ok(())
    })
}

/// `PJRT_Executable_Destroy`
pub unsafe extern "C" fn destroy_executable(
    args: *mut PJRT_Executable_Destroy_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            forget((*args).executable);
            call(plugin().inner.api().PJRT_Executable_Destroy, args)
        }
    })
}

/// `PJRT_Executable_NumPartitions`
pub unsafe extern "C" fn num_partitions(
    args: *mut PJRT_Executable_NumPartitions_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            match find((*args).executable) {
                Some(spmd) => (*args).num_partitions = spmd.devices.partitions(),
                None => call(plugin().inner.api().PJRT_Executable_NumPartitions, args)?,
            }
        }
        Ok(())
    })
}

/// `PJRT_Executable_NumReplicas`
pub unsafe extern "C" fn num_replicas(
    args: *mut PJRT_Executable_NumReplicas_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            match find((*args).executable) {
                Some(spmd) => (*args).num_replicas = spmd.devices.replicas(),
                None => call(plugin().inner.api().PJRT_Executable_NumReplicas, args)?,
            }
        }
        Ok(())
    })
}

/// `PJRT_Executable_OptimizedProgram`: the partitioned program with its collectives.
pub unsafe extern "C" fn optimized(
    args: *mut PJRT_Executable_OptimizedProgram_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments, and, if there is a buffer, one of the size that
        // it was told.
        unsafe {
            let Some(spmd) = find((*args).executable) else {
                return call(plugin().inner.api().PJRT_Executable_OptimizedProgram, args);
            };
            let program = &mut *(*args).program;
            program.format = OPTIMIZED.as_ptr().cast();
            program.format_size = OPTIMIZED.len();
            let size = spmd.optimized.len();
            if program.code.is_null() {
                program.code_size = size;
            } else if program.code_size < size {
                return Err(Error::invalid(format!(
                    "mpi_cuda: the optimized program has {size} bytes, and the buffer {}",
                    program.code_size
                )));
            } else {
                let from = spmd.optimized.as_ptr().cast::<c_char>();
                std::ptr::copy_nonoverlapping(from, program.code, size);
            }
        }
        Ok(())
    })
}

/// `PJRT_LoadedExecutable_GetDeviceAssignment`
pub unsafe extern "C" fn device_assignment(
    args: *mut PJRT_LoadedExecutable_GetDeviceAssignment_Args,
) -> *mut PJRT_Error {
    unsafe extern "C" fn free(assignment: *mut PJRT_DeviceAssignmentSerialized) {
        // SAFETY: the box made below, freed once.
        drop(unsafe { Box::from_raw(assignment.cast::<Vec<u8>>()) });
    }
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            let Some(spmd) = find((*args).executable) else {
                let inner = plugin()
                    .inner
                    .api()
                    .PJRT_LoadedExecutable_GetDeviceAssignment;
                return call(inner, args);
            };
            let serialized = Box::new(spmd.devices.to_assignment()?);
            (*args).serialized_bytes = serialized.as_ptr().cast();
            (*args).serialized_bytes_size = serialized.len();
            (*args).serialized_device_assignment =
                Box::into_raw(serialized).cast::<c_void>().cast();
            (*args).serialized_device_assignment_deleter = Some(free);
        }
        Ok(())
    })
}
