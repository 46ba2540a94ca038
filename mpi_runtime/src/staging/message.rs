//! Messages in chunks.
//!
//! One of at most a chunk is one message, as without staging. A longer one is announced: a message of
//! its own with the length comes first, and pins the sender and the tag of the chunks that follow. So
//! both sides must have device memory and the same size of a chunk; whoever meets an announcement that
//! does not fit fails, and nothing is taken for something else.

use std::collections::VecDeque;

use mpi_shim_abi::{Kind, PROC_NULL};

use super::{AHEAD, Coming, Done, Perform, Run};
use crate::device::HostMemory;
use crate::operation::{Buffer, ElementType, Operation};

/// An announcement begins with this. It has a length that is none of an array of numbers.
const MAGIC: [u8; 5] = *b"MPIc\x01";
pub(super) const ANNOUNCEMENT: usize = MAGIC.len() + size_of::<u64>();

fn announcement(bytes: usize) -> [u8; ANNOUNCEMENT] {
    let mut text = [0; ANNOUNCEMENT];
    text[..MAGIC.len()].copy_from_slice(&MAGIC);
    text[MAGIC.len()..].copy_from_slice(&(bytes as u64).to_le_bytes());
    text
}

/// The length that a message of `bytes` bytes in `memory` announces, if it is an announcement.
pub(super) fn announced(memory: &[u8]) -> Option<usize> {
    let length = memory.strip_prefix(&MAGIC)?;
    usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()
}

/// Sends, receives, or both.
pub(super) fn execute(
    run: &Run<'_>,
    op: &Operation<'_>,
    perform: &mut Perform<'_>,
) -> Result<Done, String> {
    if op.status != 0 && op.kind != Kind::Send && op.source == PROC_NULL {
        // Nothing comes, and MPI says so in the status.
        perform(&Operation {
            kind: Kind::Recv,
            send: Buffer::NONE,
            recv: Buffer::NONE,
            ..*op
        })?;
    }
    let mut outgoing = Outgoing::new(run, op);
    let mut incoming = Incoming::new(run, op);
    let mut result = Ok(());
    while result.is_ok() && (outgoing.goes_on() || incoming.goes_on()) {
        result = step(run, op, &mut outgoing, &mut incoming, perform);
    }
    outgoing.give_up();
    let done = incoming.finish(result.is_ok());
    result.and(done)
}

