//! Which MPI library this process uses: the rule, as files to try.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use crate::error::StartError;
use crate::mpi::family::Family;

/// What decides.
#[derive(Default)]
pub struct Surroundings<'a> {
    /// Paths of the libraries in this process.
    pub loaded: Vec<PathBuf>,
    /// `MPI4PY_LIBMPI`: files, or folders that have one.
    pub of_mpi4py: Option<String>,
    /// `MPI4PY_MPIABI`.
    pub abi_of_mpi4py: Option<String>,
    /// `MPI_CUDA_LIBMPI`.
    pub library: Option<PathBuf>,
    /// `MPI_CUDA_MPI`.
    pub family: Option<Family>,
    /// The MPI whose launcher started this process, where that is certain.
    pub launcher: Option<Family>,
    /// The launcher's own libraries.
    pub beside_launcher: Vec<PathBuf>,
    /// Folders with libraries of packages, such as those of a virtual environment.
    pub packages: Vec<PathBuf>,
    /// Whether there is such a file or folder.
    pub exists: Option<&'a dyn Fn(&Path) -> bool>,
}

/// A library to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// A path, or a name for the dynamic loader to find.
    pub library: PathBuf,
    /// Its family, if its name says that.
    pub family: Option<Family>,
    /// Who named it.
    pub by: &'static str,
}

