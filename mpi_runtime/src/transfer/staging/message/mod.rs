//! Messages in chunks.
//!
//! One of at most a chunk is one message, as without staging. A longer one has a rendezvous header:
//! a message of its own with the length comes first, and pins the sender and the tag of the chunks
//! that follow. So both sides must have device memory and the same size of a chunk; whoever meets a
//! rendezvous header that does not fit fails, and nothing is taken for something else. Between
//! ranks that share memory the data go through the sender's shared-memory ring, and MPI has the
//! rendezvous header alone.
//!
//! What is sent and what is received move on independently of each other: what this rank receives
//! may depend on what becomes of the message that it sends.

mod incoming;
mod outgoing;
mod piece;
mod rendezvous_header;

use mpi_shim_abi::{Kind, PROC_NULL};

use crate::buffer::Buffer;
use crate::error::Failure;
use crate::mpi::backoff::pause;
use crate::operation::Operation;
use crate::transfer::staging::run::Run;
use crate::transfer::transport::{Done, Transport};
use incoming::Incoming;
use outgoing::Outgoing;
use piece::Piece;
pub(super) use rendezvous_header::{HEADER_BYTES, RendezvousHeader};

/// Sends, receives, or both.
pub(super) fn execute(
    run: &Run<'_>,
    op: &Operation<'_>,
    mpi: &mut dyn Transport,
) -> Result<Done, Failure> {
    if op.status != 0 && op.kind.receives() && op.source == PROC_NULL {
        // Nothing comes, and MPI says so in the status.
        mpi.perform(&Operation {
            kind: Kind::Recv,
            send: Buffer::NONE,
            recv: Buffer::NONE,
            ..*op
        })?;
    }
    let mut outgoing = Outgoing::new(run, op, mpi)?;
    let mut incoming = Incoming::new(run, op);
    let mut result = Ok(());
    if outgoing.bytes.max(incoming.room) <= run.staging.chunk
        && (outgoing.goes_on() || incoming.goes_on())
    {
        result = exchange(run, op, &mut outgoing, &mut incoming, mpi);
    }
    let mut spins = 0;
    while result.is_ok() && (outgoing.goes_on() || incoming.goes_on()) {
        let moved = outgoing
            .advance(op, mpi)
            .and_then(|sent| Ok(incoming.advance(op, mpi)? || sent));
        match moved {
            Ok(true) => spins = 0,
            Ok(false) => pause(&mut spins),
            Err(error) => result = Err(error),
        }
    }
    outgoing.give_up();
    let done = incoming.finish(result.is_ok());
    result.and(done)
}

/// One message out, one in, or one of each, which MPI moves on by itself.
fn exchange(
    run: &Run<'_>,
    op: &Operation<'_>,
    outgoing: &mut Outgoing<'_, '_>,
    incoming: &mut Incoming<'_, '_>,
    mpi: &mut dyn Transport,
) -> Result<(), Failure> {
    let (sends, receives) = (outgoing.goes_on(), incoming.goes_on());
    let kind = match (sends, receives) {
        (true, true) => Kind::Sendrecv,
        (true, false) => Kind::Send,
        _ => Kind::Recv,
    };
    let out = match sends {
        true => outgoing.whole()?,
        false => Piece::none(),
    };
    let into = match receives {
        true => incoming.room(),
        false => Ok(Piece::none()),
    };
    let into = match into {
        Ok(into) => into,
        Err(error) => {
            run.put_back(out.memory);
            return Err(error);
        }
    };
    let (sent, room) = ([out.elements], [into.elements]);
    let done = mpi.perform(&Operation {
        kind,
        send: out.buffer(&sent),
        recv: into.buffer(&room),
        status: if receives { op.status } else { 0 },
        ..*op
    });
    run.put_back(out.memory);
    match done {
        Ok(done) if receives => incoming.take(into, done),
        done => {
            run.put_back(into.memory);
            done.map(drop)
        }
    }
}
