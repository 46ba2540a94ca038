//! The half of a message that this rank receives.

use std::collections::VecDeque;

use mpi_shim_abi::{Kind, PROC_NULL};

use super::piece::Piece;
use super::rendezvous_header::{HEADER_BYTES, RendezvousHeader};
use crate::buffer::{Buffer, ElementType};
use crate::device::{Copy, DeviceError, Event, Fill};
use crate::error::Failure;
use crate::node::shm_ring::ShmRing;
use crate::operation::{Operation, wrong_dtype, wrong_length};
use crate::transfer::staging::run::{Run, StagingResources};
use crate::transfer::transport::{Done, Transport};

/// How data arrive, once that is known.
struct Arriving<'s> {
    shm_ring: &'s ShmRing,
    /// The next place to be copied up, those before it that still are, and the end.
    next: u64,
    end: u64,
    going: VecDeque<(u64, Option<Event>)>,
}

/// What this rank receives.
pub(super) struct Incoming<'r, 's> {
    run: &'r Run<'s>,
    data: usize,
    /// What the result holds, what the message has (once that is known), and what has come.
    pub(super) room: usize,
    length: Option<usize>,
    arrived: usize,
    dtype: ElementType,
    may_be_shorter: bool,
    source: i32,
    tag: i32,
    open: bool,
    /// For the next message.
    waiting: Option<Piece>,
    /// In place of messages.
    arriving: Option<Arriving<'s>>,
    /// What is wrong with the message. The rest of it is taken out of the way, and what this rank
    /// sends is sent, so that the other side does not wait.
    wrong: Option<Failure>,
}

impl<'r, 's> Incoming<'r, 's> {
    pub(super) fn new(run: &'r Run<'s>, op: &Operation<'_>) -> Self {
        let receives = op.kind.receives();
        Incoming {
            run,
            data: op.recv.data() as usize,
            room: if receives { op.recv.bytes() } else { 0 },
            length: None,
            arrived: 0,
            dtype: op.recv.dtype(),
            may_be_shorter: op.status != 0,
            source: op.source,
            tag: op.recv_tag,
            open: receives && op.source != PROC_NULL,
            waiting: None,
            arriving: None,
            wrong: None,
        }
    }

    pub(super) fn goes_on(&self) -> bool {
        self.open
    }

    /// Does what can be done now; whether that was anything.
    pub(super) fn advance(
        &mut self,
        op: &Operation<'_>,
        mpi: &mut dyn Transport,
    ) -> Result<bool, Failure> {
        if !self.open {
            return Ok(false);
        }
        if self.arriving.is_some() {
            let moved = self.read_slots()?;
            let gone = |a: &Arriving<'_>| a.next < a.end && a.shm_ring.is_broken(a.next);
            if !moved && self.arriving.as_ref().is_some_and(gone) {
                return Err(format!(
                    "rank {} has failed while it was sending this message; its own error says why",
                    self.source
                )
                .into());
            }
            return Ok(moved);
        }
        let piece = match self.waiting.take() {
            Some(piece) => piece,
            None => self.room()?,
        };
        let shape = [piece.elements];
        let received = mpi.try_receive(&Operation {
            kind: Kind::Recv,
            send: Buffer::NONE,
            recv: piece.buffer(&shape),
            source: self.source,
            recv_tag: self.tag,
            ..*op
        })?;
        match received {
            Some(done) => self.take(piece, done).map(|()| true),
            None => {
                self.waiting = Some(piece);
                Ok(false)
            }
        }
    }

    /// Copies slots up that the sender has filled, and frees those that are.
    fn read_slots(&mut self) -> Result<bool, DeviceError> {
        let Some(arriving) = &mut self.arriving else {
            return Ok(false);
        };
        let (shm_ring, device) = (arriving.shm_ring, &self.run.staging.device);
        let mut moved = false;
        while arriving.next < arriving.end && shm_ring.is_filled(arriving.next) {
            let length = self.length.unwrap_or(0);
            let bytes = (length - self.arrived).min(shm_ring.part(length));
            let mut copied = None;
            if self.wrong.is_none() {
                let to = self.data + self.arrived;
                let from = shm_ring.data(arriving.next).cast_const();
                // SAFETY: the result holds the message, which was checked, and is valid while the
                // operation runs; the slot is this rank's until `free`, which comes after the
                // event.
                unsafe { device.copy(self.run.up, Copy::Up { to, from }, bytes) }?;
                copied = Some(device.record(self.run.up)?);
            }
            arriving.going.push_back((arriving.next, copied));
            arriving.next += 1;
            self.arrived += bytes;
            moved = true;
        }
        while let Some((place, copied)) = arriving.going.front() {
            if let Some(copied) = copied
                && !device.has_passed(copied)?
            {
                break;
            }
            shm_ring.free(*place);
            moved = true;
            if let Some((_, Some(copied))) = arriving.going.pop_front() {
                device.forget(copied);
            }
        }
        self.open = arriving.next < arriving.end || !arriving.going.is_empty();
        Ok(moved)
    }

