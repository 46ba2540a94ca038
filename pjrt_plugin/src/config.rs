//! The configuration: one typed struct, read once from the environment and the create options.
//!
//! Every variable is declared in [`VARIABLES`]; `docs/configuration.md` is checked against it.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use mpi_runtime::family::Family;
use mpi_runtime::transfer::Asked;

use crate::error::Error;

/// A variable of ours: its name, the values it takes, what it does.
pub struct Variable {
    /// Name in the environment; the create option is the same in lower case without `MPI_CUDA_`.
    pub name: &'static str,
    /// Values it takes; the first is the default.
    pub values: &'static str,
    /// What it does.
    pub meaning: &'static str,
}

/// All variables this library reads.
pub const VARIABLES: &[Variable] = &[
    Variable {
        name: "MPI_CUDA_DEVICE",
        values: "auto, cpu, cuda",
        meaning: "which XLA plugin to wrap",
    },
    Variable {
        name: "MPI_CUDA_INNER_PLUGIN",
        values: "path",
        meaning: "the XLA plugin to wrap, as a file",
    },
    Variable {
        name: "MPI_CUDA_TOPOLOGY",
        values: "global, local",
        meaning: "show all ranks' devices, or only this rank's",
    },
    Variable {
        name: "MPI_CUDA_MPI",
        values: "openmpi, mpich",
        meaning: "which MPI, where neither the process nor the launcher says",
    },
    Variable {
        name: "MPI_CUDA_SHIM_DIR",
        values: "path",
        meaning: "folder of the MPI shims; default: beside the plugin",
    },
    Variable {
        name: "MPI_CUDA_SINGLETON",
        values: "0, 1",
        meaning: "allow separate worlds of size 1 under a launcher of several",
    },
    Variable {
        name: "MPI_CUDA_WARN_AFTER",
        values: "60, seconds",
        meaning: "print an operation that waits longer than this",
    },
    Variable {
        name: "MPI_CUDA_LOG",
        values: "warn, info, debug",
        meaning: "what to print to standard error",
    },
    Variable {
        name: "MPI_CUDA_KEEP_MEMORY",
        values: "1, 0",
        meaning: "keep freed memory in the process, which spares page faults",
    },
    Variable {
        name: "MPI_CUDA_HUGE_PAGES",
        values: "1, 0",
        meaning: "put messages into huge pages, which spares looking up their pages",
    },
    Variable {
        name: "MPI_CUDA_PART_BYTES",
        values: "1073741824, bytes from 64",
        meaning: "larger collectives go in parts of this size; the same on all ranks",
    },
    Variable {
        name: "MPI_CUDA_TRANSFER",
        values: "auto, direct, staged",
        meaning: "how data in GPU memory reach MPI; on CPU devices without effect",
    },
    Variable {
        name: "MPI_CUDA_CHUNK_BYTES",
        values: "1048576, bytes from 4096",
        meaning: "staging cuts data in GPU memory into chunks of this size; the same on all ranks",
    },
    Variable {
        name: "MPI_CUDA_OUTBOX",
        values: "1, 0",
        meaning: "staged messages of more than a chunk between ranks of a node go through memory that \
                  they share, and not through MPI",
    },
    Variable {
        name: "MPI_CUDA_PROOF_DIR",
        values: "path",
        meaning: "folder for what `python -m mpi_cuda probe` finds out; default: ~/.cache/mpi_cuda",
    },
    Variable {
        name: "MPI_CUDA_PROBE",
        values: "0, 1",
        meaning: "set by `python -m mpi_cuda probe`: transfer directly, to see whether it works",
    },
    Variable {
        name: "MPI_CUDA_PRETEND_DEVICE",
        values: "0, 1, aware",
        meaning: "tests only: treat arrays as if they lay in the memory of a slow device; aware: one \
                  that MPI knows",
    },
    Variable {
        name: "MPI_CUDA_RECOMPILE",
        values: "0, 1",
        meaning: "tests only: compile each optimized program again as it is, like those rewritten",
    },
    Variable {
        name: "MPI_CUDA_PRETEND_SIZE",
        values: "ranks",
        meaning: "tests only: show a world of this size without starting it",
    },
];

/// mpi4jax's variable, which `MPI_CUDA_TRANSFER` wins over.
const MPI4JAX_TRANSFER: &str = "MPI4JAX_USE_CUDA_MPI";

