//! Opening the MPI that this process uses, before anything else of it is needed.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use parking_lot::Mutex;

use crate::error::StartError;
use crate::mpi::choice::Surroundings;
use crate::mpi::family::Family;
use crate::mpi::launcher::{self, Launched};
use crate::mpi::shim::Shim;
use crate::mpi::{libraries, parents};

/// Where to look for an MPI and for the shims.
#[derive(Clone, Debug, Default)]
pub struct LibraryOptions {
    /// `MPI_CUDA_MPI`.
    pub family: Option<Family>,
    /// `MPI_CUDA_LIBMPI`.
    pub library: Option<PathBuf>,
    /// Folders with libraries of packages.
    pub packages: Vec<PathBuf>,
    /// The folder of this library's own file.
    pub own_folder: PathBuf,
    /// `MPI_CUDA_SHIM_DIR`: where the shims are, if not in `own_folder`.
    pub shim_folder: Option<PathBuf>,
}

/// The MPI that was opened.
#[derive(Clone, Debug)]
pub struct MpiLibrary {
    /// Its file.
    pub file: PathBuf,
    /// Its ABI.
    pub family: Family,
    /// Who named it.
    pub by: &'static str,
    /// Why it may be another one than the launcher's, if so.
    pub doubt: Option<String>,
}

/// The one that was opened.
static OPENED: Mutex<Option<MpiLibrary>> = Mutex::new(None);

/// Opens the MPI that this process uses, and nothing else of it: whoever loads an MPI by its name
/// after that, as mpi4py does, gets this one. None if there is none and none is needed.
///
/// # Errors
/// If there should be one and there is none, or two.
pub fn open(options: &LibraryOptions) -> Result<Option<MpiLibrary>, StartError> {
    let launched = launcher::detect(|name| std::env::var(name).ok());
    open_for(options, launched.as_ref())
}

/// The MPI that was opened, if that has happened.
pub fn opened() -> Option<MpiLibrary> {
    OPENED.lock().clone()
}

pub(super) fn open_for(
    options: &LibraryOptions,
    launched: Option<&Launched>,
) -> Result<Option<MpiLibrary>, StartError> {
    let variable = |name: &str| std::env::var(name).ok();
    let for_mpi4py = options.own_folder.join("mpi4py");
    let loaded = libraries::mpis(&for_mpi4py);
    let mut opened = OPENED.lock();
    // The choice has been made: what the process has now is what was opened then.
    if let Some(known) = opened.as_ref().filter(|known| loaded == [&*known.file]) {
        return Ok(Some(known.clone()));
    }
    let surroundings = Surroundings {
        loaded,
        of_mpi4py: variable("MPI4PY_LIBMPI"),
        abi_of_mpi4py: variable("MPI4PY_MPIABI"),
        library: options.library.clone(),
        family: options.family,
        launcher: launched.and_then(|launched| launched.family),
        beside_launcher: match launched {
            Some(_) => parents::libraries_of_launcher(),
            None => Vec::new(),
        },
        packages: options.packages.clone(),
        exists: None,
    };
    let candidates = surroundings.candidates()?;
    let mut tried = Vec::new();
    for candidate in &candidates {
        let (file, family) = match libraries::open(&candidate.library) {
            Ok(found) => found,
            Err(reason) => {
                let library = candidate.library.display();
                tried.push(format!("{library}, {} ({reason})", candidate.by));
                continue;
            }
        };
        if opened.as_ref().is_none_or(|known| known.file != file) {
            let doubt = surroundings.doubt(&file, family);
            *opened = Some(MpiLibrary {
                file,
                family,
                by: candidate.by,
                doubt,
            });
            libraries::answer_for(family, &for_mpi4py);
        }
        return Ok(opened.clone());
    }
    let asked = options.family.is_some() || options.library.is_some();
    let needed = launched.is_some_and(|launched| launched.size > 1);
    if !asked && !needed {
        return Ok(None);
    }
    Err(StartError::NoMpi {
        launched: match launched {
            Some(Launched { size, launcher, .. }) => {
                format!("which is one of {size} by its launcher ({launcher})")
            }
            None => "which no launcher has started".into(),
        },
        tried: tried.join("; "),
        remedy: remedy(
            surroundings.wish().filter(|_| options.library.is_none()),
            launched.is_some(),
        ),
    })
}

/// What to do where there is no MPI: `wish` is the variable that says which ABI to look for.
fn remedy(wish: Option<String>, is_launched: bool) -> String {
    let set = match wish {
        Some(wish) => format!("Unset {wish}, which allows this ABI alone, or set"),
        None => "Set".into(),
    };
    let (whose, alone) = match is_launched {
        true => (
            "the launcher's MPI",
            "; MPI_CUDA_SINGLETON=1 runs separate worlds of size 1 on purpose",
        ),
        false => ("an MPI", ""),
    };
    format!(
        "{set} MPI_CUDA_LIBMPI to the libmpi.so of {whose}, or have the dynamic loader find it \
         (LD_LIBRARY_PATH, `module load`){alone}"
    )
}

/// The shim for the MPI that this process uses; none if there is no MPI and none is needed.
pub(super) fn load_shim(
    options: &LibraryOptions,
    launched: Option<&Launched>,
    singleton: bool,
) -> Result<Option<(Shim, MpiLibrary)>, StartError> {
    let needed = launched.is_some_and(|launched| launched.size > 1) && !singleton;
    let library = match open_for(options, launched) {
        Ok(Some(library)) => library,
        Ok(None) => return Ok(None),
        // Worlds of one rank need none, unless the user has named one.
        Err(StartError::NoMpi { .. }) if singleton && options.library.is_none() => return Ok(None),
        Err(error) => return Err(error),
    };
    let shims = options.shim_folder.as_ref().unwrap_or(&options.own_folder);
    match Shim::load(library.family, shims) {
        Ok(shim) => Ok(Some((shim, library))),
        Err(error) if needed || options.family.is_some() || options.library.is_some() => Err(error),
        Err(_) => Ok(None),
    }
}
