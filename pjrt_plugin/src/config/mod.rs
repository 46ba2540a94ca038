//! The configuration: one typed struct, read once from the environment and the create options.
//!
//! Every variable is declared in [`VARIABLES`]; `docs/configuration.md` is checked against it.

#![forbid(unsafe_code)]

mod settings;
mod variables;

use mpi_runtime::transfer::choice::Asked;

use crate::error::Error;

pub use settings::{Config, DeviceKind, Log, Orders, Overlap, Pretend, Topology};
pub use variables::{VARIABLES, Variable};

/// mpi4jax's variable, which `MPI_CUDA_TRANSFER` wins over.
const MPI4JAX_TRANSFER: &str = "MPI4JAX_USE_CUDA_MPI";

/// Where values come from, by the name of their variable: the create options, or the environment.
type Source<'a> = dyn Fn(&str) -> Option<String> + 'a;

impl Config {
    /// Reads every variable through `sources`, of which an earlier one wins: the create options
    /// before the environment. An empty value is the default.
    ///
    /// # Errors
    /// If a value is not understood; the text has the values that are.
    pub fn read(sources: &[&Source]) -> Result<Config, Error> {
        let mut config = Config::default();
        for variable in VARIABLES {
            let names = || std::iter::once(variable.name).chain(variable.old_name);
            let given = sources
                .iter()
                .find_map(|source| names().find_map(|name| Some((name, source(name)?))));
            let Some((name, text)) = given.filter(|(_, text)| !text.is_empty()) else {
                continue;
            };
            (variable.read)(&mut config, &text).ok_or_else(|| wrong(variable, name, &text))?;
            if name != variable.name {
                let new = variable.name;
                let warning = format!("{name} is now called {new}: use that name");
                config.warnings.push(warning);
            }
        }
        let from_any = |name| {
            let given = sources.iter().find_map(|source| source(name));
            given.filter(|text| !text.is_empty())
        };
        if from_any("MPI_CUDA_TRANSFER").is_none()
            && let Some(text) = from_any(MPI4JAX_TRANSFER)
        {
            (config.transfer, config.transfer_warning) = Asked::from_mpi4jax(&text);
        }
        Ok(config)
    }
}

/// The value of a variable that was given as `name` is not understood.
fn wrong(variable: &Variable, name: &str, value: &str) -> Error {
    let Variable {
        values, meaning, ..
    } = variable;
    Error::invalid(format!(
        "{name}={value} is not understood; it takes: {values} ({meaning})"
    ))
}

/// Variables with our prefix that this library does not read itself: Python, the build or this
/// process's own parts do.
const READ_BY_OTHERS: [&str; 9] = [
    "MPI_CUDA_STARTUP",
    "MPI_CUDA_PACKAGES",
    "MPI_CUDA_PLUGIN_CPU",
    "MPI_CUDA_PLUGIN_CUDA",
    "MPI_CUDA_RANK_PROCESS",
    "MPI_CUDA_BUILD_LIBRARIES",
    "MPI_CUDA_BUILD_GLIBC",
    "MPI_CUDA_FFI_HEADER",
    "MPI_CUDA_PJRT_HEADER",
];

/// The similarity (Jaro's) of a name and what it is misspelt from. All names begin alike: those of
/// two variables have up to 0.9.
const ALIKE: f64 = 0.93;

/// What the user should hear of variables that nothing reads, or reads otherwise than it may seem.
pub fn doubtful(variables: impl Iterator<Item = (String, String)>) -> Vec<String> {
    let known = || {
        let own = VARIABLES.iter();
        let own = own.flat_map(|variable| std::iter::once(variable.name).chain(variable.old_name));
        own.chain(READ_BY_OTHERS)
    };
    let mut warnings = Vec::new();
    for (name, value) in variables.filter(|(name, _)| name.starts_with("MPI_CUDA_")) {
        if name == "MPI_CUDA_STARTUP" && !["", "0", "1"].contains(&value.as_str()) {
            warnings.push(format!("{name}={value} counts as 1: it takes 1 and 0"));
        }
        if known().any(|one| one == name) {
            continue;
        }
        let alike = VARIABLES.iter().map(|variable| variable.name);
        let alike = alike.filter(|one| strsim::jaro(one, &name) > ALIKE);
        let alike = alike
            .max_by(|one, other| strsim::jaro(one, &name).total_cmp(&strsim::jaro(other, &name)));
        let meant = alike.map_or_else(String::new, |one| format!("Do you mean {one}? "));
        warnings.push(format!(
            "{name} is in the environment, and mpi_cuda has no such variable. {meant}\
             docs/configuration.md has them all"
        ));
    }
    warnings
}

