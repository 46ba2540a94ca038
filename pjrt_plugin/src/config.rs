//! The configuration: one typed struct, read once from the environment and the create options.
//!
//! Every variable is declared in [`VARIABLES`]; `docs/configuration.md` is checked against it.

#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use mpi_runtime::mpi::family::Family;
use mpi_runtime::transfer::choice::Asked;

use crate::error::Error;

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
    read: fn(&mut Config, &str) -> Option<()>,
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
                        ("auto", Device::Auto),
                        ("cpu", Device::Cpu),
                        ("cuda", Device::Cuda),
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
        name: "MPI_CUDA_MPI",
        old_name: None,
        values: "openmpi, mpich",
        meaning: "which MPI, where neither the process nor the launcher says",
        read: |config, text| set(&mut config.mpi, Family::from_name(text).map(Some)),
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
        values: "60, seconds",
        meaning: "print an operation that waits longer than this",
        read: |config, text| set(&mut config.warn_after, seconds(text)),
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
        name: "MPI_CUDA_PART_BYTES",
        old_name: None,
        values: "1073741824, bytes from 64",
        meaning: "larger collectives go in parts of this size; the same on all ranks",
        read: |config, text| set(&mut config.part_bytes, number(text, 64..=LARGEST_PART)),
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
                number(text, 1..=i32::MAX).map(Some),
            )
        },
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
    pub shm_ring: bool,
    pub probe_dir: Option<PathBuf>,
    pub probe: bool,
    pub pretend_device: Pretend,
    pub recompile: bool,
    pub pretend_size: Option<i32>,
    /// What the user should hear of the variables set.
    pub warnings: Vec<String>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            device: Device::Auto,
            inner_plugin: None,
            topology: Topology::Global,
            mpi: None,
            shim_dir: None,
            singleton: false,
            warn_after: Duration::from_secs(60),
            log: Log::Warn,
            keep_memory: true,
            huge_pages: true,
            part_bytes: LARGEST_PART,
            transfer: Asked::Auto,
            transfer_warning: None,
            chunk_bytes: 1 << 20,
            shm_ring: true,
            probe_dir: None,
            probe: false,
            pretend_device: Pretend::Nothing,
            recompile: false,
            pretend_size: None,
            warnings: Vec::new(),
        }
    }
}

impl Config {
    /// Reads every variable through `get`, which returns create options before the environment.
    ///
    /// # Errors
    /// If a value is not understood; the text has the values that are.
    pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Config, Error> {
        let get = |name: &str| get(name).filter(|text| !text.is_empty());
        let mut config = Config::default();
        for variable in VARIABLES {
            let mut given = get(variable.name);
            if let (None, Some(old)) = (&given, variable.old_name) {
                given = get(old);
                if given.is_some() {
                    let name = variable.name;
                    config
                        .warnings
                        .push(format!("{old} is now called {name}: use that name"));
                }
            }
            if let Some(text) = given {
                (variable.read)(&mut config, &text).ok_or_else(|| wrong(variable, &text))?;
            }
        }
        if get("MPI_CUDA_TRANSFER").is_none()
            && let Some(text) = get(MPI4JAX_TRANSFER)
        {
            (config.transfer, config.transfer_warning) = Asked::from_mpi4jax(&text);
        }
        Ok(config)
    }
}

fn wrong(variable: &Variable, value: &str) -> Error {
    let Variable {
        name,
        values,
        meaning,
        ..
    } = variable;
    Error::invalid(format!(
        "{name}={value} is not understood; it takes: {values} ({meaning})"
    ))
}

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

fn seconds(text: &str) -> Option<Duration> {
    let duration = Duration::try_from_secs_f64(text.parse().ok()?).ok()?;
    (!duration.is_zero()).then_some(duration)
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
    fn the_first_value_is_the_default() {
        for variable in VARIABLES {
            let first = variable.values.split(", ").next().unwrap();
            // A path, a number of ranks and an MPI have no default.
            if ["path", "ranks", "openmpi"].contains(&first) {
                continue;
            }
            let config = read(&[(variable.name, first)]).unwrap();
            let default = read(&[]).unwrap();
            assert_eq!(
                format!("{config:?}"),
                format!("{default:?}"),
                "{}",
                variable.name
            );
        }
    }

    #[test]
    fn old_names_are_read_with_a_warning() {
        let config = read(&[("MPI_CUDA_OUTBOX", "0"), ("MPI_CUDA_PROOF_DIR", "there")]).unwrap();
        assert!(!config.shm_ring);
        assert_eq!(config.probe_dir, Some(PathBuf::from("there")));
        assert!(config.warnings[0].contains("MPI_CUDA_SHM_RING"));
        assert!(config.warnings[1].contains("MPI_CUDA_PROBE_DIR"));
        let new = read(&[("MPI_CUDA_SHM_RING", "1"), ("MPI_CUDA_OUTBOX", "0")]).unwrap();
        assert!(new.shm_ring && new.warnings.is_empty());
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