impl Surroundings<'_> {
    /// What to try, in order, and nothing else. The first of these that says something decides: the
    /// library in the process, `MPI_CUDA_LIBMPI`, `MPI4PY_LIBMPI`, the launcher, and then packages
    /// and the dynamic loader.
    ///
    /// # Errors
    /// If two MPIs are loaded, or another one than `MPI_CUDA_MPI` wants.
    pub fn candidates(&self) -> Result<Vec<Candidate>, StartError> {
        if let Some(path) = self.the_loaded()? {
            return Ok(vec![candidate(path.clone(), "in this process already")]);
        }
        if let Some(path) = &self.library {
            return Ok(self.in_entry(path, "named by MPI_CUDA_LIBMPI"));
        }
        let entries = self.of_mpi4py.iter().flat_map(std::env::split_paths);
        let entries = entries.filter(|entry| entry != "");
        let named: Vec<_> = entries
            .flat_map(|entry| self.in_entry(&entry, "named by MPI4PY_LIBMPI"))
            .collect();
        if !named.is_empty() {
            return Ok(named);
        }
        let wanted = self.wanted();
        let beside: Vec<_> = self
            .launchers(&wanted)
            .map(|path| candidate(path.clone(), "the launcher's"))
            .collect();
        if !beside.is_empty() {
            return Ok(beside);
        }
        let installed = self.installed(&wanted).into_iter();
        let by_name = wanted.into_iter().flat_map(Family::libraries);
        let by_name = by_name.map(|name| candidate(name.into(), "by its usual name"));
        Ok(installed.chain(by_name).collect())
    }

    /// Why the library `path` of `family` may be another one than the user or the launcher wants,
    /// if so.
    pub fn doubt(&self, path: &Path, family: Family) -> Option<String> {
        let all = [
            self.not_followed(path, family),
            self.not_followed_of_mpi4py(path, family),
            self.not_the_launchers(path),
        ];
        let all: Vec<_> = all.into_iter().flatten().collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// `MPI_CUDA_MPI` comes last of all that names an MPI.
    fn not_followed(&self, path: &Path, family: Family) -> Option<String> {
        let wanted = self.family.filter(|&wanted| wanted != family)?;
        let file = path.display();
        Some(match self.launcher.filter(|one| !one.serves(wanted)) {
            Some(launcher) => format!(
                "MPI_CUDA_MPI={} is not followed, since the launcher of this job belongs to \
                 {launcher}: the job uses {file}; unset MPI_CUDA_MPI, or start the job with the \
                 launcher of the MPI that you want",
                wanted.name(),
                launcher = launcher.name(),
            ),
            None => format!(
                "MPI_CUDA_MPI={} is not followed, since another variable or the process names \
                 {file}, which is {}: unset one of them",
                wanted.name(),
                family.name(),
            ),
        })
    }

    /// mpi4py, if it is used, follows its variable or is refused.
    fn not_followed_of_mpi4py(&self, path: &Path, family: Family) -> Option<String> {
        let wanted = self.abi_of_mpi4py.as_deref()?;
        let why = match Family::from_mpi4py(wanted) {
            Some(wanted) if wanted == family => return None,
            Some(_) => "the job uses",
            None => "it names no MPI that mpi4py knows, and the job uses",
        };
        Some(format!(
            "MPI4PY_MPIABI={wanted} is not followed: {why} {}, which is {}; unset MPI4PY_MPIABI",
            path.display(),
            family.name(),
        ))
    }

    /// The variable that says which families to look for, if one is followed.
    pub fn wish(&self) -> Option<String> {
        let named = match (self.family, &self.abi_of_mpi4py) {
            (Some(family), _) => (family, format!("MPI_CUDA_MPI={}", family.name())),
            (None, Some(abi)) => (Family::from_mpi4py(abi)?, format!("MPI4PY_MPIABI={abi}")),
            (None, None) => return None,
        };
        self.served().contains(&named.0).then_some(named.1)
    }

    fn not_the_launchers(&self, path: &Path) -> Option<String> {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let beside: Vec<_> = self.launchers(&self.served()).collect();
        if beside.is_empty() || beside.iter().any(|own| real(own) == real(path)) {
            return None;
        }
        Some(format!(
            "this job's launcher belongs to {}, and its ranks use {}: if they do not find each \
             other, or fail at random, start the job with the launcher of that MPI or set \
             MPI_CUDA_LIBMPI to the launcher's library",
            beside[0].display(),
            path.display()
        ))
    }

    /// The MPI in this process.
    fn the_loaded(&self) -> Result<Option<&PathBuf>, StartError> {
        let mut all = self.loaded.iter();
        let Some(first) = all.next() else {
            return Ok(None);
        };
        let text = |path: &Path| path.display().to_string();
        if let Some(second) = all.next() {
            return Err(StartError::TwoLibraries {
                first: text(first),
                second: text(second),
            });
        }
        match self.family {
            Some(wanted) if Family::of_library(&text(first)).is_some_and(|own| own != wanted) => {
                Err(StartError::OtherLibrary {
                    wanted: wanted.name(),
                    loaded: text(first),
                })
            }
            _ => Ok(Some(first)),
        }
    }

    /// The launcher's libraries of these families: a folder may hold those of other MPIs as well.
    fn launchers(&self, families: &[Family]) -> impl Iterator<Item = &PathBuf> {
        self.beside_launcher.iter().filter(|path| {
            Family::of_library(&path.to_string_lossy())
                .is_some_and(|family| families.contains(&family))
        })
    }

    /// The families that the launcher serves; all if it is not known.
    fn served(&self) -> Vec<Family> {
        let all = Family::ALL.into_iter();
        all.filter(|&family| self.launcher.is_none_or(|launcher| launcher.serves(family)))
            .collect()
    }

    /// The families to look for. The launcher's comes before what was wished for, unless it serves
    /// that as well.
    fn wanted(&self) -> Vec<Family> {
        let of_mpi4py = self.abi_of_mpi4py.as_deref();
        let wish = self.family.or_else(|| Family::from_mpi4py(of_mpi4py?));
        let served = self.served();
        match wish.filter(|wish| served.contains(wish)) {
            Some(wish) => vec![wish],
            None => served,
        }
    }

    /// What an entry of a variable names: a file, or a folder that has one. A folder may have those
    /// of several families; those that the launcher serves come first.
    fn in_entry(&self, entry: &Path, by: &'static str) -> Vec<Candidate> {
        let wanted = self.wanted();
        let others = Family::ALL.into_iter();
        let others = others.filter(|family| !wanted.contains(family));
        let families = wanted.iter().copied().chain(others);
        let names = families.flat_map(Family::libraries);
        let inside: Vec<_> = names
            .map(|name| entry.join(name))
            .filter(|path| self.is_there(path))
            .map(|path| candidate(path, by))
            .collect();
        match inside.is_empty() {
            true => vec![candidate(entry.to_owned(), by)],
            false => inside,
        }
    }

    /// The libraries of these families in the folders of packages.
    fn installed(&self, families: &[Family]) -> Vec<Candidate> {
        let names = || families.iter().flat_map(|family| family.libraries());
        let packages = self.packages.iter();
        packages
            .flat_map(|folder| names().map(|name| folder.join(name)))
            .filter(|path| self.is_there(path))
            .map(|path| candidate(path, "of a package in this environment"))
            .collect()
    }

    fn is_there(&self, path: &Path) -> bool {
        self.exists
            .map_or_else(|| path.exists(), |exists| exists(path))
    }
}

