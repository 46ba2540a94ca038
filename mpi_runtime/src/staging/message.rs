//! Messages in chunks.
//!
//! One of at most a chunk is one message, as without staging. A longer one is announced: a message of
//! its own with the length comes first, and pins the sender and the tag of the chunks that follow. So
//! both sides must have device memory and the same size of a chunk; whoever meets an announcement that
//! does not fit fails, and nothing is taken for something else. Between ranks that share memory the data
//! go through the sender's outbox, and MPI has the announcement alone.
//!
//! What is sent and what is received move on independently of each other: what this rank receives may
//! depend on what becomes of the message that it sends.

use std::collections::VecDeque;

use mpi_shim_abi::{Kind, PROC_NULL};

use super::outbox::Outbox;
use super::{AHEAD, Coming, Done, Mpi, Run, Staging};
use crate::device::{Copy, DeviceError, Event, Fill, HostMemory};
use crate::operation::{Buffer, ElementType, Operation};
use crate::shim::Request;
use crate::split::pause;

/// An announcement begins with this. Of arrays only one of 25 bytes that begin so could be taken for one.
const MAGIC: [u8; 5] = *b"MPIc\x02";
/// Then come the message's bytes, and the sender's rank in the world and the place in its outbox.
pub(super) const ANNOUNCEMENT: usize =
    MAGIC.len() + size_of::<u64>() + size_of::<u32>() + size_of::<u64>();
/// In place of a rank: the data come as messages.
const BY_MPI: u32 = u32::MAX;

/// What is said of a message before it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Announcement {
    pub(super) bytes: usize,
    sender: u32,
    place: u64,
}

impl Announcement {
    fn text(self) -> [u8; ANNOUNCEMENT] {
        let bytes = (self.bytes as u64).to_le_bytes();
        let (sender, place) = (self.sender.to_le_bytes(), self.place.to_le_bytes());
        let all = MAGIC.into_iter().chain(bytes).chain(sender).chain(place);
        let mut text = [0; ANNOUNCEMENT];
        text.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        text
    }

    /// The announcement that a message in `memory` is, if it is one.
    pub(super) fn read(memory: &[u8]) -> Option<Announcement> {
        let text = memory.strip_prefix(&MAGIC)?;
        let (bytes, text) = text.split_first_chunk()?;
        let (sender, text) = text.split_first_chunk()?;
        Some(Announcement {
            bytes: usize::try_from(u64::from_le_bytes(*bytes)).ok()?,
            sender: u32::from_le_bytes(*sender),
            place: u64::from_le_bytes(text.try_into().ok()?),
        })
    }
}

impl Announcement {
    /// Where the message comes from, and its places: from the first to behind the last. None if it comes
    /// by MPI.
    fn slots<'s>(&self, staging: &'s Staging) -> Option<Result<(&'s Outbox, u64, u64), ()>> {
        if self.sender == BY_MPI {
            return None;
        }
        let outboxes = staging.outboxes.as_ref();
        let outbox = outboxes.and_then(|outboxes| outboxes.of(self.sender as usize));
        Some(outbox.ok_or(()).map(|outbox| {
            let end = self.place + outbox.places(self.bytes);
            (outbox, self.place, end)
        }))
    }

    /// Nobody receives the message.
    pub(super) fn refuse(&self, staging: &Staging) {
        if let Some(Ok((outbox, first, end))) = self.slots(staging) {
            outbox.drain(first, end);
        }
    }
}

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

/// A chunk of what is sent, on its way down.
struct Chunk {
    coming: Coming,
    bytes: usize,
}

/// How data leave.
enum Way<'s> {
    /// In messages.
    Mpi,
    /// Through the own outbox, in its places from `first` on, before `end`: the first whose copies down
    /// have not begun, and not ended. The receiver may read them after the operation has ended here.
    Outbox {
        outbox: &'s Outbox,
        first: u64,
        begun: u64,
        filled: u64,
        end: u64,
    },
}

/// What this rank sends.
struct Outgoing<'r, 's> {
    run: &'r Run<'s>,
    data: usize,
    bytes: usize,
    dtype: ElementType,
    way: Way<'s>,
    /// What MPI may still be sending.
    sending: VecDeque<(Request, Option<HostMemory>)>,
    /// To be said first.
    announcement: Option<Announcement>,
    announced: bool,
    /// An empty message is one too.
    empty: bool,
    coming: VecDeque<Chunk>,
    /// Bytes whose copy down has begun.
    begun: usize,
}

