//! Compiling and loading programs: what is ours in them is noted, what we cannot run is refused.

pub mod spmd;

use std::ffi::c_char;
use std::sync::{Once, OnceLock};
use std::time::Instant;

use mpi_runtime::UniformProgram;
use mpi_runtime::log;
use pjrt_sys::*;

use crate::boundary;
use crate::compile::spmd::Place;
use crate::config::{Device, Log};
use crate::error::Error;
use crate::ffi::{CALLBACK_MARK, OLD_UNIFORM_MARK, UNIFORM_MARK, has_operations};
use crate::inner::call::{bytes, call, new_args, slice};
use crate::inner::handles::{destroy_executable, destroy_loaded, with_executable};
use crate::launch::{self, ProgramInfo};
use crate::plugin::plugin;
use crate::search::{contains, find};

/// XLA runs a program with fewer floating-point operations on the calling thread
/// (`xla/pjrt/cpu/cpu_client.cc`, `cheap_computation_`).
const CHEAP_FLOPS: f32 = 1000.0;

/// `PJRT_Client_Compile`
pub unsafe extern "C" fn compile(args: *mut PJRT_Client_Compile_Args) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            let program = &*(*args).program;
            let mut ours = Contents::of(bytes(program.code, program.code_size));
            let options = bytes((*args).compile_options, (*args).compile_options_size);
            let place = spmd::place((*args).client, options);
            let start = Instant::now();
            let first_options = match (&place, plugin().inner.device) {
                (Place::Several(options), Device::Cuda) => options.tuned_alone()?,
                (Place::Several(options), _) => options.without_code()?,
                _ => Vec::new(),
            };
            if !first_options.is_empty() {
                (*args).compile_options = first_options.as_ptr().cast();
                (*args).compile_options_size = first_options.len();
            }
            let compiled = call(plugin().inner.api().PJRT_Client_Compile, args);
            (*args).compile_options = options.as_ptr().cast();
            (*args).compile_options_size = options.len();
            compiled.map_err(with_remedy)?;
            let first = start.elapsed();
            match place {
                Place::Here if plugin().config.recompile => {
                    let whole = std::mem::replace(&mut (*args).executable, std::ptr::null_mut());
                    (*args).executable = spmd::recompile((*args).client, whole, options)?;
                    log::line("compiled an optimized program again as it is");
                }
                Place::Here => {}
                Place::Elsewhere(_) if ours.operations => {
                    let refused = std::mem::replace(&mut (*args).executable, std::ptr::null_mut());
                    destroy_loaded(refused);
                    return Err(elsewhere());
                }
                Place::Elsewhere(options) => {
                    return spmd::note_elsewhere((*args).executable, &options, ours.callbacks);
                }
                Place::Several(options) => {
                    let whole = std::mem::replace(&mut (*args).executable, std::ptr::null_mut());
                    let (client, callbacks) = ((*args).client, ours.callbacks);
                    let (loaded, native) = spmd::specialise(client, whole, &options, callbacks)?;
                    (*args).executable = loaded;
                    ours.merge(native);
                    if plugin().config.log >= Log::Debug {
                        log::line(&format!(
                            "compiled a program for several devices in {:.1} ms: {:.1} ms \
                             for all of them, the rest for this rank's",
                            start.elapsed().as_secs_f64() * 1e3,
                            first.as_secs_f64() * 1e3
                        ));
                    }
                }
            }
            note((*args).executable, ours)
        }
    })
}

/// XLA's words for what its plugins cannot do, with what to do instead.
fn with_remedy(error: Error) -> Error {
    let message = error.to_string();
    if !message.contains("untyped custom call") {
        return error;
    }
    error.discard();
    Error::unimplemented(format!(
        "mpi_cuda: {message}: a plugin runs typed targets only, which XLA asks for everywhere \
         (https://docs.jax.dev/en/latest/ffi.html); register it with jax.ffi.register_ffi_target \
         and api_version=1, or run without the extension that brings it"
    ))
}

/// On this rank a program with operations would not run, and the others would wait for it.
fn elsewhere() -> Error {
    Error::precondition(
        "mpi_cuda: a program with operations is to run on the device of another rank: jax.devices() has \
         those of all ranks; put its arguments on jax.local_devices()[0], or leave device= out; \
         MPI_CUDA_TOPOLOGY=local shows each rank its own device alone",
    )
}

/// `PJRT_Compile`: without a client, so only for what needs no operations of ours.
pub unsafe extern "C" fn compile_ahead(args: *mut PJRT_Compile_Args) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: passed through.
        unsafe {
            call(plugin().inner.api().PJRT_Compile, args)?;
            refuse_several_devices((*args).executable).inspect_err(|_| {
                let refused = std::mem::replace(&mut (*args).executable, std::ptr::null_mut());
                destroy_executable(refused);
            })
        }
    })
}

