//! Collectives in chunks.

use crate::buffer::Buffer;

use mpi_shim_abi::Kind;

use super::examples::{COLLECTIVES, example, numbers, operation};
use super::rank::{CHUNK, ranks};
use crate::operation::Operation;
use crate::transfer::staging::plan::Plan;

#[test]
fn collectives_of_all_lengths_around_the_edges_of_chunks() {
    for size in [1, 3] {
        ranks(size, |rank| {
            for n in [0, 1, 20, 21, 22, 63, 64, 65, 128, 300] {
                for (turn, kind) in COLLECTIVES.into_iter().enumerate() {
                    let root = turn as i32 % size;
                    let (operand, want) = example(kind, rank.comm.rank, size as usize, n, root);
                    let shape = |length: usize| match kind {
                        Kind::Alltoall => [i64::from(size), length as i64 / i64::from(size)],
                        _ => [1, length as i64],
                    };
                    let (sent, received) = (shape(operand.len()), shape(want.len()));
                    let op = Operation {
                        root,
                        ..operation(kind, &sent, &received)
                    };
                    let (done, result) = rank.run(&op, operand);
                    done.unwrap();
                    assert_eq!(result, want, "{kind:?} of {n} on {size}");
                }
            }
        });
    }
}

#[test]
fn copies_overlap_with_messages_and_memory_is_used_again() {
    ranks(2, |rank| {
        let shape = [4000];
        let op = operation(Kind::Allreduce, &shape, &shape);
        for _ in 0..3 {
            rank.run(&op, numbers(rank.comm.rank, 4000)).0.unwrap();
        }
        assert!(
            rank.device.most_at_once() > 2,
            "{}",
            rank.device.most_at_once()
        );
        let (free, in_use) = rank.staging.0.pool.pieces();
        assert_eq!(in_use, 0);
        // 63 chunks each time, of which only those in between hold memory.
        assert!(free < 40, "{free}");
    });
}

#[test]
fn a_rank_that_gets_nothing_may_have_no_result() {
    ranks(2, |rank| {
        let shape = [200];
        for kind in [Kind::Reduce, Kind::Gather, Kind::Bcast] {
            let mut op = operation(kind, &shape, &shape);
            op.root = if kind == Kind::Bcast {
                rank.comm.rank
            } else {
                1 - rank.comm.rank
            };
            op.recv = Buffer::described(op.recv.dtype(), op.recv.shape());
            let plan = Plan::new(&op, &rank.comm, CHUNK);
            assert!(plan.returns_input);
        }
        // Rank 0 gets the sum; rank 1 gets back what it sent, if it wants it.
        let mut op = operation(Kind::Reduce, &shape, &shape);
        if rank.comm.rank == 1 {
            op.recv = Buffer::described(op.recv.dtype(), op.recv.shape());
        }
        rank.run(&op, numbers(rank.comm.rank, 200)).0.unwrap();
    });
}