/// Largest world; the inner CPU client holds about 1.3 threads for every device of the world.
pub const MAX_WORLD: i32 = 1024;

/// What MPI surely takes in one call: some products of it still fit a C `int`.
const LARGEST_PART: i64 = 1 << 30;

/// Which XLA plugin to wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Device {
    Auto,
    Cpu,
    Cuda,
}

/// Which devices the framework sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Topology {
    Global,
    Local,
}

/// What to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Log {
    Warn,
    Info,
    Debug,
}

/// Whether the host's memory is taken for a device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Pretend {
    Nothing,
    Device,
    /// One whose memory MPI reads and writes by itself.
    DeviceThatMpiKnows,
}

/// Everything a user can set.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Config {
    pub device: Device,
    pub inner_plugin: Option<PathBuf>,
    pub topology: Topology,
    pub mpi: Option<Family>,
    pub shim_dir: Option<PathBuf>,
    pub singleton: bool,
    pub warn_after: Duration,
    pub log: Log,
    pub keep_memory: bool,
    pub huge_pages: bool,
    pub part_bytes: i64,
    pub transfer: Asked,
    /// What mpi4jax's variable said, if that was not clear.
    pub transfer_warning: Option<String>,
    pub chunk_bytes: usize,
    pub outbox: bool,
    pub proof_dir: Option<PathBuf>,
    pub probe: bool,
    pub pretend_device: Pretend,
    pub recompile: bool,
    pub pretend_size: Option<i32>,
}

impl Config {
    /// Reads every variable through `get`, which returns create options before the environment.
    pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Config, Error> {
        let get = |name: &str| get(name).filter(|text| !text.is_empty());
        let flag = |name: &'static str, default: bool| match get(name).as_deref() {
            None => Ok(default),
            Some("0") => Ok(false),
            Some("1") => Ok(true),
            Some(other) => Err(wrong(name, other)),
        };
        let (transfer, transfer_warning) = match get("MPI_CUDA_TRANSFER").as_deref() {
            Some("auto") => (Asked::Auto, None),
            Some("direct") => (Asked::Direct, None),
            Some("staged") => (Asked::Staged, None),
            Some(other) => return Err(wrong("MPI_CUDA_TRANSFER", other)),
            None => get(MPI4JAX_TRANSFER)
                .map_or((Asked::Auto, None), |value| Asked::from_mpi4jax(&value)),
        };
        Ok(Config {
            device: match get("MPI_CUDA_DEVICE").as_deref() {
                None | Some("auto") => Device::Auto,
                Some("cpu") => Device::Cpu,
                Some("cuda") => Device::Cuda,
                Some(other) => return Err(wrong("MPI_CUDA_DEVICE", other)),
            },
            inner_plugin: get("MPI_CUDA_INNER_PLUGIN").map(PathBuf::from),
            topology: match get("MPI_CUDA_TOPOLOGY").as_deref() {
                None | Some("global") => Topology::Global,
                Some("local") => Topology::Local,
                Some(other) => return Err(wrong("MPI_CUDA_TOPOLOGY", other)),
            },
            mpi: match get("MPI_CUDA_MPI") {
                None => None,
                Some(name) => {
                    Some(Family::from_name(&name).ok_or_else(|| wrong("MPI_CUDA_MPI", &name))?)
                }
            },
            shim_dir: get("MPI_CUDA_SHIM_DIR").map(PathBuf::from),
            singleton: flag("MPI_CUDA_SINGLETON", false)?,
            warn_after: match get("MPI_CUDA_WARN_AFTER") {
                None => Duration::from_secs(60),
                Some(text) => text
                    .parse()
                    .ok()
                    .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
                    .filter(|duration| !duration.is_zero())
                    .ok_or_else(|| wrong("MPI_CUDA_WARN_AFTER", &text))?,
            },
            log: match get("MPI_CUDA_LOG").as_deref() {
                None | Some("warn") => Log::Warn,
                Some("info") => Log::Info,
                Some("debug") => Log::Debug,
                Some(other) => return Err(wrong("MPI_CUDA_LOG", other)),
            },
            keep_memory: flag("MPI_CUDA_KEEP_MEMORY", true)?,
            huge_pages: flag("MPI_CUDA_HUGE_PAGES", true)?,
            part_bytes: match get("MPI_CUDA_PART_BYTES") {
                None => LARGEST_PART,
                Some(text) => text
                    .parse()
                    .ok()
                    .filter(|bytes| (64..=LARGEST_PART).contains(bytes))
                    .ok_or_else(|| wrong("MPI_CUDA_PART_BYTES", &text))?,
            },
            transfer,
            transfer_warning,
            chunk_bytes: match get("MPI_CUDA_CHUNK_BYTES") {
                None => 1 << 20,
                Some(text) => text
                    .parse()
                    .ok()
                    // Whole elements of every dtype.
                    .filter(|bytes: &usize| {
                        (4096..=1 << 30).contains(bytes) && bytes.is_multiple_of(16)
                    })
                    .ok_or_else(|| wrong("MPI_CUDA_CHUNK_BYTES", &text))?,
            },
            outbox: flag("MPI_CUDA_OUTBOX", true)?,
            proof_dir: get("MPI_CUDA_PROOF_DIR").map(PathBuf::from),
            probe: flag("MPI_CUDA_PROBE", false)?,
            pretend_device: match get("MPI_CUDA_PRETEND_DEVICE").as_deref() {
                None | Some("0") => Pretend::Nothing,
                Some("1") => Pretend::Device,
                Some("aware") => Pretend::DeviceThatMpiKnows,
                Some(other) => return Err(wrong("MPI_CUDA_PRETEND_DEVICE", other)),
            },
            recompile: flag("MPI_CUDA_RECOMPILE", false)?,
            pretend_size: match get("MPI_CUDA_PRETEND_SIZE") {
                None => None,
                Some(text) => Some(
                    text.parse()
                        .ok()
                        .filter(|&size| size >= 1)
                        .ok_or_else(|| wrong("MPI_CUDA_PRETEND_SIZE", &text))?,
                ),
            },
        })
    }
}

