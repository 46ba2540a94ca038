//! The same operations by an MPI that knows the device.

use std::sync::Arc;

use mpi_shim_abi::{Kind, PROC_NULL, Reduction};

use super::examples::{COLLECTIVES, example, numbers, operation};
use super::rank::{Rank, ranks};
use crate::buffer::{Buffer, ElementType};
use crate::operation::Operation;
use crate::transfer::choice::Through;
use crate::transfer::direct::Direct;

impl Rank {
    /// From now on MPI gets the device's memory.
    fn go_direct(&mut self, through: Through) {
        self.direct = Some(Arc::new(Direct::new(self.device.clone(), through)));
    }
}

#[test]
fn direct_collectives_come_after_the_kernels_before_and_before_those_after() {
    for (through, size) in [
        (Through::Arrays, 1),
        (Through::Arrays, 3),
        (Through::Copies, 3),
    ] {
        ranks(size, |rank| {
            rank.go_direct(through);
            for n in [0, 1, 65, 300] {
                for (turn, kind) in COLLECTIVES.into_iter().enumerate() {
                    let root = turn as i32 % size;
                    let (operand, want) = example(kind, rank.comm.rank, size as usize, n, root);
                    let (sent, received) = ([operand.len() as i64], [want.len() as i64]);
                    let op = Operation {
                        root,
                        ..operation(kind, &sent, &received)
                    };
                    if kind == Kind::Exscan {
                        assert!(!Direct::can(&op, false));
                        continue;
                    }
                    let (done, result) = rank.run(&op, operand);
                    done.unwrap();
                    assert_eq!(result, want, "{kind:?} of {n} on {size}");
                }
            }
        });
    }
}

#[test]
fn direct_messages_and_their_lengths() {
    fn exchange<'a>(with: i32, sent: &'a [i64], received: &'a [i64]) -> Operation<'a> {
        Operation {
            dest: with,
            source: with,
            ..operation(Kind::Sendrecv, sent, received)
        }
    }
    for through in [Through::Arrays, Through::Copies] {
        ranks(2, |rank| {
            rank.go_direct(through);
            let (own, other) = (rank.comm.rank, 1 - rank.comm.rank);
            for n in [0i64, 1, 1000] {
                let shape = [n];
                let (done, result) =
                    rank.run(&exchange(other, &shape, &shape), numbers(own, n as usize));
                done.unwrap();
                assert_eq!(result, numbers(other, n as usize));
            }
            // Shorter and longer ones; with a status the rest is zeros.
            let text = rank
                .run(&exchange(other, &[100], &[300]), numbers(own, 100))
                .0
                .unwrap_err()
                .to_string();
            assert!(text.contains("100 bytes, and the result 300"), "{text}");
            let text = rank
                .run(&exchange(other, &[100], &[30]), numbers(own, 100))
                .0
                .unwrap_err()
                .to_string();
            assert!(text.contains("100 bytes, and the result 30"), "{text}");
            let shorter = Operation {
                status: 1,
                ..exchange(other, &[100], &[300])
            };
            let (done, result) = rank.run(&shorter, numbers(own, 100));
            done.unwrap();
            let mut want = numbers(other, 100);
            want.resize(300, 0);
            assert_eq!(result, want);
            let nobody = Operation {
                dest: PROC_NULL,
                source: PROC_NULL,
                ..operation(Kind::Sendrecv, &[200], &[200])
            };
            let (done, result) = rank.run(&nobody, numbers(own, 200));
            done.unwrap();
            assert_eq!(result, vec![0; 200]);
        });
    }
}

#[test]
fn direct_failures_leave_the_next_operation_alone() {
    ranks(1, |rank| {
        rank.go_direct(Through::Copies);
        let shape = [500];
        let op = operation(Kind::Allreduce, &shape, &shape);
        rank.fails_at = 1;
        assert!(rank.run(&op, numbers(0, 500)).0.is_err());
        let (done, result) = rank.run(&op, numbers(0, 500));
        done.unwrap();
        assert_eq!(result, numbers(0, 500));
        rank.device.fail_after(1);
        let text = rank.run(&op, numbers(0, 500)).0.unwrap_err().to_string();
        assert!(
            text.contains("a copy failed on the simulated device"),
            "{text}"
        );
    });
}

#[test]
fn what_mpi_reduces_by_functions_on_the_host_does_not_go_directly() {
    let shape = [4];
    let with = |dtype, reduction| {
        let mut op = operation(Kind::Allreduce, &shape, &shape);
        (op.send, op.recv) = (
            Buffer::described(dtype, &shape),
            Buffer::described(dtype, &shape),
        );
        op.reduction = Some(reduction);
        Direct::can(&op, false)
    };
    assert!(with(ElementType::F32, Reduction::Sum) && with(ElementType::I8, Reduction::Max));
    assert!(with(ElementType::C64, Reduction::Prod));
    for (dtype, reduction) in [
        (ElementType::F32, Reduction::Max),
        (ElementType::F16, Reduction::Sum),
        (ElementType::BF16, Reduction::Sum),
        (ElementType::Bool, Reduction::Sum),
        (ElementType::I32, Reduction::User),
    ] {
        assert!(!with(dtype, reduction), "{dtype:?} {reduction:?}");
    }
    let mut moved = operation(Kind::Allgather, &shape, &shape);
    (moved.send, moved.reduction) = (Buffer::described(ElementType::BF16, &shape), None);
    assert!(Direct::can(&moved, false) && !Direct::can(&moved, true));
    let message = operation(Kind::Sendrecv, &shape, &shape);
    assert!(Direct::can(&message, true));
}
