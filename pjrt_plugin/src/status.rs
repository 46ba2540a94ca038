//! `status=` arguments: programs carry a number, never an address, so that a cached program cannot
//! write into memory of another run.

use parking_lot::RwLock;

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

/// Whether any program has named a status.
pub fn are_used() -> bool {
    !ADDRESSES.read().is_empty()
}

/// The address behind a number; 0 for number 0 and for unknown ones.
pub fn address(number: i64) -> usize {
    let index = usize::try_from(number - 1).ok();
    index
        .and_then(|index| ADDRESSES.read().get(index).copied())
        .unwrap_or(0)
}
