//! What the ranks of a node compile alike, one of them compiles for all. Ranks whose program,
//! options, inner plugin and settings of XLA are the same to the last byte share the partitioned
//! module of a program for several devices, and the machine code of one for one device. Whoever
//! comes second waits, or compiles for itself where that may not end
//! (`mpi_runtime::node::results`).
//!
//! GPUs tune kernels and load them by themselves, so nothing is shared there.

#![forbid(unsafe_code)]

use std::env;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use hlo_rewrite::Options;
use mpi_runtime::log;
use mpi_runtime::node::results::{Claim, Found};

use crate::config::Log;
use crate::error::Error;
use crate::fork;
use crate::inner::handles::{ClientHandle, LoadedHandle, Owned, Program};
use crate::inner::{inner, on_gpu, serialized};
use crate::plugin::{config, world};
use crate::search::contains;

/// What is shared of a program; the same input makes two things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The partitioned, optimized module.
    Module,
    /// The serialized executable for one device.
    Executable,
}

/// How many modules and executables this rank has got from others.
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// XLA's options, and how many threads it has.
const SETTINGS: [&str; 2] = ["XLA_FLAGS", "NPROC"];

/// Bytes of the largest program whose executable is shared: whoever loads one keeps what it came
/// from, and long constants are in all of it.
const LARGEST: usize = 8 << 20;

/// What a user looks at of a compilation has to come from each rank.
const DUMP: &[u8] = b"xla_dump";

/// See [`TAKEN`].
pub fn taken() -> u64 {
    TAKEN.load(Ordering::Relaxed)
}

/// The partitioned module that `make` makes of a program, by this rank or another one of its node.
pub fn module(
    program: Program<'_>,
    options: &[u8],
    make: impl FnOnce() -> Result<Vec<u8>, Error>,
) -> Result<Vec<u8>, Error> {
    match find(Stage::Module, program, options) {
        Found::Made(rank, module) => {
            note_taken(Stage::Module, rank, module.len());
            Ok(module)
        }
        Found::Claimed(claim) => {
            let module = make()?;
            publish(claim, &module);
            Ok(module)
        }
        Found::Alone => make(),
    }
}

/// The executable that `compile` makes of a program for one device, or one that is loaded from what
/// another rank of the node has made. `options` are those of the inner plugin.
pub fn executable(
    client: ClientHandle,
    program: Program<'_>,
    options: &[u8],
    compile: impl FnOnce() -> Result<Owned<LoadedHandle>, Error>,
) -> Result<Owned<LoadedHandle>, Error> {
    if program.code.len() > LARGEST {
        return compile();
    }
    match find(Stage::Executable, program, options) {
        Found::Made(rank, bytes) => match client.load(&bytes, &[]) {
            Ok(loaded) => {
                serialized::keep(loaded.get(), &bytes, &[]);
                note_taken(Stage::Executable, rank, bytes.len());
                Ok(loaded)
            }
            // Something that it calls may be missing here: the compilation says what.
            Err(error) => {
                debug(|| format!("compiles by itself what rank {rank} has compiled: {error}"));
                compile()
            }
        },
        Found::Claimed(claim) => {
            let loaded = compile()?;
            // A plugin that serializes nothing shares nothing.
            if let Ok(bytes) = loaded.get().executable()?.get().serialize() {
                publish(claim, &bytes);
            }
            Ok(loaded)
        }
        Found::Alone => compile(),
    }
}

/// Looks for what another rank makes of a program, and waits for it, or claims it.
fn find(stage: Stage, program: Program<'_>, options: &[u8]) -> Found<'static> {
    let results = world().and_then(|world| world.results.as_ref());
    let Some(results) = results.filter(|_| config().share_compiled && !on_gpu()) else {
        return Found::Alone;
    };
    let settings = SETTINGS.map(|name| env::var_os(name).unwrap_or_default().into_encoded_bytes());
    // A file's name, where it begins otherwise.
    let is_file =
        !settings[0].trim_ascii().is_empty() && !settings[0].trim_ascii().starts_with(b"-");
    let dumps = is_file || contains(&settings[0], DUMP) || contains(options, DUMP);
    if fork::is_child() || dumps {
        return Found::Alone;
    }
    let Ok(options) = Options::read(options).and_then(|options| options.in_order()) else {
        return Found::Alone;
    };
    let cores = thread::available_parallelism().map_or(0, |cores| cores.get());
    let plugin = inner();
    let who = format!(
        "{stage:?} {} {} {} {cores}",
        env!("CARGO_PKG_VERSION"),
        plugin.path.display(),
        plugin.build()
    );
    let [flags, threads] = &settings;
    results.find(&[
        who.as_bytes(),
        flags,
        threads,
        program.format,
        &options,
        program.code,
    ])
}

fn publish(claim: Claim<'_>, bytes: &[u8]) {
    if let Err(error) = claim.publish(bytes) {
        debug(|| format!("other ranks compile by themselves: {error}"));
    }
}

fn note_taken(stage: Stage, rank: usize, bytes: usize) {
    TAKEN.fetch_add(1, Ordering::Relaxed);
    debug(|| {
        let what = match stage {
            Stage::Module => "partitioned",
            Stage::Executable => "compiled",
        };
        format!("took what rank {rank} has {what}: {bytes} bytes")
    });
}

fn debug(words: impl FnOnce() -> String) {
    if config().log >= Log::Debug {
        log::line(&words());
    }
}
