//! Which ranks are on this one's node.
//!
//! MPI says which ranks can share memory through it. One that leaves memory to its network layer
//! says that none can, such as an MPICH 5 with UCX. So if it says that of all ranks, they compare
//! where they run.

use std::ffi::c_int;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;

use mpi::ffi;

use crate::code::{SUCCESS, attempt};

/// Makes the communicator of the ranks of this node, in the order of `comm`.
///
/// # Safety
/// Collective over a live communicator, while MPI runs; `node` is writable.
pub(crate) unsafe fn split(comm: ffi::MPI_Comm, node: *mut ffi::MPI_Comm) -> c_int {
    let (mut ranks, mut size, mut most) = (0, 0, 0);
    // SAFETY: as above; the pointers are writable numbers, of the type that MPI is told.
    unsafe {
        attempt! {
            ffi::MPI_Comm_split_type(
                comm,
                ffi::MPI_COMM_TYPE_SHARED as c_int,
                0,
                ffi::RSMPI_INFO_NULL,
                node,
            );
            ffi::MPI_Comm_size(comm, &mut ranks);
            ffi::MPI_Comm_size(*node, &mut size);
            ffi::MPI_Allreduce(
                (&raw const size).cast(),
                (&raw mut most).cast(),
                1,
                ffi::RSMPI_INT32_T,
                ffi::RSMPI_MAX,
                comm,
            );
        };
        if ranks == 1 || most > 1 {
            return SUCCESS;
        }
        ffi::MPI_Comm_free(node);
        by_place(comm, ranks, node)
    }
}

/// The same, by what the ranks know of where they are.
///
/// # Safety
/// As for [`split`]; `comm` has so many `ranks`.
unsafe fn by_place(comm: ffi::MPI_Comm, ranks: c_int, node: *mut ffi::MPI_Comm) -> c_int {
    let mut rank = 0;
    let mut places = vec![0u64; ranks as usize];
    // SAFETY: as above; there is room for a number of each rank.
    unsafe {
        attempt! { ffi::MPI_Comm_rank(comm, &mut rank); };
        let own = place().unwrap_or(rank as u64);
        attempt! {
            ffi::MPI_Allgather(
                (&raw const own).cast(),
                1,
                ffi::RSMPI_UINT64_T,
                places.as_mut_ptr().cast(),
                1,
                ffi::RSMPI_UINT64_T,
                comm,
            );
        };
        // A node is called by its first rank.
        let first = places.iter().position(|&place| place == own);
        ffi::MPI_Comm_split(comm, first.map_or(rank, |first| first as c_int), rank, node)
    }
}

/// A number of this boot of this kernel, of its name, and of the memory that its processes share:
/// containers have their own. None if the system does not say.
fn place() -> Option<u64> {
    let boot = fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    let name = fs::read("/proc/sys/kernel/hostname").ok()?;
    let memory = fs::metadata("/dev/shm").ok()?;
    let mut hasher = DefaultHasher::new();
    (boot, name, memory.dev(), memory.ino()).hash(&mut hasher);
    Some(hasher.finish())
}
