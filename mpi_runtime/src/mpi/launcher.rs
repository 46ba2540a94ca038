//! What the environment says of how this process was started.

#![forbid(unsafe_code)]

use crate::mpi::family::Family;

/// This process is one of `size` that a launcher started together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// Who started it.
    pub launcher: &'static str,
    /// How many it started.
    pub size: usize,
    /// The MPI whose launcher it is, where that is certain.
    pub family: Option<Family>,
    /// The environment has nothing by which an MPI finds its other ranks (PMI or PMIx).
    pub without_pmi: bool,
    /// Names this very rank of this very job; a child process has its parent's.
    pub identity: String,
    /// The number of the open connection to the launcher, if the MPI will use one. A shell that
    /// Slurm has started may have that of its own job for another launcher's ranks.
    pub pmi_fd: Option<i32>,
}

/// Slurm numbers the steps that are no `srun` from here up (`slurm/slurm.h`: batch script,
/// interactive shell, extern).
const SLURM_SPECIAL_STEPS: u64 = 0xffff_fff0;

/// Reads the environment through `get`.
pub fn detect(get: impl Fn(&str) -> Option<String>) -> Option<Launched> {
    let number = |name: &str| get(name).and_then(|text| text.parse::<usize>().ok());
    let identity = |names: &[&str]| {
        names
            .iter()
            .filter_map(|name| get(name))
            .collect::<Vec<_>>()
            .join("/")
    };
    let slurm_step = get("SLURM_STEP_ID").and_then(|text| text.parse::<u64>().ok());
    if let Some(size) = number("OMPI_COMM_WORLD_SIZE") {
        return Some(Launched {
            launcher: "Open MPI's mpirun",
            size,
            family: Some(Family::OpenMpi),
            without_pmi: false,
            identity: identity(&["PMIX_NAMESPACE", "OMPI_COMM_WORLD_RANK"]),
            pmi_fd: None,
        });
    }
    if let Some(size) = number("PMI_SIZE") {
        return Some(Launched {
            launcher: "a PMI launcher (MPICH's mpirun, or srun --mpi=pmi2)",
            size,
            family: Some(Family::Mpich),
            without_pmi: false,
            identity: identity(&[
                "SLURM_JOB_ID",
                "SLURM_STEP_ID",
                "PMI_JOBID",
                "PMI_PORT",
                "PMI_FD",
                "PMI_RANK",
            ]),
            pmi_fd: get("PMI_FD").and_then(|text| text.parse().ok()),
        });
    }
    if let (Some(size), Some(step)) = (number("SLURM_STEP_NUM_TASKS"), slurm_step)
        && step < SLURM_SPECIAL_STEPS
    {
        let pmix = get("PMIX_RANK").is_some();
        return Some(Launched {
            launcher: "srun",
            size,
            // srun --mpi=pmix serves Open MPI; Debian's MPICH does not speak PMIx.
            family: pmix.then_some(Family::OpenMpi),
            without_pmi: !pmix && get("PMI_RANK").or_else(|| get("PMI_FD")).is_none(),
            identity: identity(&["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID"]),
            pmi_fd: None,
        });
    }
    if get("PMIX_RANK").is_some() {
        return Some(Launched {
            launcher: "a PMIx launcher",
            size: number("PMIX_SIZE").unwrap_or(1),
            family: Some(Family::OpenMpi),
            without_pmi: false,
            identity: identity(&["PMIX_NAMESPACE", "PMIX_RANK"]),
            pmi_fd: None,
        });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect_in(variables: &[(&str, &str)]) -> Option<Launched> {
        detect(|name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn launchers_are_recognised() {
        let open = detect_in(&[("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "2")]);
        let open = open.unwrap();
        assert_eq!((open.size, open.family), (4, Some(Family::OpenMpi)));
        let hydra = detect_in(&[("PMI_SIZE", "3"), ("PMI_RANK", "0"), ("PMI_FD", "7")]).unwrap();
        assert_eq!((open.pmi_fd, hydra.pmi_fd), (None, Some(7)));
        assert_eq!((hydra.size, hydra.family), (3, Some(Family::Mpich)));
        let srun = [
            ("SLURM_STEP_NUM_TASKS", "8"),
            ("SLURM_STEP_ID", "0"),
            ("PMIX_RANK", "1"),
        ];
        assert_eq!(detect_in(&srun).unwrap().family, Some(Family::OpenMpi));
        let without = detect_in(&srun[..2]).unwrap();
        assert!(without.family.is_none() && without.without_pmi);
        assert!(!detect_in(&srun).unwrap().without_pmi && !hydra.without_pmi);
    }

    #[test]
    fn serial_python_in_a_batch_job_was_not_launched() {
        for step in ["4294967291", "4294967290"] {
            let job = [
                ("SLURM_NTASKS", "8"),
                ("SLURM_STEP_NUM_TASKS", "8"),
                ("SLURM_STEP_ID", step),
            ];
            assert_eq!(detect_in(&job), None);
        }
        assert_eq!(detect_in(&[("SLURM_NTASKS", "8")]), None);
        assert_eq!(detect_in(&[]), None);
    }
}
