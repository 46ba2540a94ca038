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
/// A name of it that is still accepted.
pub const OLD_UNIFORM_MARK: &str = "mpi_cuda_alike_";

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
    fn operations_are_found_by_their_targets() {
        assert!(has_operations(b"custom_call @mpi_cuda_allreduce("));
        assert!(has_operations(b"custom_call @mpi_allreduce_ffi("));
        assert!(!has_operations(b"custom_call @lapack_sgesdd_ffi("));
        assert!(receives(b"@mpi_sendrecv_ffi") && !receives(b"@mpi_send_ffi"));
    }
}