fn wrong(name: &str, value: &str) -> Error {
    let variable = VARIABLES.iter().find(|variable| variable.name == name);
    let (values, meaning) = variable.map_or(("", ""), |v| (v.values, v.meaning));
    Error::invalid(format!(
        "mpi_cuda: {name}={value} is not understood; it takes: {values} ({meaning})"
    ))
}

/// The name under which a create option sets `variable`.
pub fn create_option(variable: &str) -> String {
    variable.trim_start_matches("MPI_CUDA_").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Config, String> {
        let variables: Vec<(String, String)> = variables
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Config::read(&|name| {
            variables
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.clone())
        })
        .map_err(|error| error.to_string())
    }

    #[test]
    fn defaults() {
        let config = read(&[]).unwrap();
        assert_eq!(
            (config.device, config.topology),
            (Device::Auto, Topology::Global)
        );
        assert_eq!(config.warn_after, Duration::from_secs(60));
        assert!(!config.singleton && config.keep_memory);
    }

    #[test]
    fn wrong_values_are_refused_with_the_right_ones() {
        for variable in VARIABLES
            .iter()
            .filter(|variable| !variable.values.starts_with("path"))
        {
            let text = read(&[(variable.name, "nonsense")]).unwrap_err();
            assert!(
                text.contains(variable.name) && text.contains(variable.values),
                "{text}"
            );
        }
    }

    #[test]
    fn our_variable_wins_over_mpi4jaxs() {
        let transfer = |variables: &[(&str, &str)]| read(variables).unwrap().transfer;
        assert_eq!(transfer(&[]), Asked::Auto);
        assert_eq!(transfer(&[("MPI4JAX_USE_CUDA_MPI", "on")]), Asked::Direct);
        assert_eq!(transfer(&[("MPI4JAX_USE_CUDA_MPI", "0")]), Asked::Staged);
        let both = [
            ("MPI4JAX_USE_CUDA_MPI", "1"),
            ("MPI_CUDA_TRANSFER", "staged"),
        ];
        assert_eq!(transfer(&both), Asked::Staged);
        let unclear = read(&[("MPI4JAX_USE_CUDA_MPI", "yes")]).unwrap();
        assert!(unclear.transfer == Asked::Staged && unclear.transfer_warning.is_some());
    }

    #[test]
    fn every_variable_is_documented() {
        let page = include_str!("../../docs/configuration.md");
        for variable in VARIABLES {
            assert!(
                page.contains(variable.name),
                "{} is not in docs/configuration.md",
                variable.name
            );
        }
    }
}
