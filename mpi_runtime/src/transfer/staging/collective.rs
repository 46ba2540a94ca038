//! Collectives in chunks: while MPI has one, the next come down and the last go up.

use std::collections::VecDeque;

use crate::buffer::Buffer;
use crate::device::Copy;
use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::operation::Operation;
use crate::transfer::staging::plan::Plan;
use crate::transfer::staging::run::{AHEAD, Coming, Run, at};
use crate::transfer::transport::Transport;

pub(super) fn execute(
    run: &Run<'_>,
    op: &Operation<'_>,
    comm: &Communicator,
    mpi: &mut dyn Transport,
) -> Result<(), Failure> {
    let plan = Plan::new(op, comm, run.staging.chunk);
    if plan.returns_input {
        let (to, from) = (op.recv.data() as usize, op.send.data() as usize);
        // mpi4jax's results are empty here.
        if op.send.bytes() > 0 && to != 0 && to != from {
            // SAFETY: operand and result of one operation, which do not overlap.
            unsafe {
                let across = Copy::Across { to, from };
                run.staging.device.copy(run.up, across, op.send.bytes())
            }?;
        }
    }
    let mut coming = VecDeque::new();
    let mut result: Result<(), Failure> = Ok(());
    for number in 0..plan.chunks() {
        while result.is_ok() && coming.len() <= AHEAD && number + coming.len() < plan.chunks() {
            match run.come(&plan.sent(op, number + coming.len())) {
                Ok(chunk) => coming.push_back(chunk),
                Err(error) => result = Err(error.into()),
            }
        }
        if let Some(chunk) = coming.pop_front().filter(|_| result.is_ok()) {
            result = exchange(run, op, &plan, number, chunk, mpi);
        } else {
            break;
        }
    }
    for chunk in coming {
        if let Some(copied) = chunk.copied {
            run.staging.device.forget(copied);
        }
        run.give_back(chunk.memory, run.down);
    }
    result
}

/// One chunk of a collective: what was copied down goes through MPI, and its result up.
fn exchange(
    run: &Run<'_>,
    op: &Operation<'_>,
    plan: &Plan,
    number: usize,
    chunk: Coming,
    mpi: &mut dyn Transport,
) -> Result<(), Failure> {
    let send = run.arrive(chunk)?;
    let rows = plan.received(op, number);
    let recv = match run.memory(rows.iter().map(|row| row.1).sum()) {
        Ok(memory) => memory,
        Err(error) => {
            run.put_back(send);
            return Err(error.into());
        }
    };
    let [sent, received] = plan.shapes(number);
    let sent = Buffer::described(op.send.dtype(), &sent);
    let received = Buffer::described(op.recv.dtype(), &received);
    let done = mpi.perform(&Operation {
        send: at(&send, sent),
        recv: at(&recv, received),
        ..*op
    });
    run.put_back(send);
    match done {
        Ok(_) => Ok(run.go(recv, &rows)?),
        Err(error) => {
            run.give_back(recv, run.up);
            Err(error)
        }
    }
}
