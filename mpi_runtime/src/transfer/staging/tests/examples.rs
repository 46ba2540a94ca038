//! Operations with operands that differ everywhere, and their results.

use mpi_shim_abi::{Kind, Reduction};

use super::rank::RESULT;
use crate::buffer::{Buffer, ElementType};
use crate::device::simulated::Simulated;
use crate::operation::Operation;

const DTYPE: ElementType = ElementType::U8;

pub(super) fn operation<'a>(kind: Kind, sent: &'a [i64], received: &'a [i64]) -> Operation<'a> {
    let buffer = |place: usize, shape| {
        // SAFETY: an address of the simulated device, which nothing here takes for the host's.
        unsafe { Buffer::new(Simulated::address(place) as *mut _, DTYPE, shape) }
    };
    Operation {
        reduction: Some(Reduction::Sum),
        source: 0,
        ..Operation::new(kind, 0, buffer(0, sent), buffer(RESULT, received))
    }
}

/// Different on every rank and in every place.
pub(super) fn numbers(rank: i32, length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| (i * 7 + i / 251 + 31 * rank as usize) as u8)
        .collect()
}

/// The operand of `rank`, and the result that it should have, of blocks of `n` on `size` ranks.
pub(super) fn example(
    kind: Kind,
    rank: i32,
    size: usize,
    n: usize,
    root: i32,
) -> (Vec<u8>, Vec<u8>) {
    let rows = match kind {
        Kind::Alltoall | Kind::ReduceScatter => size,
        Kind::Scatter if rank == root => size,
        _ => 1,
    };
    let all = |rows: usize| -> Vec<Vec<u8>> {
        (0..size as i32)
            .map(|rank| numbers(rank, rows * n))
            .collect()
    };
    let sum = |of: &[Vec<u8>], length: usize| -> Vec<u8> {
        (0..length)
            .map(|i| of.iter().fold(0u8, |sum, x| sum.wrapping_add(x[i])))
            .collect()
    };
    let own = rank as usize;
    let operand = numbers(rank, rows * n);
    let result = match kind {
        Kind::Allreduce => sum(&all(1), n),
        Kind::Reduce if rank == root => sum(&all(1), n),
        Kind::Allgather => all(1).concat(),
        Kind::Gather if rank == root => all(1).concat(),
        Kind::Reduce | Kind::Gather => operand.clone(),
        Kind::Alltoall => all(size)
            .iter()
            .flat_map(|x| x[own * n..][..n].to_vec())
            .collect(),
        Kind::Bcast => numbers(root, n),
        Kind::Scatter => numbers(root, size * n)[own * n..][..n].to_vec(),
        Kind::Scan => sum(&all(1)[..=own], n),
        Kind::Exscan => sum(&all(1)[..own], n),
        Kind::ReduceScatter => sum(&all(size), size * n)[own * n..][..n].to_vec(),
        other => panic!("{other:?}"),
    };
    (operand, result)
}

pub(super) const COLLECTIVES: [Kind; 10] = [
    Kind::Allgather,
    Kind::Allreduce,
    Kind::Alltoall,
    Kind::Bcast,
    Kind::Exscan,
    Kind::Gather,
    Kind::Reduce,
    Kind::ReduceScatter,
    Kind::Scan,
    Kind::Scatter,
];
