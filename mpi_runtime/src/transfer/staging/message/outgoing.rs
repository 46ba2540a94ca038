//! The half of a message that this rank sends.

use std::collections::VecDeque;

use mpi_shim_abi::{Kind, PROC_NULL};

use super::piece::Piece;
use super::rendezvous_header::{BY_MPI, HEADER_BYTES, RendezvousHeader};
use crate::buffer::{Buffer, ElementType};
use crate::device::{Copy, DeviceError, HostMemory};
use crate::error::Failure;
use crate::mpi::shim::Request;
use crate::node::shm_ring::ShmRing;
use crate::operation::Operation;
use crate::transfer::staging::run::{AHEAD, Coming, Run, StagingResources};
use crate::transfer::transport::Transport;

/// A chunk of what is sent, on its way down.
struct Chunk {
    coming: Coming,
    bytes: usize,
}

/// How data leave.
enum Way<'s> {
    /// In messages.
    Mpi,
    /// Through the own shared-memory ring, in its places from `first` on, before `end`: the first
    /// whose copies down have not begun, and not ended. The receiver may read them after the
    /// operation has ended here.
    ShmRing {
        shm_ring: &'s ShmRing,
        first: u64,
        begun: u64,
        filled: u64,
        end: u64,
    },
}

/// What this rank sends.
pub(super) struct Outgoing<'r, 's> {
    run: &'r Run<'s>,
    data: usize,
    pub(super) bytes: usize,
    dtype: ElementType,
    way: Way<'s>,
    /// What MPI may still be sending.
    sending: VecDeque<(Request, Option<HostMemory>)>,
    /// To be said first.
    header: Option<RendezvousHeader>,
    header_sent: bool,
    /// An empty message is one too.
    empty: bool,
    coming: VecDeque<Chunk>,
    /// Bytes whose copy down has begun.
    begun: usize,
}

impl<'r, 's> Outgoing<'r, 's> {
    pub(super) fn new(
        run: &'r Run<'s>,
        op: &Operation<'_>,
        mpi: &dyn Transport,
    ) -> Result<Self, Failure> {
        let sends = op.kind.sends() && op.dest != PROC_NULL;
        let bytes = if sends { op.send.bytes() } else { 0 };
        let mut outgoing = Outgoing {
            run,
            data: op.send.data() as usize,
            bytes,
            dtype: op.send.dtype(),
            way: Way::Mpi,
            sending: VecDeque::new(),
            header: None,
            header_sent: false,
            empty: sends && bytes == 0,
            coming: VecDeque::new(),
            begun: 0,
        };
        if bytes <= run.staging.chunk {
            return Ok(outgoing);
        }
        let mut header = RendezvousHeader {
            bytes,
            sender: BY_MPI,
            place: 0,
        };
        let staging: &'s StagingResources = run.staging;
        if let Some(shm_rings) = &staging.shm_rings
            && let Some(shm_ring) = shm_rings.to(mpi.world_rank(op.dest)?)
        {
            shm_ring.pin(&*staging.device);
            let first = shm_rings.reserve(shm_ring.places(bytes));
            header.sender = shm_rings.rank() as u32;
            header.place = first;
            outgoing.way = Way::ShmRing {
                shm_ring,
                first,
                begun: first,
                filled: first,
                end: first + shm_ring.places(bytes),
            };
        }
        outgoing.header = Some(header);
        Ok(outgoing)
    }

    pub(super) fn goes_on(&self) -> bool {
        let begins = self.empty || self.begun < self.bytes;
        begins || !self.coming.is_empty() || !self.sending.is_empty()
    }

    /// The message, once it is there, if it is one piece.
    pub(super) fn whole(&mut self) -> Result<Piece, Failure> {
        self.empty = false;
        let (begun, rows) = (self.bytes, [(self.data, self.bytes)]);
        let rows = if begun > 0 { &rows[..] } else { &[] };
        let coming = self.run.come(rows)?;
        self.begun = begun;
        Ok(Piece {
            memory: self.run.arrive(coming)?,
            elements: (begun / self.dtype.size()) as i64,
            dtype: self.dtype,
        })
    }

