//! The shared libraries of this process: which MPI is among them, and opening one.

use std::ffi::{CStr, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};

use crate::elf;
use crate::error::Failure;
use crate::mpi::family::Family;

/// Paths of the shared libraries now loaded in this process.
pub fn loaded() -> Vec<String> {
    unsafe extern "C" fn collect(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        data: *mut libc::c_void,
    ) -> c_int {
        // SAFETY: `data` is the vector below; glibc passes a valid info with a NUL-ended name.
        unsafe {
            let paths = &mut *data.cast::<Vec<String>>();
            paths.push(
                CStr::from_ptr((*info).dlpi_name)
                    .to_string_lossy()
                    .into_owned(),
            );
        }
        0
    }
    let mut paths: Vec<String> = Vec::new();
    // SAFETY: the callback matches, and `paths` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(collect), std::ptr::from_mut(&mut paths).cast()) };
    paths
}

/// The MPI libraries in this process, each file once, but for those in `own`: a folder with
/// libraries that have an MPI's name and nothing of it.
pub fn mpis(own: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = Vec::new();
    for path in loaded() {
        let path = Path::new(&path);
        let is_mpi = |path: &Path| Family::of_library(&path.to_string_lossy()).is_some();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with("libmpi") || path.starts_with(own) {
            continue;
        }
        // The loader knows it by the name that it was opened by: `libmpi.so` is any family's.
        let file = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if (is_mpi(path) || is_mpi(&file)) && !files.contains(&file) {
            files.push(file);
        }
    }
    files
}

/// The file that holds this address.
fn file_of(address: *mut c_void) -> Option<PathBuf> {
    // SAFETY: zero bytes are a valid Dl_info.
    let mut about: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: it takes any address, and fills `about` if it returns other than 0.
    if unsafe { libc::dladdr(address, &mut about) } == 0 || about.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader's own text, of a library that stays.
    let path = unsafe { CStr::from_ptr(about.dli_fname) };
    let path = PathBuf::from(path.to_string_lossy().into_owned());
    Some(path.canonicalize().unwrap_or(path))
}

/// Opens an MPI library for good, so that what is loaded later finds its functions. Tells which
/// file that is, and its ABI.
///
/// # Errors
/// If it cannot be loaded, or is no MPI.
pub fn open(library: &Path) -> Result<(PathBuf, Family), Failure> {
    elf::check(library)?;
    // SAFETY: loading runs the initialisers of an MPI, as in any program that is linked to one.
    let opened = unsafe { Library::open(Some(library), RTLD_LAZY | RTLD_GLOBAL) };
    let opened = opened?;
    let has = |name: &str| {
        // SAFETY: only the address is looked at.
        unsafe { opened.get::<*const ()>(name.as_bytes()) }
    };
    let version = has("MPI_Get_library_version\0").map_err(
        |_| "it has no MPI_Get_library_version: it is no MPI library, or one older than MPI 3.0",
    )?;
    let file = file_of(version.as_raw_ptr()).unwrap_or_else(|| library.to_owned());
    let family = match () {
        () if has("ompi_mpi_comm_self\0").is_ok() => Family::OpenMpi,
        () if Family::of_library(&file.to_string_lossy()) == Some(Family::MpiAbi) => Family::MpiAbi,
        () => Family::Mpich,
    };
    std::mem::forget(opened);
    Ok((file, family))
}

/// Makes sure that a module which is linked to the usual name of MPICH's library accepts the one
/// that is loaded, which Debian and Cray name otherwise: loads an empty library of that name.
/// mpi4py has such modules.
pub fn answer_for(family: Family, folder: &Path) {
    let Some(name) = family.libraries().first() else {
        return;
    };
    let answers = |name: &Path, flags: c_int| {
        // SAFETY: with RTLD_NOLOAD nothing is loaded; the library in `folder` is empty.
        let opened = unsafe { Library::open(Some(name), RTLD_LAZY | flags) };
        opened.map(std::mem::forget).is_ok()
    };
    if !answers(Path::new(name), libc::RTLD_NOLOAD) {
        answers(&folder.join(name), 0);
    }
}
