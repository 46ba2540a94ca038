//! Reductions that the user defined (`MPI_Op_create`): programs carry a number that only this
//! process knows, never a handle, so that a program of another run cannot meet another function.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::SystemTime;

use parking_lot::RwLock;

static HANDLES: RwLock<BTreeMap<i64, u64>> = RwLock::new(BTreeMap::new());

/// Numbers have this bit, which those of predefined reductions have not.
const USERS: u64 = 1 << 61;

/// A new number for the reduction with that MPI handle.
pub fn register(handle: u64) -> i64 {
    let mut handles = HANDLES.write();
    let mut hasher = DefaultHasher::new();
    (std::process::id(), SystemTime::now(), handles.len()).hash(&mut hasher);
    let number = (hasher.finish() % USERS + USERS) as i64;
    handles.insert(number, handle);
    number
}

/// The handle behind a number.
pub fn handle(number: i64) -> Option<u64> {
    HANDLES.read().get(&number).copied()
}
