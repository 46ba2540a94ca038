//! How data in device memory reach MPI: by the choice of the user, what MPI says of itself, and
//! whether it was tried.

#![forbid(unsafe_code)]

use std::fmt;

use crate::error::NotDirect;
pub use crate::mpi::shim::Aware;

/// What the user asked for: `MPI_CUDA_TRANSFER`, or mpi4jax's `MPI4JAX_USE_CUDA_MPI`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Asked {
    Auto,
    Direct,
    Staged,
}

impl Asked {
    /// From mpi4jax's variable. What it does not know means staged, with a warning.
    pub fn from_mpi4jax(value: &str) -> (Asked, Option<String>) {
        match value.to_lowercase().as_str() {
            "true" | "1" | "on" => (Asked::Direct, None),
            "false" | "0" | "off" => (Asked::Staged, None),
            _ => (
                Asked::Staged,
                Some(format!(
                    "MPI4JAX_USE_CUDA_MPI={value} is not understood, and means staged; it takes \
                     true, 1, on, false, 0 and off"
                )),
            ),
        }
    }
}

/// What an MPI that knows the device is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// XLA's arrays as they are.
    Arrays,
    /// Copies of them, on the device, in memory that any such MPI can pass on.
    Copies,
}

/// What is known of a transfer with memory that XLA itself allocated, from an earlier job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// Nobody has tried with this MPI, driver and plugin.
    None,
    /// It gave right results.
    Works(Through),
    /// It did not.
    Fails(String),
}

/// How data travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Mode {
    Direct(Through),
    Staged,
}

/// A mode, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// How data travel.
    pub mode: Mode,
    /// In words.
    pub reason: String,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = match self.mode {
            Mode::Direct(Through::Arrays) => "direct",
            Mode::Direct(Through::Copies) => "direct, through copies on the device",
            Mode::Staged => "staged",
        };
        write!(f, "{mode} ({})", self.reason)
    }
}

/// How to get a [`ProbeResult`].
const PROBE: &str = "`mpirun -n 2 python -m mpi_cuda probe` tries it";
const ENABLE: &str = "an MPI built and started with CUDA support (Open MPI --with-cuda, MPICH \
                      --with-cuda, MPICH_GPU_SUPPORT_ENABLED=1 with Cray's)";

/// Chooses for `mpi`, the MPI library in words.
///
/// # Errors
/// If direct transfer was asked for and is known not to work, or not known to.
pub fn choose(
    asked: Asked,
    mpi: &str,
    aware: Aware,
    probe_result: &ProbeResult,
) -> Result<Choice, NotDirect> {
    let choice = |mode, reason: String| Ok(Choice { mode, reason });
    let refuse = |why: String, remedy| Err(NotDirect { why, remedy });
    match (asked, aware, probe_result) {
        (Asked::Staged, ..) => choice(Mode::Staged, "as asked for".into()),
        (Asked::Direct, Aware::No, _) => {
            refuse(format!("{mpi} says that it has no CUDA support"), ENABLE)
        }
        (Asked::Direct, _, ProbeResult::Fails(how)) => {
            refuse(format!("with {mpi} it was tried and failed: {how}"), ENABLE)
        }
        (Asked::Direct, Aware::Unsaid, ProbeResult::None) => refuse(
            format!("{mpi} does not say whether it has CUDA support, and nobody has tried it"),
            "try it with `mpirun -n 2 python -m mpi_cuda probe`",
        ),
        (Asked::Direct, _, ProbeResult::Works(through)) => {
            choice(Mode::Direct(*through), "as asked for".into())
        }
        (Asked::Direct, Aware::Yes, ProbeResult::None) => choice(
            Mode::Direct(Through::Copies),
            format!("as asked for; {PROBE} without them"),
        ),
        (Asked::Auto, Aware::No, _) => choice(Mode::Staged, format!("{mpi} has no CUDA support")),
        (Asked::Auto, _, ProbeResult::Works(through)) => {
            choice(Mode::Direct(*through), format!("it was tried with {mpi}"))
        }
        (Asked::Auto, _, ProbeResult::Fails(how)) => choice(
            Mode::Staged,
            format!("direct was tried with {mpi} and failed: {how}"),
        ),
        (Asked::Auto, _, ProbeResult::None) => choice(
            Mode::Staged,
            format!("direct is not proven with {mpi}; {PROBE}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY_AWARE: [Aware; 3] = [Aware::Yes, Aware::No, Aware::Unsaid];

    fn probe_results() -> [ProbeResult; 4] {
        [
            ProbeResult::None,
            ProbeResult::Works(Through::Arrays),
            ProbeResult::Works(Through::Copies),
            ProbeResult::Fails("rank 1 died".into()),
        ]
    }

    fn mode(asked: Asked, aware: Aware, probe_result: &ProbeResult) -> Option<Mode> {
        choose(asked, "Open MPI 4.1.4", aware, probe_result)
            .ok()
            .map(|choice| choice.mode)
    }

    #[test]
    fn staged_is_staged() {
        for aware in EVERY_AWARE {
            for probe_result in probe_results() {
                assert_eq!(
                    mode(Asked::Staged, aware, &probe_result),
                    Some(Mode::Staged)
                );
            }
        }
    }

    #[test]
    fn auto_is_direct_only_with_a_probe_result_and_never_an_error() {
        for aware in EVERY_AWARE {
            for probe_result in probe_results() {
                let want = match probe_result {
                    ProbeResult::Works(through) if aware != Aware::No => Mode::Direct(through),
                    _ => Mode::Staged,
                };
                assert_eq!(mode(Asked::Auto, aware, &probe_result), Some(want));
            }
        }
        let choice = choose(Asked::Auto, "MPICH 4.3", Aware::Yes, &ProbeResult::None).unwrap();
        assert!(choice.to_string().contains("mpi_cuda probe"), "{choice}");
    }

    #[test]
    fn direct_is_direct_or_an_error_that_names_the_mpi_and_the_remedy() {
        for aware in EVERY_AWARE {
            for probe_result in probe_results() {
                let choice = choose(Asked::Direct, "Open MPI 4.1.4", aware, &probe_result);
                let possible = match aware {
                    Aware::Yes => !matches!(probe_result, ProbeResult::Fails(_)),
                    Aware::No => false,
                    Aware::Unsaid => matches!(probe_result, ProbeResult::Works(_)),
                };
                assert_eq!(choice.is_ok(), possible, "{aware:?} {probe_result:?}");
                // XLA's own arrays only if that was tried.
                let tried = Mode::Direct(match probe_result {
                    ProbeResult::Works(through) => through,
                    _ => Through::Copies,
                });
                assert!(choice.as_ref().is_err() || choice.as_ref().unwrap().mode == tried);
                if let Err(error) = choice {
                    let text = error.to_string();
                    assert!(text.contains("Open MPI 4.1.4"), "{text}");
                    assert!(text.contains("MPI_CUDA_TRANSFER=staged"), "{text}");
                }
            }
        }
    }

    #[test]
    fn mpi4jax_has_its_own_words() {
        for word in ["1", "true", "True", "ON"] {
            assert_eq!(Asked::from_mpi4jax(word), (Asked::Direct, None));
        }
        for word in ["0", "false", "OFF"] {
            assert_eq!(Asked::from_mpi4jax(word), (Asked::Staged, None));
        }
        let (asked, warning) = Asked::from_mpi4jax("yes");
        assert_eq!(asked, Asked::Staged);
        assert!(warning.unwrap().contains("MPI4JAX_USE_CUDA_MPI=yes"));
    }
}
