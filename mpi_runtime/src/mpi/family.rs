//! The ABIs of MPI that a shim is built for.

#![forbid(unsafe_code)]

/// An MPI ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Open MPI 4 and 5.
    OpenMpi,
    /// MPICH and those with its ABI: Intel MPI, Cray MPICH, MVAPICH, ParaStation MPI.
    Mpich,
    /// The ABI of the MPI standard (MPI 5.0, chapter 20).
    MpiAbi,
}

impl Family {
    /// All families, in the order they are tried when nothing says which.
    pub const ALL: [Family; 3] = [Family::OpenMpi, Family::Mpich, Family::MpiAbi];

    /// The name used in `MPI_CUDA_MPI` and in file names.
    pub const fn name(self) -> &'static str {
        match self {
            Family::OpenMpi => "openmpi",
            Family::Mpich => "mpich",
            Family::MpiAbi => "mpi_abi",
        }
    }

    /// The family of that name.
    pub fn from_name(name: &str) -> Option<Family> {
        Family::ALL.into_iter().find(|family| family.name() == name)
    }

    /// The family that mpi4py means by a value of `MPI4PY_MPIABI` (its module `mpi4py._mpiabi`).
    pub fn from_mpi4py(name: &str) -> Option<Family> {
        let name: String = name.chars().filter(|c| !" -_".contains(*c)).collect();
        match name.to_lowercase().as_str() {
            "openmpi" => Some(Family::OpenMpi),
            "mpich" | "impi" => Some(Family::Mpich),
            "mpiabi" => Some(Family::MpiAbi),
            _ => None,
        }
    }

    /// File names of its libraries, the usual one first. Debian and Cray have their own.
    pub const fn libraries(self) -> &'static [&'static str] {
        match self {
            Family::OpenMpi => &["libmpi.so.40"],
            Family::Mpich => &["libmpi.so.12", "libmpich.so.12", "libmpi_cray.so.12"],
            Family::MpiAbi => &["libmpi_abi.so.1", "libmpi_abi.so.0"],
        }
    }

    /// The family of an MPI library by its file name, as the dynamic loader reports it.
    pub fn of_library(path: &str) -> Option<Family> {
        let file = path.rsplit('/').next().unwrap_or(path);
        let is = |name: &&str| {
            let rest = file.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let all = Family::ALL.into_iter();
        all.into_iter()
            .find(|family| family.libraries().iter().any(is))
    }

    /// Whether a process of a launcher for `self` can be a rank with a library of `other`.
    pub fn serves(self, other: Family) -> bool {
        self == other || other == Family::MpiAbi
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_known_by_their_files() {
        for (path, family) in [
            ("/x/libmpi.so.40.30.4", Family::OpenMpi),
            ("/x/libmpich.so.12.2.2", Family::Mpich),
            ("libmpi.so.12", Family::Mpich),
            ("/opt/cray/lib/libmpi_cray.so.12", Family::Mpich),
            ("/x/libmpi_abi.so.1.0", Family::MpiAbi),
        ] {
            assert_eq!(Family::of_library(path), Some(family), "{path}");
        }
        for path in [
            "/x/libmpi_cxx.so.40",
            "/x/libmpichcxx.so.12",
            "/x/libmpifort.so.12",
            "/x/libmpi.so.400",
            "libmpi_cuda_shim_mpich.so",
        ] {
            assert_eq!(Family::of_library(path), None, "{path}");
        }
    }

    #[test]
    fn names_are_ours_and_mpi4pys() {
        for family in Family::ALL {
            assert_eq!(Family::from_name(family.name()), Some(family));
            assert_eq!(Family::from_mpi4py(family.name()), Some(family));
        }
        assert_eq!(Family::from_mpi4py("I_MPI"), Some(Family::Mpich));
        assert_eq!(Family::from_mpi4py("lam"), None);
    }
}
