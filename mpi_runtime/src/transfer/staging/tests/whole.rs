//! Messages whose start and end are separate operations.

use std::sync::Arc;

use mpi_shim_abi::Kind;
use parking_lot::Mutex;

use super::examples::{numbers, operation};
use super::rank::{RESULT, bytes, ranks};
use crate::device::simulated::NOT_YET;
use crate::error::Failure;
use crate::mpi::shim::Request;
use crate::operation::Operation;
use crate::transfer::transport::{Done, Transport};

/// Does one thing with every operation.
struct Halves<F>(F);

impl<F: FnMut(&Operation<'_>) -> Result<Done, Failure>> Transport for Halves<F> {
    fn perform(&mut self, op: &Operation<'_>) -> Result<Done, Failure> {
        self.0(op)
    }

    fn wait(&mut self, op: &Operation<'_>, _: &mut [u8]) -> Result<Done, Failure> {
        self.0(op)
    }

    fn start_send(&mut self, _: &Operation<'_>) -> Result<Request, Failure> {
        Err("a half is sent as a whole".into())
    }

    fn is_sent(&mut self, _: &mut Request) -> Result<bool, Failure> {
        Ok(false)
    }

    fn try_receive(&mut self, _: &Operation<'_>) -> Result<Option<Done>, Failure> {
        Ok(None)
    }

    fn world_rank(&self, rank: i32) -> Result<i32, Failure> {
        Ok(rank)
    }
}

#[test]
fn messages_in_two_halves_go_through_the_host_whole() {
    ranks(1, |rank| {
        let (number, shape) = ([1], [500]);
        // What the engine does with each half is not staging's: here it gives one back.
        let mut kept = Vec::new();
        let mut both = |kind, operand: Vec<u8>, sent, received| {
            let op = operation(kind, sent, received);
            let (main, device) = (rank.main, rank.device.clone());
            device.kernel(main, move |memory| {
                memory[..operand.len()].copy_from_slice(&operand);
                memory[RESULT..].fill(NOT_YET);
            });
            let comm = rank.comm;
            let mut halves = Halves(|half: &Operation<'_>| {
                match half.kind {
                    Kind::Isend => kept = bytes(&half.send).to_vec(),
                    Kind::Irecv => assert!(half.send.data().is_null()),
                    _ => assert_eq!(bytes(&half.send), [7]),
                }
                match half.kind {
                    Kind::Wait => bytes(&half.recv).copy_from_slice(&kept),
                    Kind::WaitSend => {}
                    _ => bytes(&half.recv)[0] = 7,
                }
                Ok(Done::default())
            });
            let staging = &rank.staging;
            staging.execute(&op, &comm, main, &mut halves).unwrap();
            let seen = Arc::new(Mutex::new(Vec::new()));
            let (saw, length) = (seen.clone(), op.recv.bytes());
            device.kernel(main, move |memory| {
                *saw.lock() = memory[RESULT..][..length].to_vec();
            });
            device.synchronize(main);
            std::mem::take(&mut *seen.lock())
        };
        assert_eq!(both(Kind::Isend, numbers(0, 500), &shape, &number), [7]);
        assert_eq!(both(Kind::Irecv, vec![1], &shape, &number), [7]);
        assert_eq!(both(Kind::Wait, vec![7], &number, &shape), numbers(0, 500));
        assert!(both(Kind::WaitSend, vec![7], &number, &[0]).is_empty());
    });
}
