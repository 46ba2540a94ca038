//! Programs with custom calls that the framework partitions itself, by functions that only its own
//! XLA can call: JAX's `custom_partitioning` and `inspect_array_sharding`. The framework is handed
//! such a program, has its XLA partition and optimize it for as many devices, and gives the module
//! back. From there on it is as any other.
//!
//! Custom calls that are registered as batch partitionable, as JAX's for LAPACK are, need no more
//! than their name known. The inner plugin does not know it, and would have every device compute
//! the whole batch. So their programs go the same way where that is possible.

use hlo_rewrite::Options;
use mpi_runtime::log;
use parking_lot::Mutex;

use crate::config::Log;
use crate::error::Error;
use crate::inner::handles::Program;
use crate::plugin::{config, world};
use crate::search::contains;

/// Has the framework partition a program in MLIR, for devices numbered from 0, with serialized
/// options; it gives an `HloModuleProto`, or says what it could not do.
pub type Partition = fn(program: &[u8], options: &[u8]) -> Result<Vec<u8>, String>;

static PARTITION: Mutex<Option<Partition>> = Mutex::new(None);

/// Custom calls that the framework partitions, and whether it must.
static CALLS: Mutex<Vec<(Vec<u8>, bool)>> = Mutex::new(Vec::new());

/// What jaxlib partitions without a word to plugins (`xla/python/inspect_sharding.cc`).
const OF_JAXLIB: &[u8] = b"InspectSharding";

/// JAX's client has threads for each device: so many at most, and for all ranks of a node.
const MOST: usize = 1024;
const MOST_OF_NODE: usize = 16 << 10;

/// Notes that the framework partitions custom calls of that name, as nobody else can if it `must`.
pub fn register(name: &[u8], must: bool) {
    let mut calls = CALLS.lock();
    if !name.is_empty() && calls.iter().all(|(known, _)| known != name) {
        calls.push((name.to_vec(), must));
    }
}

/// Installs how the framework is asked.
pub fn set_partition(partition: Option<Partition>) {
    *PARTITION.lock() = partition;
}

/// Has the framework partition and optimize a program, if it has custom calls that it partitions.
pub fn partition(program: Program<'_>, options: &Options) -> Result<Option<Vec<u8>>, Error> {
    let Some((name, must)) = call_in(program.code) else {
        return Ok(None);
    };
    match ask(program, options) {
        Ok(partitioned) => Ok(Some(partitioned)),
        Err(Failure { words, known }) if must => {
            let words =
                format!("{name} is partitioned by the XLA of the framework, which failed: {words}");
            Err(match known {
                true => Error::unimplemented(words),
                false => Error::internal(words),
            })
        }
        Err(Failure { words, known }) => {
            // Where the reason is this rank's own, others may have another program.
            if !known || config().log >= Log::Debug {
                log::line(&format!(
                    "every device computes the whole of {name}: {words}"
                ));
            }
            Ok(None)
        }
    }
}

/// A custom call in a program that the framework partitions, and whether it must.
fn call_in(program: &[u8]) -> Option<(String, bool)> {
    let calls = CALLS.lock();
    let all = calls.iter().map(|(name, must)| (&name[..], *must));
    let found = all
        .chain([(OF_JAXLIB, true)])
        .filter(|(name, _)| contains(program, name));
    let (name, must) = found.max_by_key(|(_, must)| *must)?;
    Some((String::from_utf8_lossy(name).into_owned(), must))
}

/// Why a program was not partitioned, and whether that is known before it is tried.
struct Failure {
    words: String,
    known: bool,
}

fn ask(program: Program<'_>, options: &Options) -> Result<Vec<u8>, Failure> {
    let known = |words: String| Failure { words, known: true };
    let Some(partition) = *PARTITION.lock() else {
        return Err(known(
            "the framework has not told how to ask it (mpi_cuda_set_partitioner); JAX needs the \
             Python package mpi_cuda for that"
                .into(),
        ));
    };
    if program.format != b"mlir" {
        return Err(known("it takes programs in MLIR only".into()));
    }
    let (replicas, partitions) = options.counts();
    let devices = replicas * partitions;
    let ranks = world().map_or(1, |world| world.node_size.max(1) as usize);
    let most = MOST.min(MOST_OF_NODE / ranks);
    if devices > most {
        return Err(known(format!(
            "the program is for {devices} devices, and that XLA has threads for each: {most} at \
             most, with {ranks} ranks on this node; take a mesh of fewer"
        )));
    }
    let failed = |words: String| Failure {
        words,
        known: false,
    };
    let numbered = options
        .numbered()
        .and_then(|numbered| numbered.without_code());
    let numbered = numbered.map_err(|refused| failed(refused.to_string()))?;
    let module = partition(program.code, &numbered).map_err(failed)?;
    hlo_rewrite::program_of(&module, options).map_err(|refused| failed(refused.to_string()))
}
