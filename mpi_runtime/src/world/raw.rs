//! What `python -m mpi_cuda bench` asks of a world: how long MPI's own calls take, in a loop with
//! nothing of the engine around them.

use std::ffi::c_void;
use std::time::{Duration, Instant};

use mpi_shim_abi::{Kind, ShimOp};

use crate::buffer::ElementType;
use crate::error::MpiError;
use crate::mpi::communicators::DEFAULT;
use crate::world::World;

/// Those that can be measured: a sum over all ranks, where they reduce; root 0, where they have
/// one; a message to the next rank and from the one before.
const KINDS: [Kind; 9] = [
    Kind::Allgather,
    Kind::Allreduce,
    Kind::Alltoall,
    Kind::Bcast,
    Kind::Gather,
    Kind::Reduce,
    Kind::ReduceScatter,
    Kind::Scatter,
    Kind::Sendrecv,
];

impl World {
    /// The mean time of `rounds` calls of the operation of that name on all ranks, each of which
    /// passes `count` elements as MPI counts them: of a block, where there are blocks. Collective.
    ///
    /// # Errors
    /// If there is no such operation or type, there is no MPI, or MPI fails.
    ///
    /// # Safety
    /// `send` and `recv` must have room for what the call reads and writes, and lie apart.
    pub unsafe fn raw(
        &self,
        (operation, dtype): (&str, &str),
        count: i64,
        send: *const c_void,
        recv: *mut c_void,
        rounds: u32,
    ) -> Result<Duration, MpiError> {
        let kind = KINDS.into_iter().find(|kind| kind.name() == operation);
        let kind = kind.ok_or_else(|| MpiError(format!("{operation} is not measured")))?;
        let element = ElementType::ALL.iter().find(|one| one.name() == dtype);
        let datatype = element.and_then(|one| one.datatype());
        let datatype = datatype.ok_or_else(|| MpiError(format!("there is no dtype {dtype}")))?;
        let comm = self.engine.communicators.get(DEFAULT);
        let (Some(shim), Some(comm)) = (self.shim, comm) else {
            return Err(MpiError(
                "there is no MPI in this job of one rank".to_owned(),
            ));
        };
        let is_root = self.rank == 0;
        let mut op = ShimOp {
            datatype,
            recv_datatype: datatype,
            count,
            recv_count: count,
            send,
            recv,
            ..ShimOp::new(kind, comm.handle)
        };
        // As the engine's check leaves them: null where this rank has nothing.
        if !kind.writes(is_root) {
            op.recv = std::ptr::null_mut();
        }
        if kind == Kind::Scatter && !is_root {
            op.send = std::ptr::null();
        }
        if kind == Kind::Sendrecv {
            op.dest = (self.rank + 1) % self.size;
            op.source = (self.rank + self.size - 1) % self.size;
            op.source_in_world = op.source;
        }
        let start = Instant::now();
        for _ in 0..rounds {
            // SAFETY: a communicator of the engine's, and memory as this function demands.
            unsafe { shim.execute(&op) }?;
        }
        Ok(start.elapsed() / rounds.max(1))
    }
}
