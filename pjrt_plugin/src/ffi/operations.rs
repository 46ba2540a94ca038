//! Handlers of our targets: a call frame becomes an [`Operation`], and the engine executes it.
//!
//! Targets, operands, results and attributes are documented in `include/mpi_cuda.h`. mpi4jax's
//! targets (0.9, `mpi_allreduce_ffi` and so on) differ little from ours and are executed likewise.

use mpi_runtime::log;
use mpi_runtime::mpi::communicators;
use mpi_runtime::operation::REDUCTIONS;
use mpi_runtime::{
    ANY, Buffer, ElementType, Family, Kind, Operation, PROC_NULL, Reduction, Ticket, World,
};
use pjrt_sys::*;

use super::contract::{Contract, Field, List, Values};
use super::contracts::{self, ATTRIBUTE_ANY, ATTRIBUTE_PROC_NULL};
use super::frame::{Frame, array};
use super::handler::{Handler, handler};
use crate::error::Error;
use crate::ffi::memory::Memory;
use crate::ffi::status;
use crate::launch::async_barrier;
use crate::launch::completion::noted;
use crate::launch::ticket::ticket_of;
use crate::plugin::world;

macro_rules! handlers {
    ($dialect:ident: $($kind:ident),+) => {
        &[$((
            Kind::$kind,
            handler(|frame: &Frame<'_>| noted(execute(Kind::$kind, &Dialect::$dialect, frame))),
        )),+]
    };
}

/// The handlers of our targets: one for each operation.
pub const HANDLERS: &[(Kind, Handler)] = handlers!(
    Ours: Allgather, Allreduce, Alltoall, Barrier, Bcast, Gather, Recv, Reduce, Scan, Scatter, Send,
    Sendrecv, Exscan, ReduceScatter, Isend, Irecv, Wait, WaitSend, Allgatherv, Gatherv, Scatterv,
    Alltoallv, NeighborAllgather, NeighborAlltoall, Iallgather, Iallreduce, Ialltoall, Ibarrier,
    Ibcast, Igather, Ireduce, Iscan, Iscatter, Iexscan, IreduceScatter
);

/// The handlers of mpi4jax's targets.
pub const MPI4JAX_HANDLERS: &[(Kind, Handler)] = handlers!(
    Mpi4jax: Allgather, Allreduce, Alltoall, Barrier, Bcast, Gather, Recv, Reduce, Scan, Scatter,
    Send, Sendrecv
);

/// The handler of the async barrier's custom call; see [`crate::launch::async_barrier`].
pub const ASYNC_BARRIER: Handler = handler(|frame: &Frame<'_>| {
    contracts::ASYNC_BARRIER.check(frame, &mut Values::default())?;
    async_barrier::wait_released(frame.run_id());
    fill_tokens(frame, 0, &Memory::of(frame)?)
});

/// What mpi4jax's targets are on JAX's own CPU backend, where nothing of ours can serve them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_mpi4jax_elsewhere(
    frame: *mut XLA_FFI_CallFrame,
) -> *mut XLA_FFI_Error {
    const REFUSE: Handler = handler(|_: &Frame<'_>| {
        Err(Error::internal(
            "with JAX_PLATFORMS=mpi_cuda mpi4jax's operations run on the backend mpi_cuda only; \
             leave it out of JAX_PLATFORMS to run them on JAX's CPU backend",
        ))
    });
    // SAFETY: XLA passes a valid frame.
    unsafe { REFUSE(frame) }
}

/// Whose custom call it is.
enum Dialect {
    Ours,
    Mpi4jax,
}

