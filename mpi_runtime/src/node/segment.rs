//! A segment of memory that ranks of a node share: a file in `/dev/shm`, which one rank makes, the
//! others map by its name, and nobody finds any more once all have mapped it.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::SystemTime;

use memmap2::MmapRaw;

/// A mapped segment. It loses its name, at the latest, with the rank that made it.
pub(crate) struct Segment {
    memory: MmapRaw,
    name: SegmentName,
    /// It was made here, and still has its name.
    is_named: AtomicBool,
}

/// What a segment is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentName {
    /// A number of [`new_number`], which the ranks have agreed on.
    pub(crate) number: u64,
    /// The rank that makes it, where each makes one.
    pub(crate) rank: Option<usize>,
}

/// A number that no other process names memory by. Never 0.
pub fn new_number() -> u64 {
    let mut hasher = DefaultHasher::new();
    (std::process::id(), SystemTime::now()).hash(&mut hasher);
    hasher.finish().max(1)
}

impl SegmentName {
    fn path(self) -> PathBuf {
        let SegmentName { number, rank } = self;
        match rank {
            Some(rank) => format!("/dev/shm/mpi_cuda.{number:016x}.{rank}").into(),
            None => format!("/dev/shm/mpi_cuda.{number:016x}").into(),
        }
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
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(name.path())?;
        let made = Self::reserve(&file, bytes, enough).and_then(|()| MmapRaw::map_raw(&file));
        if made.is_err() {
            remove(name);
        }
        Ok(Segment {
            memory: made?,
            name,
            is_named: AtomicBool::new(true),
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
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(name.path())?;
        let memory = MmapRaw::map_raw(&file)?;
        if !fits(memory.len()) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Segment {
            memory,
            name,
            is_named: AtomicBool::new(false),
        })
    }

    /// Takes the name away, once everybody has mapped it; of the rank that made it.
    pub(crate) fn unlink(&self) {
        if self.is_named.swap(false, Ordering::Relaxed) {
            remove(self.name);
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
}
