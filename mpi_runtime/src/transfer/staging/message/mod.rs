//! Messages in chunks.
//!
//! One of at most a chunk is one message, as without staging. A longer one has a rendezvous header: a message of
//! its own with the length comes first, and pins the sender and the tag of the chunks that follow. So
//! both sides must have device memory and the same size of a chunk; whoever meets a rendezvous header that
//! does not fit fails, and nothing is taken for something else. Between ranks that share memory the data
//! go through the sender's shared-memory ring, and MPI has the rendezvous header alone.
//!
//! What is sent and what is received move on independently of each other: what this rank receives may
//! depend on what becomes of the message that it sends.

mod incoming;
mod outgoing;
mod rendezvous_header;

use mpi_shim_abi::{Kind, PROC_NULL};

use super::{Done, Mpi, Run};
use crate::device::{DeviceError, HostMemory};
use crate::mpi::backoff::pause;
use crate::operation::{Buffer, ElementType, Operation};
use incoming::Incoming;
use outgoing::Outgoing;
pub(super) use rendezvous_header::{HEADER_BYTES, RendezvousHeader};

/// Sends, receives, or both.
pub(super) fn execute(
    run: &Run<'_>,
    op: &Operation<'_>,
    mpi: &mut dyn Mpi,
) -> Result<Done, String> {
    if op.status != 0 && op.kind != Kind::Send && op.source == PROC_NULL {
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
    mpi: &mut dyn Mpi,
) -> Result<(), String> {
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

fn said(error: DeviceError) -> String {
    error.to_string()
}

/// Memory of the host with one message.
struct Piece {
    memory: Option<HostMemory>,
    elements: i64,
    dtype: ElementType,
}

impl Piece {
    fn none() -> Piece {
        Piece {
            memory: None,
            elements: 0,
            dtype: ElementType::U8,
        }
    }

    fn buffer<'a>(&self, shape: &'a [i64]) -> Buffer<'a> {
        let data = self.memory.as_ref();
        Buffer {
            data: data.map_or(std::ptr::null_mut(), |memory| memory.data.as_ptr().cast()),
            dtype: self.dtype,
            shape,
        }
    }

    /// The first `bytes` bytes.
    fn bytes(&self, bytes: usize) -> &[u8] {
        match &self.memory {
            // SAFETY: memory of the pool's that nothing writes now.
            Some(memory) => unsafe {
                std::slice::from_raw_parts(memory.data.as_ptr(), bytes.min(memory.bytes))
            },
            None => &[],
        }
    }
}
