//! A segment of memory that ranks of a node share: a file in `/dev/shm`, which one rank makes, the
//! others map by its name, and nobody finds any more once all have mapped it.
//!
//! Its name cannot be guessed, and it is opened only if it is this user's. The rank that made it
//! holds it (flock(2)) as long as it has its name. So one that nobody holds was left by a rank that
//! was killed, and [`sweep`] removes it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64};
use std::time::{Duration, SystemTime};

use memmap2::MmapRaw;
use parking_lot::Mutex;

use crate::node::own_file;

/// Where the memory is.
const FOLDER: &str = "/dev/shm";
/// How the names of all segments begin.
const PREFIX: &str = "mpi_cuda.";
/// A segment that is younger may be one that its rank does not hold yet.
const YOUNG: Duration = Duration::from_secs(10);

/// A mapped segment. It loses its name, at the latest, with the rank that made it.
pub(crate) struct Segment {
    memory: MmapRaw,
    name: SegmentName,
    /// The file, held, if it was made here and still has its name.
    named: Mutex<Option<File>>,
}

/// What a segment is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentName {
    /// A number of [`new_number`], which the ranks have agreed on.
    pub(crate) number: u64,
    /// The rank that makes it, where each makes one.
    pub(crate) rank: Option<usize>,
}

/// A number to name memory by, which nobody can guess. Never 0.
pub fn new_number() -> u64 {
    own_file::random()
}

impl SegmentName {
    fn path(self) -> PathBuf {
        let SegmentName { number, rank } = self;
        let of_rank = rank.map_or(String::new(), |rank| format!(".{rank}"));
        Path::new(FOLDER).join(format!("{PREFIX}{number:016x}{of_rank}"))
    }

    #[cfg(test)]
    pub(crate) fn exists(self) -> bool {
        self.path().exists()
    }
}

/// Structs of atomics that are valid whatever their bytes are.
///
/// # Safety
/// They must have no other fields.
pub(crate) unsafe trait Atomics {}

// SAFETY: an atomic number, of which every value is valid.
unsafe impl Atomics for AtomicU64 {}
// SAFETY: an atomic number, of which every value is valid.
unsafe impl Atomics for AtomicU8 {}

impl Segment {
    /// Makes a segment of zeros, if there is `enough` where so many bytes are left.
    pub(crate) fn create(
        name: SegmentName,
        bytes: usize,
        enough: impl FnOnce(u64) -> bool,
    ) -> io::Result<Segment> {
        let file = own_file::create(&name.path())?;
        own_file::hold(&file);
        let made = Self::reserve(&file, bytes, enough).and_then(|()| MmapRaw::map_raw(&file));
        if made.is_err() {
            remove(name);
        }
        Ok(Segment {
            memory: made?,
            name,
            named: Mutex::new(Some(file)),
        })
    }

    /// Its memory, at once: to lack it later would be a signal.
    fn reserve(file: &File, bytes: usize, enough: impl FnOnce(u64) -> bool) -> io::Result<()> {
        if !enough(bytes_left(file)?) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let length = libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::StorageFull)?;
        // SAFETY: the descriptor is open; nothing else is passed.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, length) } {
            0 => Ok(()),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    /// Maps the segment that another rank has made, if its size `fits`.
    pub(crate) fn open(name: SegmentName, fits: impl FnOnce(usize) -> bool) -> io::Result<Segment> {
        let file = own_file::open(&name.path(), true)?;
        let memory = MmapRaw::map_raw(&file)?;
        if !fits(memory.len()) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Segment {
            memory,
            name,
            named: Mutex::new(None),
        })
    }

    /// Takes the name away, once everybody has mapped it; of the rank that made it.
    pub(crate) fn unlink(&self) {
        if let Some(file) = self.named.lock().take() {
            remove(self.name);
            drop(file);
        }
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// The struct that lies `offset` bytes after its start, for all ranks.
    pub(crate) fn atomics<T: Atomics>(&self, offset: usize) -> &T {
        assert!(offset.is_multiple_of(align_of::<T>()));
        assert!(offset + size_of::<T>() <= self.bytes());
        // SAFETY: inside the mapping, which lives as long as `self`, and aligned, since a mapping
        // begins at a page. Other processes write there, but `T` has only atomics, which any bytes
        // are valid for.
        unsafe { &*self.memory.as_mut_ptr().add(offset).cast::<T>() }
    }

    /// The address of a byte in it, or just behind.
    pub(crate) fn address(&self, offset: usize) -> *mut u8 {
        self.memory.as_mut_ptr().wrapping_add(offset)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.unlink();
    }
}

