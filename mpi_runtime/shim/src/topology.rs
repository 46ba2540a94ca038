//! What MPI says of the topology of a communicator (MPI 4.0, chapter 8).

use std::ffi::{CStr, c_char, c_int};
use std::sync::LazyLock;

use mpi::ffi;

use crate::checked::Checked;
use crate::code::{SUCCESS, attempt};
use crate::handle::comm_from_bits;

/// From how many neighbours a rank receives, and to how many it sends. `MPI_PROC_NULL` counts.
pub(crate) fn degrees(comm: ffi::MPI_Comm, sources: &mut c_int, destinations: &mut c_int) -> c_int {
    let (mut kind, mut count, mut rank, mut weighted) = (0, 0, 0, 0);
    // SAFETY: the communicator of a checked operation is live, and each question is one that its
    // topology has; constants of the linked MPI.
    unsafe {
        attempt! { ffi::MPI_Topo_test(comm, &mut kind); };
        if kind == ffi::RSMPI_DIST_GRAPH {
            return ffi::MPI_Dist_graph_neighbors_count(comm, sources, destinations, &mut weighted);
        }
        if kind == ffi::RSMPI_CART {
            attempt! { ffi::MPI_Cartdim_get(comm, &mut count); };
            count *= 2;
        } else if kind == ffi::RSMPI_GRAPH {
            attempt! {
                ffi::MPI_Comm_rank(comm, &mut rank);
                ffi::MPI_Graph_neighbors_count(comm, rank, &mut count);
            };
        } else {
            return ffi::MPI_ERR_TOPOLOGY as c_int;
        }
    }
    (*sources, *destinations) = (count, count);
    SUCCESS
}

/// Whether a dimension of a Cartesian topology closes after one or two ranks, so that both
/// neighbours are one rank, and this is an MPI whose nonblocking call confuses them: what was sent
/// to the one before must come from the one behind there (MPI 4.0, section 8.6). Open MPI 4.1 does
/// so in `MPI_Neighbor_alltoall`, and not in `MPI_Ineighbor_alltoall`.
pub(crate) fn closes_at_once(op: Checked<'_>) -> bool {
    is_of(b"Open MPI") && has_closed_dimension(op)
}

/// The same of an MPI whose blocking call may confuse them: Intel MPI does so, MPICH from 4.0 on
/// and Open MPI do not, and others are not known.
pub(crate) fn may_be_confused(op: Checked<'_>) -> bool {
    let is_known = [&b"Open MPI"[..], b"MPICH Version:\t4", b"MPICH Version:\t5"];
    !is_known.iter().any(|words| is_of(words)) && has_closed_dimension(op)
}

fn has_closed_dimension(op: Checked<'_>) -> bool {
    let closes = |&(size, periodic): &(c_int, bool)| periodic && size <= 2;
    cartesian(op).iter().any(closes)
}

/// The dimensions of a Cartesian topology in which a rank is both of its own neighbours.
pub(crate) fn own_neighbors(op: Checked<'_>) -> impl Iterator<Item = usize> {
    let all = cartesian(op).into_iter().enumerate();
    all.filter(|&(_, (size, periodic))| periodic && size == 1)
        .map(|(dimension, _)| dimension)
}

/// Ranks in each dimension of a Cartesian topology, and whether it is periodic; nothing of others.
fn cartesian(op: Checked<'_>) -> Vec<(c_int, bool)> {
    let comm = comm_from_bits(op.comm);
    let (mut kind, mut count) = (0, 0);
    // SAFETY: the communicator of a checked operation is live; lists as long as it has dimensions.
    unsafe {
        if ffi::MPI_Topo_test(comm, &mut kind) != SUCCESS || kind != ffi::RSMPI_CART {
            return Vec::new();
        }
        if ffi::MPI_Cartdim_get(comm, &mut count) != SUCCESS {
            return Vec::new();
        }
        let [mut sizes, mut periods, mut own] = [(); 3].map(|()| vec![0; count as usize]);
        let (to, and, too) = (sizes.as_mut_ptr(), periods.as_mut_ptr(), own.as_mut_ptr());
        if ffi::MPI_Cart_get(comm, count, to, and, too) != SUCCESS {
            return Vec::new();
        }
        let periods = periods.into_iter().map(|period| period != 0);
        sizes.into_iter().zip(periods).collect()
    }
}

/// Whether the version of this MPI begins with these words.
fn is_of(words: &[u8]) -> bool {
    static VERSION: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut text = [0 as c_char; ffi::MPI_MAX_LIBRARY_VERSION_STRING as usize + 1];
        let mut length = 0;
        // SAFETY: the buffer is as long as MPI asks for, and MPI ends the text with a NUL.
        unsafe {
            ffi::MPI_Get_library_version(text.as_mut_ptr(), &mut length);
            CStr::from_ptr(text.as_ptr()).to_bytes().to_vec()
        }
    });
    VERSION.starts_with(words)
}
