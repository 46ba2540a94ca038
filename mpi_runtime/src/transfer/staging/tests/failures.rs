//! What fails on one rank leaves the others and the next operation alone.

use mpi_shim_abi::Kind;

use super::examples::{numbers, operation};
use super::rank::{ranks, ranks_sharing};
use crate::operation::Operation;

#[test]
fn a_failure_in_the_middle_leaves_nothing_behind() {
    for fails_at in [1, 2, 5] {
        let texts = ranks(1, |rank| {
            rank.fails_at = fails_at;
            let shape = [500];
            let op = operation(Kind::Allreduce, &shape, &shape);
            let failed = rank.run(&op, numbers(0, 500)).0.err();
            // The next one is well.
            let (done, result) = rank.run(&op, numbers(0, 500));
            assert_eq!((done.is_ok(), result), (true, numbers(0, 500)));
            assert_eq!(rank.staging.0.pool.pieces().1, 0);
            failed
        });
        assert_eq!(texts, [Some("it was told to fail".into())]);
    }
}

#[test]
fn a_device_that_fails_says_so() {
    for copies in [0, 1, 4, 9] {
        ranks(1, |rank| {
            rank.device.fail_after(copies);
            let shape = [500];
            for kind in [Kind::Allreduce, Kind::Sendrecv, Kind::Bcast] {
                let op = operation(kind, &shape, &shape);
                let failed = rank.run(&op, numbers(0, 500)).0.err();
                let text = failed.map_or(String::new(), |failure| failure.to_string());
                let ran_out = text.contains("a copy failed on the simulated device");
                assert!(ran_out || text.is_empty(), "{text}");
            }
            let op = operation(Kind::Allreduce, &shape, &shape);
            assert!(rank.run(&op, numbers(0, 500)).0.is_err());
        });
    }
}

#[test]
fn a_receiver_that_fails_does_not_hold_the_sender() {
    for copies in [0, 1, 9] {
        let ends = ranks_sharing(
            2,
            |_| true,
            |rank| {
                let shape = [4000];
                if rank.comm.rank == 1 {
                    rank.device.fail_after(copies);
                    let op = operation(Kind::Recv, &[0], &shape);
                    return rank.run(&op, Vec::new()).0.err();
                }
                let op = Operation {
                    dest: 1,
                    ..operation(Kind::Send, &shape, &[0])
                };
                rank.run(&op, numbers(0, 4000)).0.err()
            },
        );
        assert_eq!(ends[0], None);
        let text = ends[1].clone().unwrap().to_string();
        assert!(
            text.contains("a copy failed on the simulated device"),
            "{text}"
        );
    }
}
