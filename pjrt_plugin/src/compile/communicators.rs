//! Which communicators a program uses: launches of different threads are ordered by them.

use std::collections::HashSet;

use mpi_runtime::mpi::communicators::{COLLECTIVES, DEFAULT};
use mpi_runtime::{ANY_COMM, Kind};
use parking_lot::Mutex;

use crate::ffi::targets::{MPI4JAX, PREFIX, mpi4jax_target};
use crate::inner::handles::LoadedHandle;
use crate::launch::executables::ProgramComms;

/// Those of a loaded executable, whose collectives may use those of `channel`.
pub fn of(loaded: LoadedHandle, channel: u64) -> ProgramComms {
    let program = loaded
        .executable()
        .and_then(|executable| executable.get().optimized_program());
    let numbers =
        program.and_then(|program| Ok(hlo_rewrite::attributes(&program, "comm", without)?));
    // Whoever does not know waits for everybody.
    let shared = numbers.unwrap_or_else(|_| vec![ANY_COMM]);
    let own = |&comm: &i64| {
        if comm == COLLECTIVES {
            channel as i64
        } else {
            comm
        }
    };
    let apart = shared.iter().map(own).collect();
    ProgramComms {
        shared: shared_list(shared),
        apart: shared_list(apart),
    }
}

/// The communicator of a custom call without the attribute; none of one that uses none.
fn without(target: &str) -> Option<i64> {
    if target.starts_with(hlo_rewrite::TARGET_PREFIX) {
        return Some(COLLECTIVES);
    }
    let mut kinds = Kind::ALL.iter();
    let ours = kinds.any(|&kind| {
        target.strip_prefix(PREFIX) == Some(kind.name()) && !kind.is_end()
            || MPI4JAX.contains(&kind) && target == mpi4jax_target(kind)
    });
    ours.then_some(DEFAULT)
}

/// The list for as long as the process lives; there are few different ones.
fn shared_list(list: Vec<i64>) -> &'static [i64] {
    static LISTS: Mutex<Option<HashSet<&'static [i64]>>> = Mutex::new(None);
    let mut lists = LISTS.lock();
    let lists = lists.get_or_insert_default();
    if let Some(known) = lists.get(&list[..]) {
        return known;
    }
    let list: &'static [i64] = Vec::leak(list);
    lists.insert(list);
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn custom_calls_without_a_communicator_use_the_default_or_none() {
        assert_eq!(without("mpi_cuda_allreduce"), Some(DEFAULT));
        assert_eq!(without("mpi_allreduce_ffi"), Some(DEFAULT));
        assert_eq!(without("mpi_cuda_wait"), None);
        assert_eq!(without("mpi_cuda_async_barrier"), None);
        assert_eq!(without("lapack_sgesdd_ffi"), None);
        let collective = format!("{}all_reduce", hlo_rewrite::TARGET_PREFIX);
        assert_eq!(without(&collective), Some(COLLECTIVES));
    }

    #[test]
    fn equal_lists_are_one() {
        let (one, other) = (shared_list(vec![1, 2]), shared_list(vec![1, 2]));
        assert!(std::ptr::eq(one, other));
    }
}
