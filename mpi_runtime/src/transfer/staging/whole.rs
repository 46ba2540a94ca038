//! Operations that go through the host as a whole: messages and collectives whose start and end are
//! separate operations, since the engine keeps their data in memory of the host; and collectives
//! whose blocks differ in length or number.

#![forbid(unsafe_code)]

use mpi_shim_abi::Kind;

use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::operation::Operation;
use crate::transfer::staging::message::{HEADER_BYTES, RendezvousHeader};
use crate::transfer::staging::run::{Run, at};
use crate::transfer::transport::{Done, Transport};

/// Copies what is sent down, and up what is received.
pub(super) fn execute(
    run: &Run<'_>,
    op: &Operation<'_>,
    comm: &Communicator,
    mpi: &mut dyn Transport,
) -> Result<Done, Failure> {
    // An `irecv` has its operand for the shape only.
    let sent = [(op.send.data() as usize, op.send.bytes())];
    let (kind, is_root) = (op.kind.started(), comm.rank == op.root);
    let uses = kind.reads(is_root) || kind.returns_operand(is_root);
    let reads = uses && op.kind != Kind::Irecv && sent[0].1 > 0;
    let coming = run.come(if reads { &sent } else { &[] })?;
    let send = run.arrive(coming)?;
    let received = [(op.recv.data() as usize, op.recv.bytes())];
    let recv = match run.memory(received[0].1) {
        Ok(memory) => memory,
        Err(error) => {
            run.put_back(send);
            return Err(error.into());
        }
    };
    let host = Operation {
        send: at(&send, op.send),
        recv: at(&recv, op.recv),
        ..*op
    };
    let mut beginning = [0; HEADER_BYTES];
    let done = match op.kind {
        Kind::Wait => mpi.wait(&host, &mut beginning),
        _ => mpi.perform(&host),
    };
    let header_sent = RendezvousHeader::read(&beginning);
    run.put_back(send);
    let done = match header_sent {
        Some(header) if header.bytes > run.staging.chunk => {
            header.refuse(run.staging);
            Err(format!(
                "the message has {} bytes and comes in chunks, which irecv cannot receive: \
                 receive it by recv or sendrecv, send it by isend, or set MPI_CUDA_CHUNK_BYTES, \
                 here {}, to more on all ranks",
                header.bytes, run.staging.chunk
            )
            .into())
        }
        _ => done,
    };
    match done {
        Ok(done) => {
            run.go(recv, &received)?;
            Ok(done)
        }
        Err(error) => {
            run.give_back(recv, run.up);
            Err(error)
        }
    }
}