/// `PJRT_Executable_DeserializeAndLoad`
pub unsafe extern "C" fn deserialize_and_load(
    args: *mut PJRT_Executable_DeserializeAndLoad_Args,
) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        unsafe {
            let serialized = bytes(
                (*args).serialized_executable,
                (*args).serialized_executable_size,
            );
            let mut ours = Contents::of(serialized);
            let options = overridden_options(args);
            let client = (*args).client;
            if let Some((loaded, native)) = spmd::deserialize(client, serialized, options)? {
                (*args).loaded_executable = loaded;
                ours.merge(native);
                return note(loaded, ours);
            }
            call(
                plugin().inner.api().PJRT_Executable_DeserializeAndLoad,
                args,
            )?;
            if !options.is_empty()
                && let Place::Elsewhere(options) = spmd::place(client, options)
            {
                let loaded = (*args).loaded_executable;
                return spmd::note_elsewhere(loaded, &options, ours.callbacks);
            }
            note((*args).loaded_executable, ours)
        }
    })
}

/// The options that replace those in a serialized program; empty if there are none.
///
/// # Safety
/// `args` must be valid for its `struct_size`.
unsafe fn overridden_options<'a>(args: *const PJRT_Executable_DeserializeAndLoad_Args) -> &'a [u8] {
    type Args = PJRT_Executable_DeserializeAndLoad_Args;
    const END: usize =
        std::mem::offset_of!(Args, overridden_serialized_compile_options_size) + size_of::<usize>();
    // SAFETY: as the caller promises; older frameworks have no such options.
    unsafe {
        if (*args).struct_size < END {
            return &[];
        }
        bytes(
            (*args).overridden_serialized_compile_options,
            (*args).overridden_serialized_compile_options_size,
        )
    }
}

/// What of ours a program calls; the names of targets stand in every format as they are.
#[derive(Clone, Copy)]
struct Contents {
    operations: bool,
    /// Its caller reads a status.
    status: bool,
    callbacks: bool,
    /// Its operations are the same collectives and exchanges on every rank.
    uniform: Option<UniformProgram>,
}

impl Contents {
    /// Adds the collectives of a program for several devices.
    fn merge(&mut self, native: spmd::SpmdContents) {
        self.operations |= native.operations;
        self.callbacks |= native.callbacks;
        self.uniform = native.uniform;
    }

    fn of(program: &[u8]) -> Contents {
        Contents {
            operations: has_operations(program),
            status: crate::ffi::status::is_read(program),
            callbacks: contains(program, CALLBACK_MARK.as_bytes()),
            uniform: after_mark(program).and_then(uniform),
        }
    }
}

/// What follows the mark of a uniform program, by its name today or its old one.
fn after_mark(program: &[u8]) -> Option<&[u8]> {
    static WARNED: Once = Once::new();
    let after = |mark: &str| Some(&program[find(program, mark.as_bytes())? + mark.len()..]);
    after(UNIFORM_MARK).or_else(|| {
        let found = after(OLD_UNIFORM_MARK)?;
        WARNED.call_once(|| {
            log::line(&format!(
                "the attribute {OLD_UNIFORM_MARK}... is now called {UNIFORM_MARK}...: use that name"
            ));
        });
        Some(found)
    })
}

/// Reads what follows [`UNIFORM_MARK`]: the communicator, `_`, the hash of the sequence and, if there
/// are exchanges, `_` and their balance; both of 16 hexadecimal digits.
fn uniform(text: &[u8]) -> Option<UniformProgram> {
    let number = |range| {
        let digits = std::str::from_utf8(text.get(range)?).ok()?;
        u64::from_str_radix(digits, 16).ok()
    };
    (text.get(1) == Some(&b'_')).then_some(())?;
    Some(UniformProgram {
        comm: number(0..1)? as i64,
        sequence: number(2..18)?,
        balance: match text.get(18) {
            Some(b'_') => Some(number(19..35)?),
            _ => None,
        },
    })
}