    /// Memory for the next message.
    pub(super) fn room(&self) -> Result<Piece, Failure> {
        let left = self.length.unwrap_or(self.room) - self.arrived;
        let bytes = left.min(self.run.staging.chunk);
        let memory = self.run.memory(bytes.max(HEADER_BYTES));
        let (elements, dtype) = if bytes < HEADER_BYTES {
            // A rendezvous header must fit, to be recognised.
            (HEADER_BYTES, ElementType::U8)
        } else {
            (bytes / self.dtype.size(), self.dtype)
        };
        Ok(Piece {
            memory: memory?,
            elements: elements as i64,
            dtype,
        })
    }

    /// A message has come.
    pub(super) fn take(&mut self, piece: Piece, done: Done) -> Result<(), Failure> {
        let begins = self.length.is_none() && done.bytes == HEADER_BYTES;
        let header = RendezvousHeader::read(piece.bytes(done.bytes)).filter(|_| begins);
        let wrong = match header {
            Some(header) => self.header_sent(header, done),
            None => self.data(done),
        };
        self.wrong = self.wrong.take().or(wrong.err());
        if header.is_some() || self.wrong.is_some() {
            self.run.put_back(piece.memory);
            return Ok(());
        }
        let place = self.data + self.arrived - done.bytes;
        Ok(self.run.go(piece.memory, &[(place, done.bytes)])?)
    }

    fn header_sent(&mut self, header: RendezvousHeader, done: Done) -> Result<(), Failure> {
        (self.source, self.tag) = (done.source, done.tag);
        self.length = Some(header.bytes);
        self.open = header.bytes > 0;
        let staging: &'s StagingResources = self.run.staging;
        match header.slots(staging) {
            Some(Ok((shm_ring, next, end))) => {
                shm_ring.pin(&*staging.device);
                self.arriving = Some(Arriving {
                    shm_ring,
                    next,
                    end,
                    going: VecDeque::new(),
                });
            }
            Some(Err(())) => {
                self.open = false;
                return Err(format!(
                    "the message from rank {} comes through memory of this node that this rank \
                     has not mapped: set MPI_CUDA_SHM_RING=0 on all ranks",
                    done.source
                )
                .into());
            }
            None => {}
        }
        self.fits(header.bytes, done)
    }

    /// Bytes that have come.
    fn data(&mut self, done: Done) -> Result<(), Failure> {
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
            )
            .into());
        }
        if first {
            return self.fits(done.bytes, done);
        }
        if done.bytes != expected {
            let bytes = done.bytes;
            return Err(format!(
                "a chunk of {bytes} bytes came instead of {expected}; MPI_CUDA_CHUNK_BYTES, here \
                 {chunk}, must be the same on all ranks"
            )
            .into());
        }
        Ok(())
    }

    fn fits(&self, length: usize, done: Done) -> Result<(), Failure> {
        if done.dtype.is_some_and(|sent| sent != self.dtype) {
            let (source, tag) = (done.source, done.tag);
            return Err(wrong_dtype(source, tag, length, done.dtype, self.dtype));
        }
        if length == self.room || length < self.room && self.may_be_shorter {
            return Ok(());
        }
        Err(wrong_length(done.source, done.tag, length, self.room))
    }

    /// Nothing in the result stays as it was.
    pub(super) fn finish(mut self, well: bool) -> Result<Done, Failure> {
        if let Some(piece) = self.waiting.take() {
            self.run.put_back(piece.memory);
        }
        if let Some(arriving) = self.arriving.take().filter(|_| !well) {
            // The sender need not wait for what failed here.
            for (place, copied) in arriving.going {
                copied
                    .into_iter()
                    .for_each(|copied| self.run.staging.device.forget(copied));
                arriving.shm_ring.free(place);
            }
            arriving.shm_ring.drain(arriving.next, arriving.end);
        }
        if let Some(wrong) = self.wrong.take() {
            return Err(wrong);
        }
        let mut done = Done {
            source: self.source,
            tag: self.tag,
            bytes: self.arrived,
            dtype: None,
        };
        if self.source == PROC_NULL {
            done.tag = mpi_shim_abi::ANY;
        }
        if well && self.arrived < self.room {
            let (to, zeros) = (
                self.data + self.arrived,
                Fill::Zeros(self.room - self.arrived),
            );
            // SAFETY: the end of the result, which is valid for what is in the stream.
            unsafe { self.run.staging.device.fill(self.run.up, to, zeros) }?;
        }
        Ok(done)
    }
}
