//! What of ours a program calls.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Once;

use hlo_rewrite::{Devices, Rewritten};
use mpi_runtime::log;
use mpi_runtime::mpi::communicators::COLLECTIVES;
use mpi_runtime::{UniformProgram, World};

use crate::ffi::status;
use crate::ffi::targets::{
    CALLBACK_MARK, LONG_MARK, OLD_UNIFORM_MARK, UNIFORM_MARK, has_operations,
};
use crate::search::{contains, find};

/// Above these a launch takes long enough that a caller would rather not wait for it; the same for
/// operations in `_jax_patches/uniform.py`.
const LONGEST: u64 = 10_000;
const LARGEST: u64 = 16 << 20;

/// What of ours a program calls.
#[derive(Clone, Copy, Default)]
pub struct Contents {
    /// Operations, or collectives of a program for several devices.
    pub operations: bool,
    /// Its caller reads a status.
    pub status: bool,
    /// It calls back into the host.
    pub callbacks: bool,
    /// Its operations are the same collectives and exchanges on every rank.
    pub uniform: Option<UniformProgram>,
    /// Number of the communicator of all of its collectives, and their sequence, if that is known.
    pub collectives: Option<(i64, u64)>,
    /// They take long.
    pub long: bool,
    /// Of a program for several devices: what it is, the same number on every rank.
    pub channel: u64,
}

impl Contents {
    /// What a program calls, in any format.
    pub fn of(program: &[u8]) -> Contents {
        let long = after(program, LONG_MARK);
        let uniform = long.or_else(|| after_mark(program)).and_then(uniform);
        Contents {
            operations: has_operations(program),
            status: status::is_read(program),
            callbacks: contains(program, CALLBACK_MARK.as_bytes()),
            uniform,
            collectives: uniform.map(|uniform| (uniform.comm, uniform.sequence)),
            long: long.is_some(),
            channel: 0,
        }
    }

    /// What a rewritten program for several devices, of so many ranks, calls.
    pub fn of_rewritten(
        rewritten: &Rewritten,
        devices: &Devices,
        ranks: usize,
        world: &World,
        callbacks: bool,
    ) -> Contents {
        let everybody = ranks == world.size as usize;
        let short = rewritten.executed <= LONGEST && rewritten.bytes <= LARGEST;
        let begins = rewritten.collectives > 0 && everybody;
        let uniform = begins && rewritten.other_ordered == 0 && short && !callbacks;
        Contents {
            operations: rewritten.collectives > 0,
            status: false,
            callbacks,
            uniform: uniform.then_some(UniformProgram {
                comm: COLLECTIVES,
                sequence: rewritten.sequence,
                balance: None,
            }),
            collectives: begins.then_some((COLLECTIVES, rewritten.sequence)),
            long: false,
            channel: channel(rewritten, devices),
        }
    }

    /// Adds what the rewritten program calls to what stands in the program that the framework gave.
    pub fn merge(&mut self, rewritten: Contents) {
        self.operations |= rewritten.operations;
        self.callbacks |= rewritten.callbacks;
        self.uniform = rewritten.uniform;
        self.collectives = rewritten.collectives;
        self.long = rewritten.long;
        self.channel = rewritten.channel;
    }
}

/// What a program for several devices is, with the ranks that run it; never 0.
fn channel(rewritten: &Rewritten, devices: &Devices) -> u64 {
    let mut hasher = DefaultHasher::new();
    (rewritten.named_sequence, devices.ids()).hash(&mut hasher);
    hasher.finish().max(1)
}

/// What follows the mark of a uniform program, by its name today or its old one.
fn after_mark(program: &[u8]) -> Option<&[u8]> {
    static WARNED: Once = Once::new();
    after(program, UNIFORM_MARK).or_else(|| {
        let found = after(program, OLD_UNIFORM_MARK)?;
        WARNED.call_once(|| {
            log::line(&format!(
                "the attribute {OLD_UNIFORM_MARK}... is now called {UNIFORM_MARK}...: use \
                 that name"
            ));
        });
        Some(found)
    })
}

/// What follows this name.
fn after<'a>(program: &'a [u8], mark: &str) -> Option<&'a [u8]> {
    Some(&program[find(program, mark.as_bytes())? + mark.len()..])
}

/// Reads what follows [`UNIFORM_MARK`]: the communicator, `_`, the hash of the sequence and, if
/// there are exchanges, `_` and their balance; both of 16 hexadecimal digits.
fn uniform(text: &[u8]) -> Option<UniformProgram> {
    let number = |range| {
        let digits = std::str::from_utf8(text.get(range)?).ok()?;
        u64::from_str_radix(digits, 16).ok()
    };
    (text.get(1) == Some(&b'_')).then_some(())?;
    Some(UniformProgram {
        comm: number(0..1)? as i64,
        sequence: number(2..18)?,
        balance: match text.get(18) {
            Some(b'_') => Some(number(19..35)?),
            _ => None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_mark_is_accepted() {
        let old = b"...mpi_cuda_alike_1_00000000000000ff...";
        let new = b"...mpi_cuda_uniform_1_00000000000000ff...";
        assert!(after_mark(old).and_then(uniform).is_some());
        assert_eq!(
            after_mark(old).and_then(uniform),
            after_mark(new).and_then(uniform)
        );
        assert!(after_mark(b"mpi_cuda_allreduce").is_none());
    }

    #[test]
    fn a_long_program_is_known_as_one() {
        let long =
            Contents::of(b"mpi_cuda_allreduce...mpi_cuda_long_uniform_1_00000000000000ff...");
        let short = Contents::of(b"mpi_cuda_allreduce...mpi_cuda_uniform_1_00000000000000ff...");
        assert!(long.long && !short.long);
        assert!(long.uniform.is_some() && long.uniform == short.uniform);
    }

    #[test]
    fn reads_what_follows_the_mark() {
        let collectives = uniform(b"1_00000000000000ff\0rest").unwrap();
        assert_eq!((collectives.comm, collectives.sequence), (1, 255));
        assert_eq!(collectives.balance, None);
        let exchanges = uniform(b"0_00000000000000ff_fffffffffffffffe").unwrap();
        assert_eq!((exchanges.comm, exchanges.balance), (0, Some(u64::MAX - 1)));
        for wrong in [
            "",
            "1",
            "1_0",
            "1_00000000000000f",
            "1_00000000000000ff_0",
            "x_00000000000000ff",
        ] {
            assert_eq!(uniform(wrong.as_bytes()), None);
        }
    }
}