fn candidate(library: PathBuf, by: &'static str) -> Candidate {
    let family = Family::of_library(&library.to_string_lossy());
    Candidate {
        library,
        family,
        by,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The candidates of surroundings in which these files exist.
    fn of(surroundings: Surroundings<'_>, files: &[&str]) -> Vec<String> {
        let exists = |path: &Path| files.iter().any(|file| path == Path::new(file));
        let surroundings = Surroundings {
            exists: Some(&exists),
            ..surroundings
        };
        match surroundings.candidates() {
            Ok(all) => all
                .iter()
                .map(|found| found.library.display().to_string())
                .collect(),
            Err(error) => vec![error.to_string()],
        }
    }

    fn paths(all: &[&str]) -> Vec<PathBuf> {
        all.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn the_first_that_says_something_decides() {
        let with = |loaded: &[&str], library: Option<&str>, python: bool| Surroundings {
            loaded: paths(loaded),
            library: library.map(PathBuf::from),
            of_mpi4py: python.then(|| "/m:/n/libmpi.so.40".into()),
            launcher: Some(Family::OpenMpi),
            beside_launcher: paths(&["/o/libmpi.so.40"]),
            ..Surroundings::default()
        };
        let files = ["/m/libmpi.so.12"];
        let loaded = of(
            with(&["/x/libmpich.so.12"], Some("/y/libmpi.so.40"), true),
            &files,
        );
        assert_eq!(loaded, ["/x/libmpich.so.12"]);
        assert_eq!(
            of(with(&[], Some("/y/libfoo.so"), true), &files),
            ["/y/libfoo.so"]
        );
        let python = of(with(&[], None, true), &files);
        assert_eq!(python, ["/m/libmpi.so.12", "/n/libmpi.so.40"]);
        assert_eq!(of(with(&[], None, false), &files), ["/o/libmpi.so.40"]);
    }

    #[test]
    fn without_a_launcher_packages_come_before_the_loader() {
        let with = |family| Surroundings {
            family,
            packages: paths(&["/venv/lib"]),
            ..Surroundings::default()
        };
        let files = ["/venv/lib/libmpi.so.12", "/venv/lib/libmpi_abi.so.1"];
        let all = of(with(None), &files);
        assert_eq!(all[..3], [files[0], files[1], "libmpi.so.40"]);
        let some = of(with(Some(Family::MpiAbi)), &files);
        assert_eq!(some, [files[1], "libmpi_abi.so.1", "libmpi_abi.so.0"]);
    }

    #[test]
    fn a_launcher_serves_its_own_abi_and_that_of_the_standard() {
        let with = |family| Surroundings {
            family,
            launcher: Some(Family::Mpich),
            beside_launcher: paths(&["/v/libmpi.so.12", "/v/libmpi_abi.so.1", "/v/libmpi.so.40"]),
            ..Surroundings::default()
        };
        let both = ["/v/libmpi.so.12", "/v/libmpi_abi.so.1"];
        assert_eq!(of(with(None), &[]), both);
        assert_eq!(of(with(Some(Family::OpenMpi)), &[]), both);
        assert_eq!(of(with(Some(Family::MpiAbi)), &[]), both[1..]);
    }

    #[test]
    fn conflicts_name_both() {
        let loaded = |paths_of: &[&str], family| Surroundings {
            loaded: paths(paths_of),
            family,
            ..Surroundings::default()
        };
        let two = ["/a/libmpi.so.12", "/b/libmpi.so.12"];
        let text = of(loaded(&two, None), &[]).concat();
        assert!(text.contains(two[0]) && text.contains(two[1]), "{text}");
        let text = of(loaded(&["/a/libmpi.so.40"], Some(Family::Mpich)), &[]).concat();
        assert!(text.contains("MPI_CUDA_MPI=mpich") && text.contains("/a/libmpi.so.40"));
    }

    #[test]
    fn another_library_than_the_launchers_is_said() {
        let surroundings = Surroundings {
            launcher: Some(Family::Mpich),
            beside_launcher: paths(&["/v/libmpi.so.40", "/v/libmpi.so.12", "/v/libmpi_abi.so.1"]),
            ..Surroundings::default()
        };
        let doubt = |path: &str| surroundings.doubt(Path::new(path), Family::Mpich);
        assert_eq!(doubt("/v/libmpi_abi.so.1"), None);
        let text = doubt("/w/libmpi.so.12").unwrap();
        assert!(text.contains("/v/libmpi.so.12") && text.contains("/w/libmpi.so.12"));
        // Debian has both in one folder.
        assert!(doubt("/v/libmpi.so.40").is_some());
        let nothing = Surroundings::default();
        let file = Path::new("/w/libmpi.so.12");
        assert_eq!(nothing.doubt(file, Family::Mpich), None);
    }

    #[test]
    fn a_wish_that_is_not_followed_is_said() {
        let with = |launcher, family| Surroundings {
            launcher,
            family: Some(family),
            beside_launcher: paths(&["/v/libmpi.so.12"]),
            ..Surroundings::default()
        };
        let file = Path::new("/v/libmpi.so.12");
        let surroundings = with(Some(Family::Mpich), Family::OpenMpi);
        let text = surroundings.doubt(file, Family::Mpich).unwrap();
        assert!(
            text.contains("MPI_CUDA_MPI=openmpi") && text.contains("belongs to mpich"),
            "{text}"
        );
        let text = with(None, Family::OpenMpi).doubt(file, Family::Mpich);
        assert!(text.unwrap().contains("which is mpich: unset one"));
        let same = with(Some(Family::Mpich), Family::Mpich);
        assert_eq!(same.doubt(file, Family::Mpich), None);
    }

    #[test]
    fn a_wish_of_mpi4pys_that_is_not_followed_is_said() {
        let with = |abi: &str| Surroundings {
            launcher: Some(Family::Mpich),
            abi_of_mpi4py: Some(abi.into()),
            beside_launcher: paths(&["/v/libmpi.so.12"]),
            ..Surroundings::default()
        };
        let doubt = |abi| with(abi).doubt(Path::new("/v/libmpi.so.12"), Family::Mpich);
        let text = doubt("openmpi").unwrap();
        assert!(text.contains("MPI4PY_MPIABI=openmpi is not followed: the job uses"));
        assert!(doubt("bogus").unwrap().contains("names no MPI that mpi4py"));
        assert_eq!(doubt("impi"), None);
        assert_eq!(with("openmpi").wish(), None);
        assert_eq!(with("mpiabi").wish().unwrap(), "MPI4PY_MPIABI=mpiabi");
    }

    #[test]
    fn of_a_folder_the_launchers_family_comes_first() {
        let with = |launcher| Surroundings {
            launcher,
            library: Some("/d".into()),
            ..Surroundings::default()
        };
        let files = ["/d/libmpi.so.40", "/d/libmpi.so.12"];
        assert_eq!(of(with(None), &files), files);
        let mpich = of(with(Some(Family::Mpich)), &files);
        assert_eq!(mpich, [files[1], files[0]]);
    }
}