/// One message out, one in, or one of each.
fn step(
    run: &Run<'_>,
    op: &Operation<'_>,
    outgoing: &mut Outgoing<'_, '_>,
    incoming: &mut Incoming<'_, '_>,
    perform: &mut Perform<'_>,
) -> Result<(), String> {
    let sends = outgoing.goes_on();
    let receives = incoming.goes_on();
    let kind = match (sends, receives) {
        (true, true) => Kind::Sendrecv,
        (true, false) => Kind::Send,
        _ => Kind::Recv,
    };
    let out = if sends {
        outgoing.next()?
    } else {
        Piece::none()
    };
    let into = match if receives {
        incoming.room()
    } else {
        Ok(Piece::none())
    } {
        Ok(into) => into,
        Err(error) => {
            run.give_back(out.memory, run.staging.down);
            return Err(error);
        }
    };
    let (sent, room) = ([out.elements], [into.elements]);
    let done = perform(&Operation {
        kind,
        send: out.buffer(&sent),
        recv: into.buffer(&room),
        source: incoming.source,
        recv_tag: incoming.tag,
        status: if receives { op.status } else { 0 },
        ..*op
    });
    run.give_back(out.memory, run.staging.down);
    match done {
        Ok(done) if receives => incoming.take(into, done),
        done => {
            run.give_back(into.memory, run.staging.up);
            done.map(drop)
        }
    }
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

/// What this rank sends.
struct Outgoing<'r, 's> {
    run: &'r Run<'s>,
    data: usize,
    bytes: usize,
    dtype: ElementType,
    /// To be said first.
    announce: bool,
    coming: VecDeque<(Coming, usize)>,
    /// Bytes whose copy down has begun, and that were sent.
    begun: usize,
    sent: usize,
    /// There is more to send; an empty message is one too.
    open: bool,
}

impl<'r, 's> Outgoing<'r, 's> {
    fn new(run: &'r Run<'s>, op: &Operation<'_>) -> Self {
        let sends = op.kind != Kind::Recv && op.dest != PROC_NULL;
        let bytes = if sends { op.send.bytes() } else { 0 };
        Outgoing {
            run,
            data: op.send.data as usize,
            bytes,
            dtype: op.send.dtype,
            announce: bytes > run.staging.chunk,
            coming: VecDeque::new(),
            begun: 0,
            sent: 0,
            open: sends,
        }
    }

    fn goes_on(&self) -> bool {
        self.open
    }

    fn next(&mut self) -> Result<Piece, String> {
        let text = |error: crate::device::DeviceError| error.to_string();
        // Copies begin before the announcement goes out.
        while self.coming.len() <= AHEAD && (self.begun < self.bytes) {
            let bytes = self.run.staging.chunk.min(self.bytes - self.begun);
            let row = (self.data + self.begun, bytes);
            self.coming
                .push_back((self.run.come(&[row]).map_err(text)?, bytes));
            self.begun += bytes;
        }
        if std::mem::take(&mut self.announce) {
            let memory = self.run.memory(ANNOUNCEMENT).map_err(text)?;
            if let Some(memory) = &memory {
                let said = announcement(self.bytes);
                // SAFETY: memory of the pool's of at least that size.
                unsafe {
                    memory
                        .data
                        .as_ptr()
                        .copy_from_nonoverlapping(said.as_ptr(), said.len())
                };
            }
            return Ok(Piece {
                memory,
                elements: ANNOUNCEMENT as i64,
                dtype: ElementType::U8,
            });
        }
        let Some((chunk, bytes)) = self.coming.pop_front() else {
            self.open = false;
            return Ok(Piece {
                dtype: self.dtype,
                ..Piece::none()
            });
        };
        self.sent += bytes;
        self.open = self.sent < self.bytes;
        Ok(Piece {
            memory: self.run.arrive(chunk).map_err(text)?,
            elements: (bytes / self.dtype.size()) as i64,
            dtype: self.dtype,
        })
    }

    /// What was copied down and not sent.
    fn give_up(self) {
        for (chunk, _) in self.coming {
            if let Some(copied) = chunk.copied {
                self.run.staging.device.forget(copied);
            }
            self.run.give_back(chunk.memory, self.run.staging.down);
        }
    }
}

/// What this rank receives.
struct Incoming<'r, 's> {
    run: &'r Run<'s>,
    data: usize,
    /// What the result holds, what the message has (once that is known), and what has come.
    room: usize,
    length: Option<usize>,
    arrived: usize,
    dtype: ElementType,
    may_be_shorter: bool,
    source: i32,
    tag: i32,
    open: bool,
    /// What is wrong with the message. The rest of it is taken out of the way, and what this rank sends
    /// is sent, so that the other side does not wait.
    wrong: Option<String>,
}

impl<'r, 's> Incoming<'r, 's> {
    fn new(run: &'r Run<'s>, op: &Operation<'_>) -> Self {
        let receives = op.kind != Kind::Send;
        Incoming {
            run,
            data: op.recv.data as usize,
            room: if receives { op.recv.bytes() } else { 0 },
            length: None,
            arrived: 0,
            dtype: op.recv.dtype,
            may_be_shorter: op.status != 0,
            source: op.source,
            tag: op.recv_tag,
            open: receives && op.source != PROC_NULL,
            wrong: None,
        }
    }

    fn goes_on(&self) -> bool {
        self.open
    }

    /// Memory for the next message.
    fn room(&self) -> Result<Piece, String> {
        let left = self.length.unwrap_or(self.room) - self.arrived;
        let bytes = left.min(self.run.staging.chunk);
        let memory = self.run.memory(bytes.max(ANNOUNCEMENT));
        let (elements, dtype) = if bytes < ANNOUNCEMENT {
            // An announcement must fit, to be recognised.
            (ANNOUNCEMENT, ElementType::U8)
        } else {
            (bytes / self.dtype.size(), self.dtype)
        };
        Ok(Piece {
            memory: memory.map_err(|error| error.to_string())?,
            elements: elements as i64,
            dtype,
        })
    }

    /// A message has come.
    fn take(&mut self, piece: Piece, done: Done) -> Result<(), String> {
        let said = announced(piece.bytes(done.bytes)).filter(|_| done.bytes == ANNOUNCEMENT);
        let wrong = match said {
            Some(length) if self.length.is_none() => self.announced(length, done),
            _ => self.data(done),
        };
        self.wrong = self.wrong.take().or(wrong.err());
        if said.is_some() || self.wrong.is_some() {
            self.run.give_back(piece.memory, self.run.staging.up);
            return Ok(());
        }
        let place = self.data + self.arrived - done.bytes;
        let gone = self.run.go(piece.memory, &[(place, done.bytes)]);
        gone.map_err(|error| error.to_string())
    }

    fn announced(&mut self, length: usize, done: Done) -> Result<(), String> {
        (self.source, self.tag) = (done.source, done.tag);
        self.length = Some(length);
        self.open = length > 0;
        self.fits(length, done)
    }

    /// Bytes that have come.
    fn data(&mut self, done: Done) -> Result<(), String> {
        let chunk = self.run.staging.chunk;
        let first = self.length.is_none();
        let left = self.length.unwrap_or(self.room) - self.arrived;
        let expected = left.min(chunk);
        (self.source, self.tag) = (done.source, done.tag);
        let length = *self.length.get_or_insert(done.bytes);
        self.arrived += done.bytes;
        self.open = self.arrived < length && (first || done.bytes == expected);
        if first && done.bytes > expected && done.bytes == self.room {
            return Err(format!(
                "the message from rank {} came in one piece, and device memory receives more than \
                 {chunk} bytes in chunks: it was sent by isend, or from memory of the host, or \
                 MPI_CUDA_CHUNK_BYTES differs there",
                done.source
            ));
        }
        if first {
            return self.fits(done.bytes, done);
        }
        if done.bytes != expected {
            let bytes = done.bytes;
            return Err(format!(
                "a chunk of {bytes} bytes came instead of {expected}; MPI_CUDA_CHUNK_BYTES, here {chunk}, \
                 must be the same on all ranks"
            ));
        }
        Ok(())
    }

    fn fits(&self, length: usize, done: Done) -> Result<(), String> {
        if length == self.room || length < self.room && self.may_be_shorter {
            return Ok(());
        }
        let (room, remedy) = (self.room, " (pass status= to accept less)");
        let remedy = if length < room { remedy } else { "" };
        Err(format!(
            "the message from rank {} with tag {} has {length} bytes, and the result {room}; both sides \
             must have the same shape and dtype{remedy}",
            done.source, done.tag
        ))
    }

    /// Nothing in the result stays as it was.
    fn finish(mut self, well: bool) -> Result<Done, String> {
        if let Some(wrong) = self.wrong.take() {
            return Err(wrong);
        }
        let mut done = Done {
            source: self.source,
            tag: self.tag,
            bytes: self.arrived,
        };
        if self.source == PROC_NULL {
            done.tag = mpi_shim_abi::ANY;
        }
        let mut place = self.arrived;
        while well && place < self.room {
            let bytes = (self.room - place).min(self.run.staging.chunk);
            let zeros = self.run.memory(bytes).map_err(|error| error.to_string())?;
            if let Some(zeros) = &zeros {
                // SAFETY: memory of the pool's of at least that size.
                unsafe { zeros.data.as_ptr().write_bytes(0, bytes) };
            }
            let gone = self.run.go(zeros, &[(self.data + place, bytes)]);
            gone.map_err(|error| error.to_string())?;
            place += bytes;
        }
        Ok(done)
    }
}
