//! Names that stand in programs: of targets of custom calls, and of attributes. They stand in every
//! format of a program as they are.

#![forbid(unsafe_code)]

use mpi_runtime::Kind;

use crate::search::contains;

/// What all our targets' names begin with.
pub const PREFIX: &str = "mpi_cuda_";

/// What the names of all targets for host callbacks contain.
pub const CALLBACK_MARK: &str = "_python_cpu_callback";

/// What the name of an attribute begins with that says: the operations of this program are the same
/// on every rank (`include/mpi_cuda.h`, mpi_cuda_uniform).
pub const UNIFORM_MARK: &str = "mpi_cuda_uniform_";
/// The same of a program that takes so long that its caller had rather not wait for it.
pub const LONG_MARK: &str = "mpi_cuda_long_uniform_";
/// A name of it that is still accepted.
pub const OLD_UNIFORM_MARK: &str = "mpi_cuda_alike_";

/// The attribute that says: the caller of this program reads a status when its launch returns.
pub const READS_STATUS: &str = "mpi_cuda_reads_status";

/// Whether an attribute is named as [`UNIFORM_MARK`] demands: then follow the communicator, `_`,
/// the hash of the sequence and, if there are exchanges, `_` and their balance.
#[inline]
pub fn is_uniform_mark(name: &[u8]) -> bool {
    let rest = name
        .strip_prefix(UNIFORM_MARK.as_bytes())
        .or_else(|| name.strip_prefix(LONG_MARK.as_bytes()))
        .or_else(|| name.strip_prefix(OLD_UNIFORM_MARK.as_bytes()));
    // Without a branch for each digit: this is asked for every operation.
    let is_hash = |text: &[u8]| match <&[u8; 17]>::try_from(text) {
        Ok([b'_', digits @ ..]) => digits
            .iter()
            .fold(true, |all, digit| all & digit.is_ascii_hexdigit()),
        _ => false,
    };
    match rest {
        Some([b'0' | b'1', hashes @ ..]) => match hashes.len() {
            17 => is_hash(hashes),
            34 => is_hash(&hashes[..17]) && is_hash(&hashes[17..]),
            _ => false,
        },
        _ => false,
    }
}

/// The operations that mpi4jax has targets for.
pub const MPI4JAX: [Kind; 12] = [
    Kind::Allgather,
    Kind::Allreduce,
    Kind::Alltoall,
    Kind::Barrier,
    Kind::Bcast,
    Kind::Gather,
    Kind::Recv,
    Kind::Reduce,
    Kind::Scan,
    Kind::Scatter,
    Kind::Send,
    Kind::Sendrecv,
];

/// mpi4jax's target for an operation.
pub fn mpi4jax_target(kind: Kind) -> String {
    format!("mpi_{}_ffi", kind.name())
}

/// Whether a program, in any format, calls operations of ours or of mpi4jax.
pub fn has_operations(program: &[u8]) -> bool {
    contains(program, PREFIX.as_bytes()) || contains(program, b"_ffi") && calls(program, &MPI4JAX)
}

/// Whether a program, in any format, may receive messages with operations of mpi4jax's.
pub fn receives(program: &[u8]) -> bool {
    calls(program, &[Kind::Recv, Kind::Sendrecv])
}

/// Whether a program calls any of these operations of mpi4jax's.
fn calls(program: &[u8], kinds: &[Kind]) -> bool {
    kinds
        .iter()
        .any(|kind| contains(program, mpi4jax_target(*kind).as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_uniform_programs_are_whole() {
        for right in [
            "mpi_cuda_uniform_0_0123456789abcdef",
            "mpi_cuda_uniform_1_0123456789abcdef_fedcba9876543210",
            "mpi_cuda_alike_1_0123456789ABCDEF",
            "mpi_cuda_long_uniform_1_0123456789abcdef",
        ] {
            assert!(is_uniform_mark(right.as_bytes()), "{right}");
            let cut = &right.as_bytes()[..right.len() - 1];
            assert!(!is_uniform_mark(cut));
        }
        for wrong in [
            "mpi_cuda_uniform_",
            "mpi_cuda_uniform_2_0123456789abcdef",
            "mpi_cuda_uniform_0_0123456789abcdeg",
            "mpi_cuda_uniform_00123456789abcdef0",
            "mpi_cuda_uniform_0_+123456789abcdef",
            "mpi_cuda_uniform_0_0123456789abcdef_0",
        ] {
            assert!(!is_uniform_mark(wrong.as_bytes()), "{wrong}");
        }
    }

    #[test]
    fn operations_are_found_by_their_targets() {
        assert!(has_operations(b"custom_call @mpi_cuda_allreduce("));
        assert!(has_operations(b"custom_call @mpi_allreduce_ffi("));
        assert!(!has_operations(b"custom_call @lapack_sgesdd_ffi("));
        assert!(receives(b"@mpi_sendrecv_ffi") && !receives(b"@mpi_send_ffi"));
    }
}
