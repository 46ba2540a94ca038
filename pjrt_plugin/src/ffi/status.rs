//! `status=` arguments: programs carry a number, never an address, so that a cached program cannot
//! write into memory of another run.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use crate::error::Error;
use crate::ffi::targets::{READS_STATUS, receives};
use crate::search::contains;

static ADDRESSES: RwLock<Vec<usize>> = RwLock::new(Vec::new());

/// The number of the `MPI_Status` at `address`, which must live as long as the process uses it.
pub fn register(address: usize) -> i64 {
    let mut addresses = ADDRESSES.write();
    if let Some(index) = addresses.iter().position(|known| *known == address) {
        return index as i64 + 1;
    }
    addresses.push(address);
    addresses.len() as i64
}

/// The next program that is compiled, of those that receive with mpi4jax's operations, has a
/// status.
static NEXT_READS: AtomicBool = AtomicBool::new(false);

/// Says so.
pub fn next_reads() {
    NEXT_READS.store(true, Ordering::Relaxed);
}

/// Whether the caller of a program, in any format, reads a status when its launch returns. Ours say
/// so by the name of an attribute (`include/mpi_cuda.h`); of mpi4jax's, whoever lowers them has.
pub fn is_read(program: &[u8]) -> bool {
    contains(program, READS_STATUS.as_bytes())
        || receives(program) && NEXT_READS.swap(false, Ordering::Relaxed)
}

/// The address behind a number, 0 for number 0; others are of another run.
#[inline]
pub fn address(number: i64) -> Result<usize, Error> {
    if number == 0 {
        Ok(0)
    } else {
        registered(number)
    }
}

fn registered(number: i64) -> Result<usize, Error> {
    let index = number
        .checked_sub(1)
        .and_then(|index| usize::try_from(index).ok());
    let found = index.and_then(|index| ADDRESSES.read().get(index).copied());
    found.ok_or_else(|| {
        Error::invalid(format!(
            "status={number} is no status in this process; a program with one cannot be loaded in \
             another run"
        ))
    })
}