impl Dialect {
    fn contract(&self, kind: Kind) -> &'static Contract {
        match self {
            Dialect::Ours => &contracts::OURS[kind as usize],
            Dialect::Mpi4jax => &contracts::MPI4JAX[kind as usize],
        }
    }

    /// `ANY_SOURCE` and `PROC_NULL` as attributes. mpi4jax passes those of the running MPI, which
    /// differ (`mpi.h` of each family).
    fn special_ranks(&self, world: &World) -> (i64, i64) {
        match self {
            Dialect::Mpi4jax => match world.family() {
                Some(Family::Mpich) => (-2, -1),
                Some(Family::MpiAbi) => (-1, -3),
                Some(Family::OpenMpi) | None => (-1, -2),
            },
            Dialect::Ours => (ATTRIBUTE_ANY, ATTRIBUTE_PROC_NULL),
        }
    }

    /// The communicator's number. Of mpi4jax's calls it is one too, since its handles are
    /// translated when a program is lowered (`_bridge/mpi4jax.py`); a handle that got here
    /// must be known.
    fn communicator(&self, attribute: i64, world: &World) -> Result<i64, Error> {
        let known = &world.engine.communicators;
        if communicators::is_internal(attribute) {
            return Err(Error::invalid(format!(
                "comm={attribute} is a communicator of the library's own; use 0, 1, 2 or what \
                 mpi_cuda_comm() says"
            )));
        }
        if matches!(self, Dialect::Ours) || known.get(attribute).is_some() {
            return Ok(attribute);
        }
        let handle = attribute as u64;
        known.find(handle).ok_or_else(|| {
            Error::internal(format!(
                "mpi4jax's program names a communicator by the MPI handle {handle:#x}, \
                 which is none in this process; start Python with JAX_PLATFORMS=mpi_cuda set, so \
                 that mpi_cuda translates handles when programs are compiled"
            ))
        })
    }
}

fn execute<'a>(kind: Kind, dialect: &Dialect, frame: &Frame<'a>) -> Result<(), Error> {
    let world = world()
        .ok_or_else(|| Error::internal("an operation was executed before the world was started"))?;
    let contract = dialect.contract(kind);
    let mut values = Values::default();
    contract.check(frame, &mut values)?;
    let data = |has: bool, given: &[&'a XLA_FFI_Buffer]| match has {
        true => array(given[0]),
        false => Buffer::NONE,
    };
    let mut send = data(kind.has_operand(), frame.args);
    let mut recv = data(kind.has_result(), frame.rets);
    let narrow = values.get(Field::Type);
    if narrow != 0 {
        (send, recv) = (narrowed(send, narrow & 0xff)?, narrowed(recv, narrow >> 8)?);
    }
    let comm = dialect.communicator(values.get(Field::Comm), world)?;
    let special = dialect.special_ranks(world);
    let peer = rank(values.get(Field::Peer), special, false)?;
    if matches!(dialect, Dialect::Mpi4jax)
        && recv.shape() == [0]
        && gets_nothing(world, kind, comm, peer)
    {
        // Where there is nothing to receive, its result is empty; ours is the operand.
        recv = Buffer::described(send.dtype(), send.shape());
    }
    let reduction = match kind.reduces() {
        true => Some(reduction(values.get(Field::Op))?),
        false => None,
    };
    let receives = kind.receives();
    let op = Operation {
        of: matches!(dialect, Dialect::Mpi4jax).then_some("mpi4jax's"),
        counts: values.list(List::Counts),
        recv_counts: values.list(List::RecvCounts),
        sources: small(values.get(Field::Sources), "sources")?,
        destinations: small(values.get(Field::Destinations), "destinations")?,
        reduction: reduction.map(|(reduction, _)| reduction),
        user_reduction: reduction.map_or(0, |(_, handle)| handle),
        root: if kind.has_root() { peer } else { 0 },
        dest: if kind.sends() { peer } else { PROC_NULL },
        source: match values.get(Field::Source) {
            _ if !receives => ANY,
            source => rank(source, special, true)?,
        },
        send_tag: small(values.get(Field::SendTag), "tag")?,
        recv_tag: match values.get(Field::RecvTag) {
            ATTRIBUTE_ANY => ANY,
            _ if !receives => ANY,
            tag => small(tag, "recvtag")?,
        },
        status: status::address(values.get(Field::Status))?,
        place: values.get(Field::Place) as u64,
        ..Operation::new(kind, comm, send, recv)
    };
    let ticket = ticket_of(frame.run_id()).unwrap_or(Ticket(0));
    let memory = Memory::of(frame)?;
    memory.execute(world, ticket, &op).map_err(|error| {
        if matches!(dialect, Dialect::Mpi4jax) {
            // What its users look for; the job ends as usual, with a Python exception.
            let mut name = kind.name().to_owned();
            name[..1].make_ascii_uppercase();
            log::line(&format!(
                "r{} | MPI_{name} returned error code: {}",
                error.rank, error.reason
            ));
        }
        Error::from(error)
    })?;
    fill_tokens(frame, usize::from(kind.has_result()), &memory)
}

