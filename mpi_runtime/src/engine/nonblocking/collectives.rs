//! Collectives whose start and end are separate operations (MPI 4.0, section 6.12).
//!
//! The ranks have compared the start before it comes here. What it sends is copied, and where it
//! receives is memory of the engine's, so that nothing of the program's is MPI's between start and
//! end.

use mpi_shim_abi::{Kind, ShimOp, ShimReceived, ShimStatus};

use crate::engine::nonblocking::memory::StartedMemory;
use crate::engine::nonblocking::table::{Posted, StartedRow, StartedState};
use crate::engine::nonblocking::{Ended, Nonblocking};
use crate::engine::{check, single_rank};
use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::operation::Operation;

impl Nonblocking {
    /// Starts a collective, the one of that place among those of its communicator, and returns its
    /// number.
    ///
    /// # Safety
    /// `shim_op` must be what `check::prepare` makes of `op` on `comm`, and `check::check_start`
    /// must have accepted it.
    pub unsafe fn start_collective(
        &self,
        op: &Operation<'_>,
        shim_op: &ShimOp,
        comm: &Communicator,
        place: u64,
    ) -> Result<u32, Failure> {
        let (shared, kind) = (&self.shared, op.kind.started());
        let is_root = comm.rank == op.root;
        if let Some(shim) = &shared.shim {
            shared.clone().start_thread(shim)?;
        }
        let memory = |bytes| shared.table.lock().memory(bytes);
        let mut operand = StartedMemory::default();
        if kind.reads(is_root) || kind.returns_operand(is_root) {
            operand = memory(op.send.bytes())?;
            // SAFETY: the memory is new, or nobody's any more, and has that room.
            unsafe { op.send.copy_to(operand.start().cast()) };
        }
        let size = op.send.dtype().size();
        let bytes = check::result_elements(op, comm) as usize * size;
        let mut result = StartedMemory::default();
        // In a world without MPI all are copies.
        let is_apart = kind.writes(is_root) && shared.shim.is_some();
        if is_apart {
            result = memory(bytes)?;
        }
        if is_apart && kind == Kind::Exscan && comm.rank == 0 {
            // MPI writes nothing there.
            result.clear(bytes);
        }
        let mut posted = *shim_op;
        if !posted.send.is_null() {
            posted.send = operand.start().cast_const();
        }
        posted.recv = if is_apart {
            result.start()
        } else {
            std::ptr::null_mut()
        };
        let arrives = ShimReceived {
            source: -1,
            tag: -1,
            code: 0,
            bytes: bytes as i64,
        };
        let state = match &shared.shim {
            Some(shim) => {
                // SAFETY: prepared, as this function demands; the row keeps both memories, which
                // have room for operand and result, until the request is complete.
                let request = unsafe { shim.start_collective(&posted) }?;
                StartedState::Running(request, arrives)
            }
            None => StartedState::Done(ShimStatus([0; 64]), arrives),
        };
        let (memory, operand) = match is_apart {
            true => (result, operand),
            false => (operand, result),
        };
        let row = StartedRow {
            number: 0,
            operation: op.without_arrays(),
            members: comm.members,
            shape: op.send.shape().to_vec(),
            posted: Posted(posted),
            memory,
            operand,
            state,
            place,
        };
        Ok(shared.enter(&mut shared.table.lock(), row))
    }

    /// Those on the communicator with that handle that have not ended, and the shapes of what they
    /// send. The thread moves them on.
    pub fn running_collectives(&self, comm: u64) -> Vec<(Operation<'static>, Vec<i64>)> {
        let table = self.shared.table.lock();
        let rows = table.rows.iter().filter(|row| {
            let runs = matches!(row.state, StartedState::Running(..));
            runs && row.operation.kind.is_collective() && row.posted.0.comm == comm
        });
        rows.map(|row| (row.operation, row.shape.clone())).collect()
    }
}

impl Ended<'_> {
    /// Gives the result of a collective to the operation that has waited for it, which has room for
    /// it. `comm` is that of the start.
    pub fn finish_collective(&self, wait: &Operation<'_>, comm: &Communicator) {
        wait.recv.write(0, self.arrived());
        if self.operation.kind == Kind::Iexscan && comm.rank == 0 {
            single_rank::nothing_before(&Operation {
                recv: wait.recv,
                ..self.operation
            });
        }
    }
}
