//! Programs that are the same on all ranks, and the messages that this rank has exchanged so far,
//! by which the ranks know each other's launches.

#![forbid(unsafe_code)]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};

use mpi_shim_abi::{PROC_NULL, ShimReceived};

use crate::mpi::communicators::{DEFAULT, WORLD};
use crate::operation::Operation;

/// A program that is the same fixed sequence of collectives and exchanges of all ranks, wherever it
/// runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniformProgram {
    /// The communicator of all of them: [`WORLD`], [`DEFAULT`] or
    /// [`crate::mpi::communicators::COLLECTIVES`].
    pub comm: i64,
    /// The sequence, hashed.
    pub sequence: u64,
    /// If it has exchanges: the messages that this rank sends, less those that it receives, each
    /// hashed. Over all ranks they add up to 0 if every message sent is received.
    pub balance: Option<u64>,
}

impl UniformProgram {
    /// Names the launch of this program that comes after `position` steps; the same number in every
    /// process. Never 0.
    pub(super) fn mark(self, position: u64) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.comm, self.sequence, position).hash(&mut hasher);
        hasher.finish().max(1)
    }
}

/// The messages that this rank has exchanged on the communicators of all ranks: those sent less
/// those received, as in [`UniformProgram::balance`].
#[derive(Default)]
pub(super) struct Balances {
    world: AtomicU64,
    default: AtomicU64,
}

impl Balances {
    /// Adds an operation on the communicator numbered `op.comm`, where `rank` is this process's
    /// rank.
    #[inline]
    pub(super) fn add(&self, op: &Operation<'_>, rank: i32, received: &ShimReceived) {
        let balance = match op.comm {
            WORLD => &self.world,
            DEFAULT => &self.default,
            _ => return,
        };
        if op.kind.sends() && op.dest != PROC_NULL {
            balance.fetch_add(message(rank, op.dest), Ordering::Relaxed);
        }
        if op.kind.is_receive() && received.source >= 0 {
            balance.fetch_sub(message(received.source, rank), Ordering::Relaxed);
        }
    }

    /// What is left once `program` has run.
    pub(super) fn after(&self, program: UniformProgram) -> u64 {
        let so_far = match program.comm {
            WORLD => self.world.load(Ordering::Relaxed),
            DEFAULT => self.default.load(Ordering::Relaxed),
            _ => 0,
        };
        program.balance.map_or(0, |own| own.wrapping_add(so_far))
    }
}

/// A message between two ranks, hashed: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn message(source: i32, dest: i32) -> u64 {
    // SplitMix64's increment, since its finalizer maps 0 to 0.
    let mut bits = ((source as u64) << 32 | dest as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn marks_differ_by_program_communicator_and_position() {
        let mut seen = HashSet::new();
        for sequence in [1, 2, u64::MAX] {
            for comm in [WORLD, DEFAULT] {
                let balance = None;
                for position in 0..1000 {
                    let program = UniformProgram {
                        comm,
                        sequence,
                        balance,
                    };
                    seen.insert(program.mark(position));
                }
            }
        }
        assert_eq!(seen.len(), 6000);
        assert!(!seen.contains(&0));
    }

    #[test]
    fn messages_are_told_apart() {
        let ranks = 0..40;
        let all: HashSet<u64> = ranks
            .clone()
            .flat_map(|source| ranks.clone().map(move |dest| message(source, dest)))
            .collect();
        assert!(all.len() == 1600 && !all.contains(&0));
        let swapped = message(0, 1).wrapping_add(message(1, 0));
        assert_ne!(swapped, message(0, 0).wrapping_add(message(1, 1)));
    }
}
