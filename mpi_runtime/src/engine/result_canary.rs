//! Whether MPI wrote a whole result. A collective whose ranks pass different sizes is an error of
//! the program, but MPI need not say so where a rank gets less than it has room for (MPI 4.0,
//! section 6.1): what is left would be whatever the memory held before. A canary at the end tells,
//! if at least as many bytes are missing as it has; fewer could be told from data only by chance.

#![forbid(unsafe_code)]

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use mpi_shim_abi::Kind;

use crate::buffer::Buffer;
use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::operation::Operation;

/// What no data will be by chance.
static CANARY: LazyLock<[u8; CANARY_BYTES]> = LazyLock::new(|| {
    let word = |seed: u8| u128::from(RandomState::new().hash_one(seed));
    (word(0) << 64 | word(1)).to_ne_bytes()
});

const CANARY_BYTES: usize = size_of::<u128>();

/// The canaries at the ends of what each rank sends to this one.
pub struct ResultCanary<'a> {
    result: Buffer<'a>,
    blocks: usize,
    block: usize,
}

/// Places a canary in the result of `op`, if it is one that may stay unwritten. Results too short
/// for that are filled with zeros.
pub fn place<'a>(op: &Operation<'a>, comm: &Communicator) -> Option<ResultCanary<'a>> {
    let is_root = comm.rank == op.root;
    let blocks = match op.kind {
        Kind::Allgather | Kind::Alltoall => comm.size as usize,
        Kind::Gather if is_root => comm.size as usize,
        Kind::Scatter => 1,
        Kind::Bcast if !is_root => 1,
        _ => return None,
    };
    let bytes = op.recv.bytes();
    if bytes == 0 || op.recv.data().is_null() || std::ptr::eq(op.recv.data(), op.send.data()) {
        return None;
    }
    let canary = ResultCanary {
        result: op.recv,
        blocks,
        block: bytes / blocks,
    };
    if canary.block < CANARY_BYTES {
        op.recv.clear_from(0);
        return None;
    }
    for block in 0..blocks {
        op.recv.write(canary.place_of(block), &*CANARY);
    }
    Some(canary)
}

impl ResultCanary<'_> {
    /// Where the canary of a block is: its last bytes.
    fn place_of(&self, block: usize) -> usize {
        (block + 1) * self.block - CANARY_BYTES
    }

    /// The first block that nobody wrote to its end, if there is one.
    pub fn unwritten(&self) -> Option<usize> {
        (0..self.blocks).find(|&block| self.result.read(self.place_of(block)) == *CANARY)
    }

    /// What is wrong, if something is.
    pub fn check(&self, op: &Operation<'_>) -> Result<(), Failure> {
        let Some(block) = self.unwritten() else {
            return Ok(());
        };
        let sender = match op.kind {
            Kind::Bcast | Kind::Scatter => op.root as usize,
            _ => block,
        };
        Err(format!(
            "rank {sender} sent less than the {} bytes that this rank has room for; all ranks must \
             pass the same shape and dtype",
            self.block
        )
        .into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::ElementType;

    const COMM: Communicator = Communicator {
        name: "test",
        handle: 0,
        user_handle: 0,
        rank: 1,
        size: 3,
        members: &[],
        largest_tag: 0,
        freed: false,
    };

    fn operation<'a>(kind: Kind, result: &'a mut [u8], shape: &'a [i64]) -> Operation<'a> {
        let result = Buffer::over(result, ElementType::U8, shape);
        Operation::new(kind, 0, Buffer::NONE, result)
    }

    #[test]
    fn a_block_that_is_not_written_to_its_end_is_found() {
        let mut memory = [0; 90];
        let op = operation(Kind::Allgather, &mut memory, &[3, 30]);
        let canary = place(&op, &COMM).unwrap();
        assert_eq!(canary.unwritten(), Some(0));
        op.recv.write(0, &[1; 90]);
        assert!(canary.unwritten().is_none() && canary.check(&op).is_ok());
        let canary = place(&op, &COMM).unwrap();
        op.recv.write(0, &[1; 30]);
        op.recv.write(30, &[2; 14]);
        op.recv.write(60, &[3; 30]);
        assert_eq!(canary.unwritten(), Some(1));
        let text = canary.check(&op).unwrap_err().to_string();
        assert!(
            text.contains("rank 1 sent less than the 30 bytes"),
            "{text}"
        );
    }

    #[test]
    fn short_results_are_zeros_and_the_root_is_left_alone() {
        let mut memory = [7; 8];
        assert!(place(&operation(Kind::Scatter, &mut memory, &[8]), &COMM).is_none());
        assert_eq!(memory, [0; 8]);
        let root = Communicator { rank: 0, ..COMM };
        let mut memory = [7; 40];
        assert!(place(&operation(Kind::Bcast, &mut memory, &[40]), &root).is_none());
        assert!(place(&operation(Kind::Allreduce, &mut memory, &[40]), &COMM).is_none());
        assert_eq!(memory, [7; 40]);
    }
}