/// Notes a loaded executable, or destroys and refuses it.
///
/// # Safety
/// `loaded` must be a live executable of the inner plugin.
unsafe fn note(loaded: *mut PJRT_LoadedExecutable, ours: Contents) -> Result<(), Error> {
    // SAFETY: `loaded` is live, and so is the executable got from it.
    unsafe {
        let cheap = with_executable(loaded, |executable| {
            // A rewritten program is for one device by now.
            refuse_several_devices(executable)?;
            // Only XLA:CPU runs programs on the calling thread.
            let cpu = plugin().inner.device == Device::Cpu;
            Ok(ours.operations && cpu && is_cheap(executable))
        });
        let cheap = cheap.inspect_err(|_| {
            spmd::forget(loaded);
            destroy_loaded(loaded);
        })?;
        if ours.operations || ours.callbacks {
            let program = ProgramInfo {
                operations: ours.operations,
                callbacks: ours.callbacks,
                cheap,
                status: ours.status,
                uniform: ours.uniform.filter(|_| cheap && !ours.callbacks),
            };
            launch::remember(loaded, program);
            if cheap {
                launch::prepare_async_barrier(loaded);
            }
        }
    }
    Ok(())
}

/// # Safety
/// `executable` must be live.
unsafe fn refuse_several_devices(executable: *mut PJRT_Executable) -> Result<(), Error> {
    let api = plugin().inner.api();
    let mut partitions = new_args::<PJRT_Executable_NumPartitions_Args>();
    partitions.executable = executable;
    let mut replicas = new_args::<PJRT_Executable_NumReplicas_Args>();
    replicas.executable = executable;
    // SAFETY: as the caller promises.
    unsafe {
        call(api.PJRT_Executable_NumPartitions, &mut partitions)?;
        call(api.PJRT_Executable_NumReplicas, &mut replicas)?;
    }
    let (partitions, replicas) = (partitions.num_partitions, replicas.num_replicas);
    if partitions * replicas > 1 {
        return Err(Error::unimplemented(format!(
            "mpi_cuda: a program for {partitions} partitions and {replicas} replicas can only be \
             compiled, or loaded from what this version serialized, with a client, since each rank runs \
             its own part of it"
        )));
    }
    Ok(())
}

/// # Safety
/// `executable` must be live.
unsafe fn is_cheap(executable: *mut PJRT_Executable) -> bool {
    let mut cost = new_args::<PJRT_Executable_GetCostAnalysis_Args>();
    cost.executable = executable;
    // SAFETY: as the caller promises; the properties live as long as the executable.
    unsafe {
        if call(
            plugin().inner.api().PJRT_Executable_GetCostAnalysis,
            &mut cost,
        )
        .is_err()
        {
            return true;
        }
        let flops = slice(cost.properties, cost.num_properties)
            .iter()
            .find(|property| {
                bytes(property.name, property.name_size) == b"flops"
                    && property.type_ == PJRT_NamedValue_kFloat
            });
        // Unknown counts as cheap: the barrier is never wrong, only slower.
        flops.is_none_or(|flops| flops.__bindgen_anon_1.float_value < 2.0 * CHEAP_FLOPS)
    }
}

/// `PJRT_Client_PlatformVersion`: the inner one, and who we are.
pub unsafe extern "C" fn platform_version(
    args: *mut PJRT_Client_PlatformVersion_Args,
) -> *mut PJRT_Error {
    static TEXT: OnceLock<String> = OnceLock::new();
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments; the inner string lives with the client.
        unsafe {
            call(plugin().inner.api().PJRT_Client_PlatformVersion, args)?;
            let text = TEXT.get_or_init(|| {
                let inner = bytes((*args).platform_version, (*args).platform_version_size);
                // Without our name: JAX takes a version with "cuda" in it for a GPU's.
                format!(
                    "MPI ranks {} over {}",
                    env!("CARGO_PKG_VERSION"),
                    String::from_utf8_lossy(inner)
                )
            });
            (*args).platform_version = text.as_ptr().cast::<c_char>();
            (*args).platform_version_size = text.len();
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_mark_is_accepted() {
        let old = b"...mpi_cuda_alike_1_00000000000000ff...";
        let new = b"...mpi_cuda_uniform_1_00000000000000ff...";
        assert!(after_mark(old).and_then(uniform).is_some());
        assert_eq!(
            after_mark(old).and_then(uniform),
            after_mark(new).and_then(uniform)
        );
        assert!(after_mark(b"mpi_cuda_allreduce").is_none());
    }

    #[test]
    fn reads_what_follows_the_mark() {
        let collectives = uniform(b"1_00000000000000ff\0rest").unwrap();
        assert_eq!((collectives.comm, collectives.sequence), (1, 255));
        assert_eq!(collectives.balance, None);
        let exchanges = uniform(b"0_00000000000000ff_fffffffffffffffe").unwrap();
        assert_eq!((exchanges.comm, exchanges.balance), (0, Some(u64::MAX - 1)));
        for wrong in [
            "",
            "1",
            "1_0",
            "1_00000000000000f",
            "1_00000000000000ff_0",
            "x_00000000000000ff",
        ] {
            assert_eq!(uniform(wrong.as_bytes()), None);
        }
    }
}