/// Removes the segments that ranks of this user left behind when they were killed.
pub fn sweep() {
    sweep_older(YOUNG);
}

fn sweep_older(age: Duration) {
    let Ok(entries) = fs::read_dir(FOLDER) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(is_a_segment) {
            // What cannot be removed is another user's, or is used.
            let _ = remove_if_left(&entry.path(), age);
        }
    }
}

/// Whether a file of this name is a segment.
fn is_a_segment(file: &str) -> bool {
    let Some(rest) = file.strip_prefix(PREFIX) else {
        return false;
    };
    let (number, rank) = rest.split_once('.').unwrap_or((rest, "0"));
    let hexadecimal = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    number.len() == 16
        && number.bytes().all(hexadecimal)
        && !rank.is_empty()
        && rank.bytes().all(|byte| byte.is_ascii_digit())
}

fn remove_if_left(path: &Path, age: Duration) -> io::Result<()> {
    let file = own_file::open(path, false)?;
    let about = file.metadata()?;
    let made = about.modified()?;
    let is_old = SystemTime::now()
        .duration_since(made)
        .is_ok_and(|time| time >= age);
    if !is_old || !own_file::hold(&file) {
        return Ok(());
    }
    let now = fs::symlink_metadata(path)?;
    if (now.dev(), now.ino()) == (about.dev(), about.ino()) {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn remove(name: SegmentName) {
    // Nothing is lost but tidiness if it cannot be removed.
    let _ = fs::remove_file(name.path());
}

/// Bytes that are left where the file is.
fn bytes_left(file: &File) -> io::Result<u64> {
    // SAFETY: all zero bytes are a valid value of this plain struct.
    let mut about: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the struct outlives the call.
    match unsafe { libc::fstatvfs(file.as_raw_fd(), &mut about) } {
        0 => Ok(about.f_bavail * about.f_frsize),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn what_one_writes_the_other_reads_until_the_name_is_gone() {
        let name = SegmentName {
            number: new_number(),
            rank: Some(3),
        };
        let made = Segment::create(name, 4096, |_| true).unwrap();
        assert!(Segment::create(name, 4096, |_| true).is_err());
        assert!(Segment::open(name, |bytes| bytes == 64).is_err());
        let mapped = Segment::open(name, |bytes| bytes == 4096).unwrap();
        made.atomics::<AtomicU64>(4088).store(7, Ordering::Relaxed);
        assert_eq!(mapped.atomics::<AtomicU64>(4088).load(Ordering::Relaxed), 7);
        drop(mapped);
        assert!(name.exists());
        drop(made);
        assert!(!name.exists());
    }

    #[test]
    fn a_segment_that_does_not_fit_leaves_nothing_behind() {
        let name = SegmentName {
            number: new_number(),
            rank: None,
        };
        assert!(Segment::create(name, 4096, |left| left == 0).is_err());
        assert!(Segment::create(name, 1 << 60, |_| true).is_err());
        assert!(!name.exists());
    }

    #[test]
    fn only_what_nobody_holds_is_swept() {
        let name = || SegmentName {
            number: new_number(),
            rank: Some(3),
        };
        let used = Segment::create(name(), 4096, |_| true).unwrap();
        // As a rank leaves it that was killed: a file that nobody holds.
        let left = name();
        drop(own_file::create(&left.path()).unwrap());
        sweep();
        assert!(left.exists(), "it is young");
        sweep_older(Duration::ZERO);
        assert!(!left.exists() && used.name.exists());
    }

    #[test]
    fn other_files_are_no_segments() {
        for name in ["mpi_cuda.0123456789abcdef", "mpi_cuda.0123456789abcdef.17"] {
            assert!(is_a_segment(name), "{name}");
        }
        for name in [
            "mpi_cuda.0123456789abcde",
            "mpi_cuda.0123456789ABCDEF",
            "mpi_cuda.0123456789abcdef.",
            "mpi_cuda.0123456789abcdef.x",
            "mpi_cuda.0123456789abcdef.1.2",
            "mpi_cuda",
        ] {
            assert!(!is_a_segment(name), "{name}");
        }
    }

    #[test]
    fn a_symbolic_link_is_not_opened() {
        let (made, link) = (new_number(), new_number());
        let [made, link] = [made, link].map(|number| SegmentName { number, rank: None });
        let segment = Segment::create(made, 4096, |_| true).unwrap();
        std::os::unix::fs::symlink(made.path(), link.path()).unwrap();
        assert!(Segment::open(link, |_| true).is_err());
        assert!(Segment::create(link, 4096, |_| true).is_err());
        fs::remove_file(link.path()).unwrap();
        drop(segment);
    }
}
