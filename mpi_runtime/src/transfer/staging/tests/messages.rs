//! Messages, whole and in chunks, through MPI and through memory that ranks share.

use mpi_shim_abi::{ANY, Kind, PROC_NULL};

use super::examples::{numbers, operation};
use super::rank::{ranks, ranks_sharing};
use crate::operation::Operation;

#[test]
fn messages_of_all_lengths_around_the_edges_of_chunks() {
    let some: [fn(i32) -> bool; 3] = [|_| false, |_| true, |rank| rank == 1];
    some.into_iter().for_each(messages_of_all_lengths);
}

fn messages_of_all_lengths(shares: impl Fn(i32) -> bool) {
    ranks_sharing(3, shares, |rank| {
        let own = rank.comm.rank;
        for n in [0usize, 1, 12, 13, 14, 63, 64, 65, 128, 129, 1000] {
            // Each sends another length, to the right, from the left or from anybody.
            let length = |rank: i32| n + 70 * rank as usize;
            let left = (own + 2) % 3;
            let (sent, received) = ([length(own) as i64], [length(left) as i64]);
            for source in [left, ANY] {
                let op = Operation {
                    dest: (own + 1) % 3,
                    source,
                    ..operation(Kind::Sendrecv, &sent, &received)
                };
                let (done, result) = rank.run(&op, numbers(own, length(own)));
                let done = done.unwrap();
                assert_eq!((done.source, done.bytes), (left, length(left)));
                assert_eq!(result, numbers(left, length(left)), "{n} from {source}");
            }
            let op = match own {
                0 => operation(Kind::Recv, &[0], &received),
                2 => operation(Kind::Send, &sent, &[0]),
                _ => continue,
            };
            let (done, result) =
                rank.run(&Operation { source: 2, ..op }, numbers(own, length(own)));
            done.unwrap();
            if own == 0 {
                assert_eq!(result, numbers(2, length(2)));
            }
        }
    });
}

#[test]
fn nobody_sends_zeros_and_what_nobody_gets_is_gone() {
    ranks(1, |rank| {
        let shape = [200];
        let op = Operation {
            dest: PROC_NULL,
            source: PROC_NULL,
            ..operation(Kind::Sendrecv, &shape, &shape)
        };
        let (done, result) = rank.run(&op, numbers(0, 200));
        assert_eq!((done.unwrap().bytes, result), (0, vec![0; 200]));
        assert_eq!(rank.performed, 0);
    });
}

#[test]
fn what_a_rank_receives_may_depend_on_what_it_sends() {
    for shares in [false, true] {
        ranks_sharing(
            3,
            |_| shares,
            |rank| {
                let (own, shape) = (rank.comm.rank, [1000]);
                let (dest, source) = ((own + 1) % 3, (own + 2) % 3);
                let message = |kind| Operation {
                    dest,
                    source,
                    ..operation(kind, &shape, &shape)
                };
                // Once around: rank 0 has nothing to receive until its message has passed the
                // others.
                if own == 0 {
                    let (done, result) = rank.run(&message(Kind::Sendrecv), numbers(7, 1000));
                    assert_eq!((done.unwrap().bytes, result), (1000, numbers(7, 1000)));
                    return;
                }
                let (done, passed) = rank.run(&message(Kind::Recv), Vec::new());
                done.unwrap();
                rank.run(&message(Kind::Send), passed).0.unwrap();
            },
        );
    }
}

#[test]
fn between_ranks_that_share_memory_mpi_has_the_header_alone() {
    ranks_sharing(
        2,
        |_| true,
        |rank| {
            let (shape, other) = ([4000], 1 - rank.comm.rank);
            let op = Operation {
                dest: other,
                source: other,
                ..operation(Kind::Sendrecv, &shape, &shape)
            };
            for _ in 0..3 {
                let (done, result) = rank.run(&op, numbers(rank.comm.rank, 4000));
                assert_eq!((done.unwrap().bytes, result), (4000, numbers(other, 4000)));
            }
            assert_eq!(rank.performed, 3);
            // Both directions, and several slots of each.
            assert!(rank.device.most_at_once() > 4);
            // The rendezvous header, and the room for the other one.
            assert_eq!(rank.staging.0.pool.pieces(), (2, 0));
        },
    );
}

#[test]
fn other_lengths_are_errors_that_name_both() {
    [false, true].into_iter().for_each(other_lengths);
}

fn other_lengths(shares: bool) {
    for (sent, received) in [
        (300, 200),
        (200, 300),
        (300, 60),
        (60, 300),
        (300, 5),
        (5, 300),
    ] {
        let texts = ranks_sharing(
            2,
            |_| shares,
            |rank| {
                let (sent, received) = ([sent], [received]);
                let op = match rank.comm.rank {
                    0 => operation(Kind::Recv, &[0], &received),
                    _ => operation(Kind::Send, &sent, &[0]),
                };
                rank.run(&Operation { source: 1, ..op }, numbers(1, 300))
                    .0
                    .err()
            },
        );
        let text = texts[0].clone().unwrap().to_string();
        assert!(text.contains(&received.to_string()), "{text}");
        assert!(text.contains(&sent.to_string()), "{text}");
        assert_eq!(texts[1], None);
    }
}

#[test]
fn a_message_that_does_not_fit_is_taken_out_of_the_way() {
    [false, true].into_iter().for_each(too_long_a_message);
}

fn too_long_a_message(shares: bool) {
    ranks_sharing(
        2,
        |_| shares,
        |rank| {
            let (long, short) = ([1000], [20]);
            let other = 1 - rank.comm.rank;
            let exchange = |received| Operation {
                dest: other,
                source: other,
                ..operation(Kind::Sendrecv, &long, received)
            };
            // Rank 0 has no room, and sends all the same; the next exchange is not disturbed.
            let received: &[i64] = if other == 1 { &short } else { &long };
            let (done, result) = rank.run(&exchange(received), numbers(rank.comm.rank, 1000));
            if other == 1 {
                assert!(
                    done.unwrap_err()
                        .to_string()
                        .contains("has 1000 bytes, and the result 20")
                );
            } else {
                assert_eq!((done.unwrap().bytes, result), (1000, numbers(0, 1000)));
            }
            let (done, result) = rank.run(&exchange(&long), numbers(rank.comm.rank, 1000));
            assert_eq!((done.unwrap().bytes, result), (1000, numbers(other, 1000)));
        },
    );
}