impl<'r, 's> Outgoing<'r, 's> {
    fn new(run: &'r Run<'s>, op: &Operation<'_>, mpi: &dyn Mpi) -> Result<Self, String> {
        let sends = op.kind != Kind::Recv && op.dest != PROC_NULL;
        let bytes = if sends { op.send.bytes() } else { 0 };
        let mut outgoing = Outgoing {
            run,
            data: op.send.data as usize,
            bytes,
            dtype: op.send.dtype,
            way: Way::Mpi,
            sending: VecDeque::new(),
            announcement: None,
            announced: false,
            empty: sends && bytes == 0,
            coming: VecDeque::new(),
            begun: 0,
        };
        if bytes <= run.staging.chunk {
            return Ok(outgoing);
        }
        let mut announcement = Announcement {
            bytes,
            sender: BY_MPI,
            place: 0,
        };
        let staging: &'s Staging = run.staging;
        if let Some(outboxes) = &staging.outboxes
            && let Some(outbox) = outboxes.to(mpi.world_rank(op.dest)?)
        {
            outbox.pin(&*staging.device);
            let first = outboxes.reserve(outbox.places(bytes));
            announcement.sender = outboxes.rank() as u32;
            announcement.place = first;
            outgoing.way = Way::Outbox {
                outbox,
                first,
                begun: first,
                filled: first,
                end: first + outbox.places(bytes),
            };
        }
        outgoing.announcement = Some(announcement);
        Ok(outgoing)
    }

    fn goes_on(&self) -> bool {
        let begins = self.empty || self.begun < self.bytes;
        begins || !self.coming.is_empty() || !self.sending.is_empty()
    }

    /// The message, once it is there, if it is one piece.
    fn whole(&mut self) -> Result<Piece, String> {
        self.empty = false;
        let (begun, rows) = (self.bytes, [(self.data, self.bytes)]);
        let rows = if begun > 0 { &rows[..] } else { &[] };
        let coming = self.run.come(rows).map_err(said)?;
        self.begun = begun;
        Ok(Piece {
            memory: self.run.arrive(coming).map_err(said)?,
            elements: (begun / self.dtype.size()) as i64,
            dtype: self.dtype,
        })
    }