/// The name under which a create option sets `variable`.
pub fn create_option(variable: &str) -> String {
    variable.trim_start_matches("MPI_CUDA_").to_lowercase()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Config, String> {
        let variables: Vec<(String, String)> = variables
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Config::read(&[&|name| {
            variables
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.clone())
        }])
        .map_err(|error| error.to_string())
    }

    #[test]
    fn defaults() {
        let config = read(&[]).unwrap();
        assert_eq!(
            (config.device, config.topology),
            (DeviceKind::Auto, Topology::Global)
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
            // A path, a number of ranks or nodes and an MPI have no default.
            if ["path", "ranks", "nodes", "openmpi"].contains(&first) {
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
        // A create option wins, under whichever name.
        let option = |name: &str| (name == "MPI_CUDA_OUTBOX").then(|| "0".to_owned());
        let variable = |name: &str| (name == "MPI_CUDA_SHM_RING").then(|| "1".to_owned());
        let both = Config::read(&[&option, &variable]).unwrap();
        assert!(!both.shm_ring && both.warnings.len() == 1);
        let empty = |name: &str| (name == "MPI_CUDA_SHM_RING").then(String::new);
        let zero = |name: &str| (name == "MPI_CUDA_SHM_RING").then(|| "0".to_owned());
        assert!(Config::read(&[&empty, &zero]).unwrap().shm_ring);
        let text = read(&[("MPI_CUDA_OUTBOX", "x")]).unwrap_err();
        assert!(
            text.contains("MPI_CUDA_OUTBOX=x is not understood"),
            "{text}"
        );
    }

    #[test]
    fn a_variable_that_nothing_reads_is_said() {
        let of = |name: &str, value: &str| {
            let variable = (name.to_owned(), value.to_owned());
            doubtful(std::iter::once(variable)).concat()
        };
        let text = of("MPI_CUDA_WARNAFTER", "5");
        assert!(text.contains("mean MPI_CUDA_WARN_AFTER?"), "{text}");
        assert!(!of("MPI_CUDA_HOME", "/x").contains("mean"));
        for known in [
            "MPI_CUDA_LOG",
            "MPI_CUDA_OUTBOX",
            "MPI_CUDA_RANK_PROCESS",
            "PATH",
        ] {
            assert_eq!(of(known, "1"), "");
        }
        assert!(of("MPI_CUDA_STARTUP", "no").contains("no counts as 1"));
        assert_eq!(of("MPI_CUDA_STARTUP", "0"), "");
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
        let page = include_str!("../../../docs/configuration.md");
        for variable in VARIABLES {
            assert!(
                page.contains(variable.name),
                "{} is not in docs/configuration.md",
                variable.name
            );
        }
    }

    #[test]
    fn fuzz_create_options_are_taken_or_refused_by_name() {
        const TEXTS: [&str; 12] = [
            "",
            "0",
            "1",
            "-1",
            "yes",
            "auto",
            "cpu",
            "1e400",
            "99999999999999999999",
            "\0",
            "\u{fffd}",
            "2x",
        ];
        crate::random::cases(|random| {
            let variable = random.of(VARIABLES);
            let mut text = String::new();
            for _ in 0..random.below(3) {
                text += *random.of(&TEXTS);
                if random.percent(30) {
                    let values: Vec<_> = variable.values.split(", ").collect();
                    text += *random.of(&values);
                }
            }
            let source = |name: &str| (name == variable.name).then(|| text.clone());
            if let Err(error) = Config::read(&[&source]) {
                assert!(error.to_string().contains(variable.name), "{error}");
            }
        });
    }
}
