//! The table of variables: the name of each, the values it takes, what it does, and how it is read.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use mpi_runtime::engine::recorder::file::Keep;
use mpi_runtime::mpi::family::Family;
use mpi_runtime::transfer::choice::Asked;

use super::settings::{Config, DeviceKind, LARGEST_PART, Log, Orders, Overlap, Pretend, Topology};

/// A variable of ours: its name, the values it takes, what it does, and how it is read.
pub struct Variable {
    /// Name in the environment; the create option is the same in lower case without `MPI_CUDA_`.
    pub name: &'static str,
    /// A name that is still read, with a warning.
    pub old_name: Option<&'static str>,
    /// Values it takes; the first is the default.
    pub values: &'static str,
    /// What it does.
    pub meaning: &'static str,
    /// Puts a value into the configuration; none if it is not understood.
    pub read: fn(&mut Config, &str) -> Option<()>,
}

/// All variables this library reads.
pub const VARIABLES: &[Variable] = &[
    Variable {
        name: "MPI_CUDA_DEVICE",
        old_name: None,
        values: "auto, cpu, cuda",
        meaning: "which XLA plugin to wrap",
        read: |config, text| {
            set(
                &mut config.device,
                one_of(
                    &[
                        ("auto", DeviceKind::Auto),
                        ("cpu", DeviceKind::Cpu),
                        ("cuda", DeviceKind::Cuda),
                    ],
                    text,
                ),
            )
        },
    },
    Variable {
        name: "MPI_CUDA_INNER_PLUGIN",
        old_name: None,
        values: "path",
        meaning: "the XLA plugin to wrap, as a file",
        read: |config, text| set(&mut config.inner_plugin, Some(Some(PathBuf::from(text)))),
    },
    Variable {
        name: "MPI_CUDA_TOPOLOGY",
        old_name: None,
        values: "global, local",
        meaning: "show all ranks' devices, or only this rank's",
        read: |config, text| {
            set(
                &mut config.topology,
                one_of(
                    &[("global", Topology::Global), ("local", Topology::Local)],
                    text,
                ),
            )
        },
    },
    Variable {
        name: "MPI_CUDA_LOCAL_DEVICES",
        old_name: None,
        values: "1, devices up to 256",
        meaning: "how many devices each rank has, on CPUs",
        read: |config, text| set(&mut config.local_devices, number(text, 1..=256)),
    },
    Variable {
        name: "MPI_CUDA_THREAD_ORDER",
        old_name: None,
        values: "each, one",
        meaning: "whether each thread's launches have an order of their own, or all share one",
        read: |config, text| {
            set(
                &mut config.thread_order,
                one_of(&[("each", Orders::Each), ("one", Orders::One)], text),
            )
        },
    },
    Variable {
        name: "MPI_CUDA_MPI",
        old_name: None,
        values: "openmpi, mpich, mpi_abi",
        meaning: "which MPI, where neither the process nor the launcher says",
        read: |config, text| set(&mut config.mpi, Family::from_name(text).map(Some)),
    },
    Variable {
        name: "MPI_CUDA_LIBMPI",
        old_name: None,
        values: "path",
        meaning: "the MPI library, as a file or its folder; default: the launcher's",
        read: |config, text| set(&mut config.libmpi, Some(Some(PathBuf::from(text)))),
    },
    Variable {
        name: "MPI_CUDA_SHIM_DIR",
        old_name: None,
        values: "path",
        meaning: "folder of the MPI shims; default: beside the plugin",
        read: |config, text| set(&mut config.shim_dir, Some(Some(PathBuf::from(text)))),
    },
    Variable {
        name: "MPI_CUDA_SINGLETON",
        old_name: None,
        values: "0, 1",
        meaning: "allow separate worlds of size 1 under a launcher of several",
        read: |config, text| set(&mut config.singleton, flag(text)),
    },
    Variable {
        name: "MPI_CUDA_WARN_AFTER",
        old_name: None,
        values: "60, seconds above 0",
        meaning: "print an operation, or a start of MPI, that waits longer than this",
        read: |config, text| set(&mut config.warn_after, seconds(text)),
    },
    Variable {
        name: "MPI_CUDA_ABORT_AFTER",
        old_name: None,
        values: "0, seconds",
        meaning: "end the job if an operation, or the start of MPI, waits longer; 0: never",
        read: |config, text| set(&mut config.abort_after, limit(text)),
    },
    Variable {
        name: "MPI_CUDA_EXIT_TIMEOUT",
        old_name: None,
        values: "90, seconds, 0",
        meaning: "end the job if a rank at its end waits longer than this for others; 0: never",
        read: |config, text| set(&mut config.exit_timeout, limit(text)),
    },
    Variable {
        name: "MPI_CUDA_CHECK",
        old_name: None,
        values: "0, 1",
        meaning: "compare every operation between nodes, not only those that are new",
        read: |config, text| set(&mut config.check, flag(text)),
    },
    Variable {
        name: "MPI_CUDA_LOG",
        old_name: None,
        values: "warn, info, debug",
        meaning: "what to print to standard error",
        read: |config, text| {
            set(
                &mut config.log,
                one_of(
                    &[
                        ("warn", Log::Warn),
                        ("info", Log::Info),
                        ("debug", Log::Debug),
                    ],
                    text,
                ),
            )
        },
    },
    Variable {
        name: "MPI_CUDA_RECORD_DIR",
        old_name: None,
        values: "path",
        meaning: "folder for the record of each rank's last operations, for `python -m mpi_cuda \
                  report`",
        read: |config, text| set(&mut config.record_dir, Some(Some(PathBuf::from(text)))),
    },
    Variable {
        name: "MPI_CUDA_RECORD",
        old_name: None,
        values: "failure, always",
        meaning: "which jobs leave their records: those that do not end well, or all",
        read: |config, text| {
            set(
                &mut config.record,
                one_of(
                    &[("failure", Keep::Failures), ("always", Keep::Always)],
                    text,
                ),
            )
        },
    },
    Variable {
        name: "MPI_CUDA_KEEP_MEMORY",
        old_name: None,
        values: "1, 0",
        meaning: "keep freed memory in the process, which spares page faults",
        read: |config, text| set(&mut config.keep_memory, flag(text)),
    },
    Variable {
        name: "MPI_CUDA_HUGE_PAGES",
        old_name: None,
        values: "1, 0",
        meaning: "put messages into huge pages, which spares looking up their pages",
        read: |config, text| set(&mut config.huge_pages, flag(text)),
    },
    Variable {
        name: "MPI_CUDA_SHARE_COMPILED",
        old_name: None,
        values: "1, 0",
        meaning: "one rank of a node compiles a program, and the others load what it made",
        read: |config, text| set(&mut config.share_compiled, flag(text)),
    },
    Variable {
        name: "MPI_CUDA_PART_BYTES",
        old_name: None,
        values: "1073741824, bytes from 64",
        meaning: "larger collectives go in parts of this size; the same on all ranks",
        read: |config, text| set(&mut config.part_bytes, number(text, 64..=LARGEST_PART)),
    },
    Variable {
        name: "MPI_CUDA_SHM_COLLECTIVES",
        old_name: None,
        values: "1, 0",
        meaning: "ranks of one node execute collectives in memory that they share, and not through \
                  MPI, where that is faster; the same on all ranks",
        read: |config, text| set(&mut config.shm_collectives, flag(text)),
    },
    Variable {
        name: "MPI_CUDA_SHM_MESSAGES",
        old_name: None,
        values: "1, 0",
        meaning: "ranks of one node send each other short messages in memory that they share, and \
                  not through MPI; the same on all ranks",
        read: |config, text| set(&mut config.shm_messages, flag(text)),
    },
    Variable {
        name: "MPI_CUDA_OVERLAP",
        old_name: None,
        values: "0, nodes, 1",
        meaning: "start all-reduces of programs for several devices when their operands are there, \
                  and compute meanwhile; nodes: in jobs of several nodes, if they are large; 1: \
                  always (tests); the same on all ranks",
        read: |config, text| {
            set(
                &mut config.overlap,
                one_of(
                    &[
                        ("0", Overlap::Never),
                        ("nodes", Overlap::BetweenNodes),
                        ("1", Overlap::Always),
                    ],
                    text,
                ),
            )
        },
    },
    Variable {
        name: "MPI_CUDA_TRANSFER",
        old_name: None,
        values: "auto, direct, staged",
        meaning: "how data in GPU memory reach MPI; on CPU devices without effect",
        read: |config, text| {
            set(
                &mut config.transfer,
                one_of(
                    &[
                        ("auto", Asked::Auto),
                        ("direct", Asked::Direct),
                        ("staged", Asked::Staged),
                    ],
                    text,
                ),
            )
        },
    },
    Variable {
        name: "MPI_CUDA_CHUNK_BYTES",
        old_name: None,
        values: "1048576, bytes from 4096",
        meaning: "staging cuts data in GPU memory into chunks of this size; the same on all ranks",
        read: |config, text| {
            // Whole elements of every dtype.
            let whole = |bytes: &usize| bytes.is_multiple_of(16);
            set(
                &mut config.chunk_bytes,
                number(text, 4096..=1 << 30).filter(whole),
            )
        },
    },
    Variable {
        name: "MPI_CUDA_SHM_RING",
        old_name: Some("MPI_CUDA_OUTBOX"),
        values: "1, 0",
        meaning: "staged messages of more than a chunk between ranks of a node go through memory \
                  that they share, and not through MPI",
        read: |config, text| set(&mut config.shm_ring, flag(text)),
    },
    Variable {
        name: "MPI_CUDA_PROBE_DIR",
        old_name: Some("MPI_CUDA_PROOF_DIR"),
        values: "path",
        meaning: "folder for what `python -m mpi_cuda probe` finds out; default: ~/.cache/mpi_cuda",
        read: |config, text| set(&mut config.probe_dir, Some(Some(PathBuf::from(text)))),
    },
    Variable {
        name: "MPI_CUDA_PROBE",
        old_name: None,
        values: "0, 1",
        meaning: "set by `python -m mpi_cuda probe`: transfer directly, to see whether it works",
        read: |config, text| set(&mut config.probe, flag(text)),
    },
    Variable {
        name: "MPI_CUDA_PRETEND_DEVICE",
        old_name: None,
        values: "0, 1, aware",
        meaning: "tests only: treat arrays as if they lay in the memory of a slow device; aware: \
                  one that MPI knows",
        read: |config, text| {
            set(
                &mut config.pretend_device,
                one_of(
                    &[
                        ("0", Pretend::Nothing),
                        ("1", Pretend::Device),
                        ("aware", Pretend::DeviceThatMpiKnows),
                    ],
                    text,
                ),
            )
        },
    },
    Variable {
        name: "MPI_CUDA_RECOMPILE",
        old_name: None,
        values: "0, 1",
        meaning: "tests only: compile each optimized program again as it is, like those rewritten",
        read: |config, text| set(&mut config.recompile, flag(text)),
    },
    Variable {
        name: "MPI_CUDA_PRETEND_SIZE",
        old_name: None,
        values: "ranks",
        meaning: "tests only: show a world of this size without starting it",
        read: |config, text| {
            set(
                &mut config.pretend_size,
                number(text, 1..=1 << 20).map(Some),
            )
        },
    },
    Variable {
        name: "MPI_CUDA_PRETEND_NODES",
        old_name: None,
        values: "nodes",
        meaning: "tests only: ranks behave as if they were on so many nodes",
        read: |config, text| set(&mut config.pretend_nodes, number(text, 1..=4096).map(Some)),
    },
];

/// Puts a value that was understood in its place.
fn set<T>(place: &mut T, value: Option<T>) -> Option<()> {
    *place = value?;
    Some(())
}

fn one_of<T: Copy>(choices: &[(&str, T)], text: &str) -> Option<T> {
    let chosen = choices.iter().find(|(name, _)| *name == text);
    chosen.map(|(_, value)| *value)
}

fn flag(text: &str) -> Option<bool> {
    one_of(&[("0", false), ("1", true)], text)
}

fn number<T: FromStr + PartialOrd>(text: &str, range: RangeInclusive<T>) -> Option<T> {
    text.parse().ok().filter(|number| range.contains(number))
}

/// A number of seconds; none for `0`, which is never.
fn limit(text: &str) -> Option<Option<Duration>> {
    match text {
        "0" => Some(None),
        _ => seconds(text).map(Some),
    }
}

fn seconds(text: &str) -> Option<Duration> {
    let duration = Duration::try_from_secs_f64(text.parse().ok()?).ok()?;
    (!duration.is_zero()).then_some(duration)
}