    /// Does what can be done now; whether that was anything.
    fn advance(&mut self, op: &Operation<'_>, mpi: &mut dyn Mpi) -> Result<bool, String> {
        let mut moved = self.end_messages(mpi)? | self.begin_copies().map_err(said)?;
        // Copies begin before the announcement goes out.
        if let Some(announcement) = self.announcement.take() {
            let memory = self.run.memory(ANNOUNCEMENT).map_err(said)?;
            if let Some(memory) = &memory {
                let text = announcement.text();
                let to = memory.data.as_ptr();
                // SAFETY: memory of the pool's of at least that size.
                unsafe { to.copy_from_nonoverlapping(text.as_ptr(), text.len()) };
            }
            self.send(op, mpi, memory, ANNOUNCEMENT, ElementType::U8)?;
            self.announced = true;
            moved = true;
        }
        if std::mem::take(&mut self.empty) {
            self.send(op, mpi, None, 0, self.dtype)?;
            moved = true;
        }
        while let Some(chunk) = self.coming.front() {
            if let Some(copied) = &chunk.coming.copied
                && !self.run.staging.device.has_passed(copied).map_err(said)?
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
            if let Way::Outbox { outbox, filled, .. } = &mut self.way {
                outbox.fill(*filled);
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
                Way::Outbox { outbox, begun, .. } => {
                    if !outbox.is_free(*begun) {
                        break;
                    }
                    let (bytes, to) = (left.min(outbox.part(self.bytes)), outbox.data(*begun));
                    let device = &run.staging.device;
                    // SAFETY: the operand is valid while the operation runs, and the slot is this rank's
                    // until `fill`, which comes after the event.
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
        mpi: &mut dyn Mpi,
        memory: Option<HostMemory>,
        bytes: usize,
        dtype: ElementType,
    ) -> Result<(), String> {
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
    fn end_messages(&mut self, mpi: &mut dyn Mpi) -> Result<bool, String> {
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
    fn give_up(self) {
        let staging = self.run.staging;
        if let (
            Way::Outbox {
                first, filled, end, ..
            },
            Some(outboxes),
        ) = (&self.way, &staging.outboxes)
            && filled < end
        {
            outboxes.give_up(*first, *end, self.announced);
        }
        for Chunk { coming, .. } in self.coming {
            if let Some(copied) = coming.copied {
                self.run.staging.device.forget(copied);
            }
            self.run.give_back(coming.memory, self.run.down);
        }
    }
}

/// How data arrive, once that is known.
struct Arriving<'s> {
    outbox: &'s Outbox,
    /// The next place to be copied up, those before it that still are, and the end.
    next: u64,
    end: u64,
    going: VecDeque<(u64, Option<Event>)>,
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
    /// For the next message.
    waiting: Option<Piece>,
    /// In place of messages.
    arriving: Option<Arriving<'s>>,
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
            waiting: None,
            arriving: None,
            wrong: None,
        }
    }

    fn goes_on(&self) -> bool {
        self.open
    }

    /// Does what can be done now; whether that was anything.
    fn advance(&mut self, op: &Operation<'_>, mpi: &mut dyn Mpi) -> Result<bool, String> {
        if !self.open {
            return Ok(false);
        }
        if self.arriving.is_some() {
            let moved = self.read_slots().map_err(said)?;
            let gone = |a: &Arriving<'_>| a.next < a.end && a.outbox.is_broken(a.next);
            if !moved && self.arriving.as_ref().is_some_and(gone) {
                return Err(format!(
                    "rank {} has failed while it was sending this message",
                    self.source
                ));
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
        let (outbox, device) = (arriving.outbox, &self.run.staging.device);
        let mut moved = false;
        while arriving.next < arriving.end && outbox.is_filled(arriving.next) {
            let length = self.length.unwrap_or(0);
            let bytes = (length - self.arrived).min(outbox.part(length));
            let mut copied = None;
            if self.wrong.is_none() {
                let to = self.data + self.arrived;
                let from = outbox.data(arriving.next).cast_const();
                // SAFETY: the result holds the message, which was checked, and is valid while the
                // operation runs; the slot is this rank's until `free`, which comes after the event.
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
            outbox.free(*place);
            moved = true;
            if let Some((_, Some(copied))) = arriving.going.pop_front() {
                device.forget(copied);
            }
        }
        self.open = arriving.next < arriving.end || !arriving.going.is_empty();
        Ok(moved)
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
            memory: memory.map_err(said)?,
            elements: elements as i64,
            dtype,
        })
    }

    /// A message has come.
    fn take(&mut self, piece: Piece, done: Done) -> Result<(), String> {
        let begins = self.length.is_none() && done.bytes == ANNOUNCEMENT;
        let said = Announcement::read(piece.bytes(done.bytes)).filter(|_| begins);
        let wrong = match said {
            Some(said) => self.announced(said, done),
            None => self.data(done),
        };
        self.wrong = self.wrong.take().or(wrong.err());
        if said.is_some() || self.wrong.is_some() {
            self.run.put_back(piece.memory);
            return Ok(());
        }
        let place = self.data + self.arrived - done.bytes;
        let gone = self.run.go(piece.memory, &[(place, done.bytes)]);
        gone.map_err(|error| error.to_string())
    }

    fn announced(&mut self, said: Announcement, done: Done) -> Result<(), String> {
        (self.source, self.tag) = (done.source, done.tag);
        self.length = Some(said.bytes);
        self.open = said.bytes > 0;
        let staging: &'s Staging = self.run.staging;
        match said.slots(staging) {
            Some(Ok((outbox, next, end))) => {
                outbox.pin(&*staging.device);
                self.arriving = Some(Arriving {
                    outbox,
                    next,
                    end,
                    going: VecDeque::new(),
                });
            }
            Some(Err(())) => {
                self.open = false;
                return Err(format!(
                    "the message from rank {} comes through memory of this node that this rank has not \
                     mapped",
                    done.source
                ));
            }
            None => {}
        }
        self.fits(said.bytes, done)
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
        if let Some(piece) = self.waiting.take() {
            self.run.put_back(piece.memory);
        }
        if let Some(arriving) = self.arriving.take().filter(|_| !well) {
            // The sender need not wait for what failed here.
            for (place, copied) in arriving.going {
                copied
                    .into_iter()
                    .for_each(|copied| self.run.staging.device.forget(copied));
                arriving.outbox.free(place);
            }
            arriving.outbox.drain(arriving.next, arriving.end);
        }
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
        if well && self.arrived < self.room {
            let (to, zeros) = (
                self.data + self.arrived,
                Fill::Zeros(self.room - self.arrived),
            );
            // SAFETY: the end of the result, which is valid for what is in the stream.
            unsafe { self.run.staging.device.fill(self.run.up, to, zeros) }.map_err(said)?;
        }
        Ok(done)
    }
}