    /// Does what can be done now; whether that was anything.
    pub(super) fn advance(
        &mut self,
        op: &Operation<'_>,
        mpi: &mut dyn Transport,
    ) -> Result<bool, Failure> {
        let mut moved = self.end_messages(mpi)? | self.begin_copies()?;
        // Copies begin before the rendezvous header goes out.
        if let Some(header) = self.header.take() {
            let memory = self.run.memory(HEADER_BYTES)?;
            if let Some(memory) = &memory {
                let text = header.text();
                let to = memory.data.as_ptr();
                // SAFETY: memory of the pool's of at least that size.
                unsafe { to.copy_from_nonoverlapping(text.as_ptr(), text.len()) };
            }
            self.send(op, mpi, memory, HEADER_BYTES, ElementType::U8)?;
            self.header_sent = true;
            moved = true;
        }
        if std::mem::take(&mut self.empty) {
            self.send(op, mpi, None, 0, self.dtype)?;
            moved = true;
        }
        while let Some(chunk) = self.coming.front() {
            if let Some(copied) = &chunk.coming.copied
                && !self.run.staging.device.has_passed(copied)?
            {
                break;
            }
            let Some(Chunk { coming, bytes }) = self.coming.pop_front() else {
                break;
            };
            moved = true;
            if let Some(copied) = coming.copied {
                self.run.staging.device.forget(copied);
            }
            if let Way::ShmRing {
                shm_ring, filled, ..
            } = &mut self.way
            {
                shm_ring.fill(*filled);
                *filled += 1;
            } else {
                self.send(op, mpi, coming.memory, bytes, self.dtype)?;
            }
        }
        Ok(moved)
    }

    /// Starts to copy chunks down, where there is room for them.
    fn begin_copies(&mut self) -> Result<bool, DeviceError> {
        let (run, before) = (self.run, self.begun);
        while self.begun < self.bytes {
            let left = self.bytes - self.begun;
            let from = self.data + self.begun;
            let (coming, bytes) = match &mut self.way {
                Way::Mpi => {
                    if self.coming.len() + self.sending.len() > AHEAD + 1 {
                        break;
                    }
                    let bytes = left.min(run.staging.chunk);
                    (run.come(&[(from, bytes)])?, bytes)
                }
                Way::ShmRing {
                    shm_ring, begun, ..
                } => {
                    if !shm_ring.is_free(*begun) {
                        break;
                    }
                    let (bytes, to) = (left.min(shm_ring.part(self.bytes)), shm_ring.data(*begun));
                    let device = &run.staging.device;
                    // SAFETY: the operand is valid while the operation runs, and the slot is this
                    // rank's until `fill`, which comes after the event.
                    unsafe { device.copy(run.down, Copy::Down { to, from }, bytes) }?;
                    *begun += 1;
                    let coming = Coming {
                        memory: None,
                        copied: Some(device.record(run.down)?),
                    };
                    (coming, bytes)
                }
            };
            self.coming.push_back(Chunk { coming, bytes });
            self.begun += bytes;
        }
        Ok(self.begun > before)
    }

    fn send(
        &mut self,
        op: &Operation<'_>,
        mpi: &mut dyn Transport,
        memory: Option<HostMemory>,
        bytes: usize,
        dtype: ElementType,
    ) -> Result<(), Failure> {
        let piece = Piece {
            memory,
            elements: (bytes / dtype.size()) as i64,
            dtype,
        };
        let shape = [piece.elements];
        let request = mpi.start_send(&Operation {
            kind: Kind::Send,
            send: piece.buffer(&shape),
            recv: Buffer::NONE,
            status: 0,
            ..*op
        })?;
        self.sending.push_back((request, piece.memory));
        Ok(())
    }

    /// Takes the memory back that MPI has sent; whether there was any.
    fn end_messages(&mut self, mpi: &mut dyn Transport) -> Result<bool, Failure> {
        let mut moved = false;
        while let Some((request, _)) = self.sending.front_mut() {
            if !mpi.is_sent(request)? {
                break;
            }
            moved = true;
            if let Some((_, memory)) = self.sending.pop_front() {
                self.run.put_back(memory);
            }
        }
        Ok(moved)
    }

    /// What was copied down and not sent. What MPI may still be sending stays where it is.
    pub(super) fn give_up(self) {
        let staging = self.run.staging;
        if let (
            Way::ShmRing {
                first, filled, end, ..
            },
            Some(shm_rings),
        ) = (&self.way, &staging.shm_rings)
            && filled < end
        {
            shm_rings.give_up(*first, *end, self.header_sent);
        }
        for Chunk { coming, .. } in self.coming {
            if let Some(copied) = coming.copied {
                self.run.staging.device.forget(copied);
            }
            self.run.give_back(coming.memory, self.run.down);
        }
    }
}
