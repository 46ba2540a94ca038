//! The engine's way to MPI on one communicator, for the parts that staging makes of an operation.

use mpi_shim_abi::{ShimOp, ShimReceived};

use crate::buffer::ElementType;
use crate::engine::check;
use crate::engine::mpi_calls::MpiCalls;
use crate::engine::nonblocking::NO_MESSAGES;
use crate::error::Failure;
use crate::mpi::communicators::{COLLECTIVES, Communicator, DEFAULT, WORLD};
use crate::mpi::shim::Request;
use crate::operation::Operation;
use crate::transfer::transport::{Done, Transport};

/// Calls MPI on one communicator, for one operation.
pub(super) struct OnCommunicator<'a> {
    calls: &'a MpiCalls,
    /// Of the communicator.
    number: i64,
    comm: &'a Communicator,
    /// What the operation sends.
    sent: ElementType,
}

impl<'a> OnCommunicator<'a> {
    /// For `op`, which is on that communicator.
    pub(super) fn new(calls: &'a MpiCalls, op: &Operation<'_>, comm: &'a Communicator) -> Self {
        OnCommunicator {
            calls,
            number: op.comm,
            comm,
            sent: op.send.dtype(),
        }
    }

    /// A part of the operation, as the shim executes it.
    fn prepare(&self, op: &Operation<'_>) -> Result<ShimOp, Failure> {
        let mut shim_op = check::prepare(op, self.comm)?;
        check::code_part(&mut shim_op, self.sent);
        Ok(shim_op)
    }
}

impl Transport for OnCommunicator<'_> {
    fn perform(&mut self, op: &Operation<'_>) -> Result<Done, Failure> {
        let (calls, comm) = (self.calls, self.comm);
        match op.kind {
            kind if kind.is_end() => self.wait(op, &mut []),
            kind if kind.starts_collective() => {
                let shim_op = check::prepare(op, comm)?;
                // SAFETY: prepared here; the engine has accepted the whole start (`prepare_whole`).
                unsafe { calls.start_collective(op, comm, &shim_op) }.map(|()| Done::default())
            }
            kind if kind.is_start() => calls.start_message(op, comm).map(|()| Done::default()),
            _ => {
                let shim_op = self.prepare(op)?;
                // SAFETY: prepared above.
                unsafe { calls.perform_prepared(op, comm, &shim_op) }.map(done)
            }
        }
    }

    fn wait(&mut self, op: &Operation<'_>, beginning: &mut [u8]) -> Result<Done, Failure> {
        let waited = self.calls.wait_for_started(op, self.comm, beginning);
        waited.map(|()| Done::default())
    }

    fn start_send(&mut self, op: &Operation<'_>) -> Result<Request, Failure> {
        let shim_op = self.prepare(op)?;
        let shim = self.calls.shim.as_ref().ok_or(NO_MESSAGES)?;
        // Where there are short messages, all must be counted.
        debug_assert!(!self.calls.nonblocking.has_short(shim_op.comm));
        self.calls.wake(op, self.comm);
        // SAFETY: staging keeps what is sent in its pool until `is_sent` says that it is.
        let request = unsafe { shim.start_send(&shim_op) };
        let request = request?;
        self.calls
            .balances
            .add(op, self.comm.rank, &ShimReceived::default());
        Ok(request)
    }

    fn is_sent(&mut self, request: &mut Request) -> Result<bool, Failure> {
        let shim = self.calls.shim.as_ref().ok_or(NO_MESSAGES)?;
        Ok(shim.test(request)?.is_some())
    }

    fn try_receive(&mut self, op: &Operation<'_>) -> Result<Option<Done>, Failure> {
        let shim_op = self.prepare(op)?;
        // SAFETY: prepared above; the array outlives this call.
        let received = unsafe {
            self.calls
                .nonblocking
                .try_receive(&shim_op, shim_op.datatype)
        };
        let Some(received) = received? else {
            return Ok(None);
        };
        self.calls.balances.add(op, self.comm.rank, &received);
        Ok(Some(done(received)))
    }

    fn world_rank(&self, rank: i32) -> Result<i32, Failure> {
        let (Some(shim), comm) = (&self.calls.shim, self.comm) else {
            return Ok(rank);
        };
        if matches!(self.number, WORLD | DEFAULT | COLLECTIVES) {
            return Ok(rank);
        }
        let members = shim.comm_members(comm.handle, comm.size);
        let members = members?;
        let member = members.get(rank as usize).copied();
        member.ok_or_else(|| format!("there is no rank {rank}").into())
    }
}

/// What staging hears of a message.
pub(super) fn done(received: ShimReceived) -> Done {
    Done {
        source: received.source,
        tag: received.tag,
        bytes: usize::try_from(received.bytes).unwrap_or(0),
        dtype: check::dtype_of(received.code),
    }
}
