//! Programs that are the same on all ranks, and what this rank has executed so far, by which the
//! ranks know each other's launches.

#![forbid(unsafe_code)]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};

use mpi_shim_abi::{PROC_NULL, ShimReceived};

use crate::mpi::communicators::{COLLECTIVES, DEFAULT, WORLD};
use crate::operation::Operation;

/// A program that is the same fixed sequence of collectives and exchanges of all ranks, wherever it
/// runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniformProgram {
    /// The communicator of all of them: [`WORLD`], [`DEFAULT`] or [`COLLECTIVES`].
    pub comm: i64,
    /// The sequence, hashed.
    pub sequence: u64,
    /// If it has exchanges: the messages that this rank sends, less those that it receives, each
    /// hashed. Over all ranks they add up to 0 if every message sent is received.
    pub balance: Option<u64>,
}

impl UniformProgram {
    /// Names the launch of this program that comes after `position` collectives; the same number in
    /// every process. Never 0.
    pub(super) fn mark(self, position: u64) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.comm, self.sequence, position).hash(&mut hasher);
        hasher.finish().max(1)
    }
}

/// What this rank has executed on the communicators of all ranks.
#[derive(Default)]
pub(super) struct Histories {
    world: History,
    default: History,
    /// Launches of programs for several devices.
    collectives: History,
}

impl Histories {
    /// Adds an operation on the communicator numbered `op.comm`, where `rank` is this process's
    /// rank.
    #[inline]
    pub(super) fn add(&self, op: &Operation<'_>, rank: i32, received: &ShimReceived) {
        match op.comm {
            WORLD => self.world.add(op, rank, received),
            DEFAULT => self.default.add(op, rank, received),
            _ => {}
        }
    }

    /// An operation has failed. Ranks that differ in a collective have all used it up.
    pub(super) fn add_failed(&self, op: &Operation<'_>) {
        if op.kind.is_collective() {
            self.add(op, 0, &ShimReceived::default());
        }
    }

    /// A launch with collectives that all ranks run has begun.
    pub(super) fn count_collective_launch(&self) {
        self.collectives.position.fetch_add(1, Ordering::Relaxed);
    }

    /// That of the communicator of a program.
    pub(super) fn of(&self, program: UniformProgram) -> Option<&History> {
        match program.comm {
            WORLD => Some(&self.world),
            DEFAULT => Some(&self.default),
            COLLECTIVES => Some(&self.collectives),
            _ => None,
        }
    }
}

/// What this rank has executed on one communicator of all ranks.
#[derive(Default)]
pub(super) struct History {
    /// Number of collectives. Messages do not count: ranks may exchange different numbers of them,
    /// and the balance tells whether they are done with.
    position: AtomicU64,
    /// Messages sent less messages received, as in [`UniformProgram::balance`].
    balance: AtomicU64,
}

impl History {
    /// The mark and the balance by which ranks that arrive at `program` now know each other.
    pub(super) fn arrival(&self, program: UniformProgram) -> (u64, u64) {
        let balance = program.balance.map_or(0, |balance| {
            balance.wrapping_add(self.balance.load(Ordering::Relaxed))
        });
        (program.mark(self.position.load(Ordering::Relaxed)), balance)
    }

    #[inline]
    fn add(&self, op: &Operation<'_>, rank: i32, received: &ShimReceived) {
        if op.kind.is_collective() {
            self.position.fetch_add(1, Ordering::Relaxed);
        }
        if op.kind.sends() && op.dest != PROC_NULL {
            self.balance
                .fetch_add(message(rank, op.dest), Ordering::Relaxed);
        }
        if op.kind.is_receive() && received.source >= 0 {
            self.balance
                .fetch_sub(message(received.source, rank), Ordering::Relaxed);
        }
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
