//! Files in folders that all users share: made so that nobody else's can be in their place, and
//! trusted only if they are this user's.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Makes a file that only this user may read and write; an error if there is anything by this name.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // Neither an existing file nor a symbolic link is opened (open(2), O_EXCL).
    let options = options.read(true).write(true).create_new(true);
    options.mode(0o600).open(path)
}

/// Makes a file without a name, in memory: gone with the last process that has it open.
pub(crate) fn nameless() -> io::Result<File> {
    // SAFETY: the name, for people to read, is a text that ends in 0.
    match unsafe { libc::memfd_create(c"mpi_cuda".as_ptr(), libc::MFD_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just opened the descriptor, for this caller.
        descriptor => Ok(unsafe { File::from_raw_fd(descriptor) }),
    }
}

/// Opens a file of this user's that nobody else may write to.
pub(crate) fn open(path: &Path, write: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // A pipe in its place must not make us wait.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let options = options.read(true).write(write).custom_flags(flags);
    let file = options.open(path)?;
    match refusal(&file.metadata()?) {
        None => Ok(file),
        Some(why) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("{} {why}", path.display()),
        )),
    }
}

/// Whether a file is this user's.
pub(crate) fn is_ours(about: &Metadata) -> bool {
    // SAFETY: it has no arguments, and cannot fail.
    about.uid() == unsafe { libc::geteuid() }
}

/// Why a file is not trusted.
fn refusal(about: &Metadata) -> Option<String> {
    // SAFETY: it has no arguments, and cannot fail.
    let own = unsafe { libc::geteuid() };
    if !about.is_file() {
        Some("is no file".into())
    } else if about.uid() != own {
        Some(format!("belongs to user {}, not to {own}", about.uid()))
    } else if about.mode() & 0o022 != 0 {
        Some("may be written by other users".into())
    } else {
        None
    }
}

/// Holds a file for this process, until the last descriptor of `file` is closed; false if another
/// process holds it. The kernel lets go of it however the process ends.
pub(crate) fn hold(file: &File) -> bool {
    // SAFETY: the descriptor is open; nothing else is passed.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// A random number that nobody can guess. Never 0.
pub(crate) fn random() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: the kernel writes at most so many bytes.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    assert_eq!(got, 8, "getrandom gives as few bytes as these at once");
    u64::from_ne_bytes(bytes).max(1)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn only_own_files_are_opened() {
        let folder = std::env::temp_dir().join(format!("mpi_cuda_own_file_{:x}", random()));
        fs::create_dir(&folder).unwrap();
        let (file, link) = (folder.join("file"), folder.join("link"));
        create(&file).unwrap();
        symlink(&file, &link).unwrap();
        assert!(create(&file).is_err() && create(&link).is_err());
        assert!(open(&file, true).is_ok());
        assert!(open(&link, false).is_err() && open(&folder, false).is_err());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o622)).unwrap();
        let error = open(&file, false).unwrap_err().to_string();
        assert!(error.contains("may be written by other users"), "{error}");
        fs::remove_dir_all(&folder).unwrap();
        // A device: nobody's file.
        assert!(open(Path::new("/dev/null"), false).is_err());
    }

    #[test]
    fn a_file_of_another_user_is_not_trusted() {
        // SAFETY: it has no arguments, and cannot fail.
        let root = unsafe { libc::geteuid() } == 0;
        let path = std::env::temp_dir().join(format!("mpi_cuda_own_file_{:x}", random()));
        let file = create(&path).unwrap();
        if root {
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            let error = open(&path, true).unwrap_err().to_string();
            assert!(error.contains("belongs to user 65534"), "{error}");
        }
        drop(file);
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn one_process_holds_a_file() {
        let path = std::env::temp_dir().join(format!("mpi_cuda_own_file_{:x}", random()));
        let (one, other) = (create(&path).unwrap(), open(&path, false).unwrap());
        assert!(hold(&one) && !hold(&other));
        drop(one);
        assert!(hold(&other));
        fs::remove_file(&path).unwrap();
    }
}
