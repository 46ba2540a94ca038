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
    blocks: Blocks<'a>,
}

/// The blocks of a result.
#[derive(Clone, Copy)]
enum Blocks<'a> {
    /// So many, of so many bytes each.
    Equal(usize, usize),
    /// Of so many rows each, with so many bytes.
    Rows(&'a [i64], usize),
}

impl Blocks<'_> {
    fn len(&self) -> usize {
        match self {
            Blocks::Equal(blocks, _) => *blocks,
            Blocks::Rows(rows, _) => rows.len(),
        }
    }

    /// Bytes of a block.
    fn bytes(&self, block: usize) -> usize {
        match self {
            Blocks::Equal(_, bytes) => *bytes,
            Blocks::Rows(rows, bytes) => rows[block] as usize * bytes,
        }
    }

    /// Where each block ends that has room for a canary, with its number.
    fn ends(&self) -> impl Iterator<Item = (usize, usize)> {
        let mut end = 0;
        (0..self.len()).filter_map(move |block| {
            let bytes = self.bytes(block);
            end += bytes;
            (bytes >= CANARY_BYTES).then_some((block, end))
        })
    }
}

/// Places a canary in the result of `op`, if it is one that may stay unwritten. Results too short
/// for that are filled with zeros.
pub fn place<'a>(op: &Operation<'a>, comm: &Communicator) -> Option<ResultCanary<'a>> {
    let is_root = comm.rank == op.root;
    let bytes = op.recv.bytes();
    let equal = |blocks: i32| Blocks::Equal(blocks as usize, bytes / blocks as usize);
    let of_rows = |rows: &'a [i64]| {
        let all = rows.iter().sum::<i64>().max(1) as usize;
        Blocks::Rows(rows, bytes / all)
    };
    let blocks = match op.kind {
        Kind::Allgather | Kind::Alltoall => equal(comm.size),
        Kind::Gather if is_root => equal(comm.size),
        Kind::Scatter | Kind::Scatterv => equal(1),
        Kind::Bcast if !is_root => equal(1),
        Kind::Allgatherv => of_rows(op.counts),
        Kind::Gatherv if is_root => of_rows(op.counts),
        Kind::Alltoallv => of_rows(op.recv_counts),
        _ => return None,
    };
    if bytes == 0 || op.recv.data().is_null() || std::ptr::eq(op.recv.data(), op.send.data()) {
        return None;
    }
    let is_short = |block| (1..CANARY_BYTES).contains(&blocks.bytes(block));
    if (0..blocks.len()).any(is_short) {
        op.recv.clear_from(0);
    }
    let mut any = false;
    for (_, end) in blocks.ends() {
        op.recv.write(end - CANARY_BYTES, &*CANARY);
        any = true;
    }
    let result = op.recv;
    any.then_some(ResultCanary { result, blocks })
}

impl ResultCanary<'_> {
    /// The first block that nobody wrote to its end, if there is one.
    pub fn unwritten(&self) -> Option<usize> {
        let is_there = |&(_, end): &(usize, usize)| {
            // The canary is a block's last bytes.
            self.result.read(end - CANARY_BYTES) == *CANARY
        };
        self.blocks.ends().find(is_there).map(|(block, _)| block)
    }

    /// What is wrong, if something is.
    pub fn check(&self, op: &Operation<'_>) -> Result<(), Failure> {
        let Some(block) = self.unwritten() else {
            return Ok(());
        };
        let sender = match op.kind {
            Kind::Bcast | Kind::Scatter | Kind::Scatterv => op.root as usize,
            _ => block,
        };
        Err(format!(
            "rank {sender} sent less than the {} bytes that this rank has room for; all ranks must \
             pass the same shape and dtype",
            self.blocks.bytes(block)
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

    #[test]
    fn blocks_of_different_lengths_have_canaries_of_their_own() {
        let mut memory = [7; 70];
        let rows = [20, 10, 40];
        let op = Operation {
            counts: &rows,
            ..operation(Kind::Allgatherv, &mut memory, &[70])
        };
        let canary = place(&op, &COMM).unwrap();
        op.recv.write(0, &[1; 20]);
        assert_eq!(canary.unwritten(), Some(2));
        let text = canary.check(&op).unwrap_err().to_string();
        assert!(
            text.contains("rank 2 sent less than the 40 bytes"),
            "{text}"
        );
        op.recv.write(30, &[1; 40]);
        assert!(canary.unwritten().is_none());
        // The one that is too short for a canary is zeros.
        assert_eq!(op.recv.read::<10>(20), [0; 10]);
    }

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