/// An array whose elements have less than 8 bits, by the number of their type; 0 if it is as it is.
fn narrowed(array: Buffer<'_>, number: i64) -> Result<Buffer<'_>, Error> {
    if number == 0 {
        return Ok(array);
    }
    let row = usize::try_from(number - 1)
        .ok()
        .and_then(|index| ElementType::NARROW.get(index));
    match row {
        Some(&(dtype, passed_as)) if passed_as == array.dtype() => Ok(array.as_type(dtype)),
        _ => Err(Error::invalid(format!(
            "attribute type says {number} of an array of {}; see mpi_cuda.h",
            array.dtype().name()
        ))),
    }
}

/// Whether MPI writes nothing to the result of this rank, which is no root or the only one that
/// sends.
fn gets_nothing(world: &World, kind: Kind, comm: i64, root: i32) -> bool {
    let comm = world.engine.communicators.get(comm);
    comm.is_some_and(|comm| kind.returns_operand(comm.rank == root))
}

/// A reduction by its number, and the handle of a user's.
fn reduction(number: i64) -> Result<(Reduction, u64), Error> {
    if let Some(row) = usize::try_from(number).ok().and_then(|n| REDUCTIONS.get(n)) {
        return Ok((row.0, 0));
    }
    let handle = crate::ffi::user_reductions::handle(number).ok_or_else(|| {
        Error::internal(format!(
            "op={number} is no reduction in this process; a program with a user-defined one \
             cannot be loaded in another run"
        ))
    })?;
    Ok((Reduction::User, handle))
}

#[inline]
fn rank(attribute: i64, (any, null): (i64, i64), may_be_any: bool) -> Result<i32, Error> {
    match attribute {
        rank if rank == any && may_be_any => Ok(ANY),
        rank if rank == null => Ok(PROC_NULL),
        rank => {
            // A negative number that is no rank (mpi_cuda.h).
            let negative = rank < i64::from(i32::MIN);
            let number = rank.saturating_add(if negative { 1 << 32 } else { 0 });
            match small(number, "rank")? {
                ANY | PROC_NULL => Err(Error::internal(format!("rank={number} is none"))),
                rank => Ok(rank),
            }
        }
    }
}

fn small(value: i64, what: &str) -> Result<i32, Error> {
    i32::try_from(value)
        .map_err(|_| Error::internal(format!("{what}={value} does not fit 32 bits")))
}

/// Results after the data are tokens. XLA's own have no memory; ours are an `s32[]` with value 0.
fn fill_tokens(frame: &Frame<'_>, first: usize, memory: &Memory<'_>) -> Result<(), Error> {
    for ret in frame.rets.iter().skip(first) {
        let is_token = ret.dtype == XLA_FFI_DataType_S32 && ret.rank == 0;
        if is_token {
            memory.write(&array(ret), 0)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::targets;

    #[test]
    fn every_operation_has_a_handler() {
        assert!(
            Kind::ALL
                .iter()
                .all(|kind| HANDLERS.iter().any(|row| row.0 == *kind))
        );
        assert!(
            MPI4JAX_HANDLERS
                .iter()
                .map(|row| row.0)
                .eq(targets::MPI4JAX)
        );
    }
}
