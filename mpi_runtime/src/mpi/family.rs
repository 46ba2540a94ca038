//! The MPI families a shim is built for, and which one this process should use.

#![forbid(unsafe_code)]

use crate::error::StartError;

/// An MPI ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Open MPI 4 and 5 (`libmpi.so.40`).
    OpenMpi,
    /// MPICH and those with its ABI (`libmpich.so.12`, `libmpi.so.12`).
    Mpich,
}

impl Family {
    /// All families, in the order they are tried when nothing says which.
    pub const ALL: [Family; 2] = [Family::OpenMpi, Family::Mpich];

    /// The name used in `MPI_CUDA_MPI` and in file names.
    pub const fn name(self) -> &'static str {
        match self {
            Family::OpenMpi => "openmpi",
            Family::Mpich => "mpich",
        }
    }

    /// The family of that name.
    pub fn from_name(name: &str) -> Option<Family> {
        Family::ALL.into_iter().find(|family| family.name() == name)
    }

    /// The family of an MPI library by its file name, as the dynamic loader reports it.
    pub fn of_library(path: &str) -> Option<Family> {
        let file = path.rsplit('/').next().unwrap_or(path);
        let is = |prefix: &str| {
            file.strip_prefix(prefix)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        if is("libmpi.so.40") {
            Some(Family::OpenMpi)
        } else if is("libmpich.so") || is("libmpi.so.12") {
            Some(Family::Mpich)
        } else {
            None
        }
    }
}

/// Which families to try, in order: the MPI already in the process, else the launcher's, else
/// `MPI_CUDA_MPI`, else each.
pub fn candidates(
    loaded: &[String],
    launcher: Option<Family>,
    wanted: Option<Family>,
) -> Result<Vec<Family>, StartError> {
    let mut found: Option<(Family, &String)> = None;
    for path in loaded {
        let Some(family) = Family::of_library(path) else {
            continue;
        };
        match found {
            Some((first, first_path)) if first != family => {
                return Err(StartError::TwoLibraries {
                    first: first_path.clone(),
                    second: path.clone(),
                });
            }
            _ => found = Some((family, path)),
        }
    }
    if let Some((family, path)) = found {
        return match wanted {
            Some(wanted) if wanted != family => Err(StartError::OtherLibrary {
                wanted: wanted.name(),
                loaded: path.clone(),
            }),
            _ => Ok(vec![family]),
        };
    }
    if let Some(family) = launcher.or(wanted) {
        return Ok(vec![family]);
    }
    Ok(Family::ALL.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates_of(loaded: &[&str], launcher: Option<Family>, wanted: Option<Family>) -> String {
        let loaded: Vec<String> = loaded.iter().map(|path| (*path).to_owned()).collect();
        match candidates(&loaded, launcher, wanted) {
            Ok(families) => families
                .iter()
                .map(|f| f.name())
                .collect::<Vec<_>>()
                .join(" "),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_library_in_the_process_wins_then_the_launcher_then_the_wish() {
        use Family::{Mpich, OpenMpi};
        let libraries = ["/usr/lib/libc.so.6", "/x/libmpich.so.12.2.2"];
        assert_eq!(candidates_of(&libraries, Some(OpenMpi), None), "mpich");
        assert_eq!(candidates_of(&[], Some(OpenMpi), Some(Mpich)), "openmpi");
        assert_eq!(candidates_of(&[], None, Some(Mpich)), "mpich");
        assert_eq!(candidates_of(&[], None, None), "openmpi mpich");
        assert_eq!(
            candidates_of(&["/x/libmpi.so.12", "/x/libmpich.so.12"], None, None),
            "mpich"
        );
    }

    #[test]
    fn conflicts_name_both() {
        let text = candidates_of(&["/a/libmpi.so.40", "/b/libmpich.so.12"], None, None);
        assert!(
            text.contains("/a/libmpi.so.40") && text.contains("/b/libmpich.so.12"),
            "{text}"
        );
        let text = candidates_of(&["/a/libmpi.so.40"], None, Some(Family::Mpich));
        assert!(
            text.contains("MPI_CUDA_MPI=mpich") && text.contains("/a/libmpi.so.40"),
            "{text}"
        );
    }

    #[test]
    fn other_libraries_are_no_mpi() {
        for path in [
            "/x/libmpi_cxx.so.40",
            "/x/libmpichcxx.so.12",
            "libmpi_cuda_shim_mpich.so",
        ] {
            assert_eq!(Family::of_library(path), None, "{path}");
        }
    }
}
