//! Short messages between ranks of a node, which go through shared memory and not through MPI
//! ([`crate::node::mailbox`]), on the communicators of all ranks that users name.
//!
//! MPI keeps the order of the messages from one rank to another on a communicator (MPI 4.0, section
//! 3.5). A longer one, or one that finds its mailbox full, still goes through MPI. So each short
//! message says how many of its sender's went through MPI before it. The receiver counts those that
//! it has got from MPI, and puts both sorts together again. It has whatever came and was not asked
//! for yet in one list, in that order.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use mpi_shim_abi::{ANY, ANY_CODE, Kind, ShimOp, ShimReceived};
use parking_lot::Mutex;

use crate::error::MpiError;
use crate::mpi::shim::{Message, Shim};
use crate::node::board::Board;
use crate::node::mailbox::{Boxes, Data, Envelope, Inbox, Mailboxes, Outbox};

/// Communicators that have them.
const COMMS: usize = 2;

/// The mailboxes of this rank, and what it knows of messages through MPI.
pub(crate) struct ShortMessages {
    /// Their communicators, by MPI's handles.
    comms: [u64; COMMS],
    board: Arc<Board>,
    /// By rank in the world; none of a rank of another node.
    outgoing: Vec<Option<Mutex<Outgoing>>>,
    incoming: Mutex<Incoming>,
}

/// To one rank.
struct Outgoing {
    outbox: Outbox,
    /// How many messages have gone through MPI, by communicator.
    through_mpi: [u64; COMMS],
}

/// From all ranks.
struct Incoming {
    /// By rank in the world.
    from: Vec<Sender>,
    /// The ranks of this node.
    here: Vec<usize>,
    /// What came before it was asked for: what is from one rank on one communicator, in the order
    /// in which it was sent.
    early: Vec<Early>,
}

#[derive(Default)]
struct Sender {
    inbox: Option<Inbox>,
    /// How many messages MPI has given, by communicator.
    through_mpi: [u64; COMMS],
}

struct Early {
    comm: usize,
    came: Came,
}

/// A message that has come.
#[derive(Debug)]
pub(crate) enum Came {
    /// Its data are still to be received.
    Mpi(Message),
    Short {
        envelope: ShimReceived,
        data: Vec<u8>,
        /// See [`Envelope::after`].
        after: u64,
    },
}

/// What a receive wants.
#[derive(Clone, Copy)]
struct Wanted {
    comm: usize,
    /// Or [`ANY`].
    source: i32,
    /// Or [`ANY`].
    tag: i32,
}

impl Came {
    /// Where it is from, and how long it is.
    pub(crate) fn envelope(&self) -> &ShimReceived {
        match self {
            Came::Mpi(message) => &message.envelope,
            Came::Short { envelope, .. } => envelope,
        }
    }
}

impl Wanted {
    #[inline]
    fn has_tag(&self, tag: i32) -> bool {
        self.tag == ANY || self.tag == tag
    }

    fn accepts(&self, early: &Early) -> bool {
        let envelope = early.came.envelope();
        self.comm == early.comm
            && (self.source == ANY || self.source == envelope.source)
            && self.has_tag(envelope.tag)
    }
}

impl ShortMessages {
    /// Over the mailboxes with the ranks of this node, in a world of `size` ranks, on the
    /// communicators with those handles. Their ranks are those of the world.
    pub(crate) fn new(
        mailboxes: Mailboxes,
        board: Arc<Board>,
        size: usize,
        comms: [u64; COMMS],
    ) -> ShortMessages {
        let mut outgoing: Vec<_> = (0..size).map(|_| None).collect();
        let mut from: Vec<_> = (0..size).map(|_| Sender::default()).collect();
        let mut here = Vec::new();
        for boxes in mailboxes.boxes() {
            let Boxes {
                rank,
                inbox,
                outbox,
            } = boxes;
            here.push(rank);
            from[rank].inbox = Some(inbox);
            outgoing[rank] = Some(Mutex::new(Outgoing {
                outbox,
                through_mpi: [0; COMMS],
            }));
        }
        ShortMessages {
            comms,
            board,
            outgoing,
            incoming: Mutex::new(Incoming {
                from,
                here,
                early: Vec::new(),
            }),
        }
    }

    /// Which of the communicators that is. All messages on it are sent and received here.
    #[inline]
    pub(crate) fn comm(&self, handle: u64) -> Option<usize> {
        self.comms.iter().position(|&comm| comm == handle)
    }

    /// Sends `data`, which `op` sends on that communicator. If that cannot be done here,
    /// `through_mpi` is called, which starts to send it, and its result returned.
    ///
    /// # Errors
    /// If that fails.
    #[inline]
    pub(crate) fn send<T>(
        &self,
        comm: usize,
        op: &ShimOp,
        data: &[u8],
        through_mpi: impl FnOnce() -> Result<T, MpiError>,
    ) -> Result<Option<T>, MpiError> {
        let rank = usize::try_from(op.dest).unwrap_or(usize::MAX);
        let Some(Some(outgoing)) = self.outgoing.get(rank) else {
            return through_mpi().map(Some);
        };
        // Held until MPI has it, so that no thread sends what it says to be behind it before.
        let mut outgoing = outgoing.lock();
        let envelope = Envelope {
            comm,
            tag: op.send_tag,
            code: op.send_code,
            after: outgoing.through_mpi[comm],
            bytes: data.len(),
        };
        let sent = match outgoing.outbox.push(&envelope, data) {
            true => Ok(None),
            false => through_mpi().map(|started| {
                outgoing.through_mpi[comm] += 1;
                Some(started)
            }),
        };
        drop(outgoing);
        self.board.wake(rank);
        sent
    }

    /// Gives `read` the next message that `op` receives on that communicator, with its data, if it
    /// is a short one and nothing else could come before it. Looks so many times without a pause.
    #[inline]
    pub(crate) fn take_next<T>(
        &self,
        comm: usize,
        op: &ShimOp,
        looks: u32,
        read: impl FnOnce(ShimReceived, Data<'_>) -> T,
    ) -> Option<T> {
        let mut incoming = self.incoming.try_lock()?;
        for _ in 0..looks {
            if let Some((source, envelope)) = incoming.next(&wanted(comm, op)) {
                let inbox = incoming.from[source].inbox.as_mut()?;
                let received = received(source, &envelope);
                return Some(inbox.take(&envelope, |data| read(received, data)));
            }
        }
        None
    }

    /// Takes the message that `op` receives on that communicator, if it is there.
    ///
    /// # Errors
    /// If MPI fails.
    pub(crate) fn take(
        &self,
        shim: &Shim,
        comm: usize,
        op: &ShimOp,
    ) -> Result<Option<Came>, MpiError> {
        // Who waits here would wait for another thread to be woken; the caller looks again.
        let Some(mut incoming) = self.incoming.try_lock() else {
            return Ok(None);
        };
        let next = ShimOp {
            source: op.source,
            recv_tag: ANY,
            recv_code: ANY_CODE,
            ..ShimOp::new(Kind::Recv, op.comm)
        };
        incoming.take(&wanted(comm, op), || shim.take(&next))
    }

    /// Whether a message of the rank that `op` receives from has come since it was last looked for.
    /// Not if another thread looks now, or has found it: then it is late by one sleep.
    pub(crate) fn has_news(&self, op: &ShimOp) -> bool {
        let Some(incoming) = self.incoming.try_lock() else {
            return false;
        };
        let has_come = |rank: usize| {
            let inbox = incoming.from.get(rank).and_then(|from| from.inbox.as_ref());
            inbox.is_some_and(|inbox| inbox.first().is_some())
        };
        match usize::try_from(op.source) {
            Ok(rank) => has_come(rank),
            Err(_) => incoming.here.iter().any(|&rank| has_come(rank)),
        }
    }
}

#[inline]
fn wanted(comm: usize, op: &ShimOp) -> Wanted {
    Wanted {
        comm,
        source: op.source,
        tag: op.recv_tag,
    }
}

#[inline]
fn received(source: usize, envelope: &Envelope) -> ShimReceived {
    ShimReceived {
        source: source as i32,
        tag: envelope.tag,
        code: envelope.code,
        bytes: envelope.bytes as i64,
    }
}

impl Incoming {
    /// The rank whose first message in its mailbox is what is wanted, and the message.
    #[inline]
    fn next(&self, wanted: &Wanted) -> Option<(usize, Envelope)> {
        let is_before = |early: &Early| {
            let source = early.came.envelope().source;
            early.comm == wanted.comm && (wanted.source == ANY || wanted.source == source)
        };
        if self.early.iter().any(is_before) {
            return None;
        }
        let first = |rank: usize| {
            let from = self.from.get(rank)?;
            let envelope = from.inbox.as_ref()?.first()?;
            let is_next = envelope.comm == wanted.comm
                && wanted.has_tag(envelope.tag)
                && envelope.after <= from.through_mpi[wanted.comm];
            is_next.then_some((rank, envelope))
        };
        match usize::try_from(wanted.source) {
            Ok(rank) => first(rank),
            Err(_) => self.here.iter().find_map(|&rank| first(rank)),
        }
    }

    /// Takes the message that is wanted, if it is there. `pull` takes the next one on the wanted
    /// communicator and from the wanted rank, whatever its tag, out of MPI's queue.
    fn take(
        &mut self,
        wanted: &Wanted,
        mut pull: impl FnMut() -> Result<Option<Message>, MpiError>,
    ) -> Result<Option<Came>, MpiError> {
        match usize::try_from(wanted.source) {
            Ok(rank) => self.drain(rank),
            Err(_) => {
                for place in 0..self.here.len() {
                    self.drain(self.here[place]);
                }
            }
        }
        loop {
            let is_ready = |early: &Early| wanted.accepts(early) && !self.is_behind(early);
            if let Some(place) = self.early.iter().position(is_ready) {
                return Ok(Some(self.early.remove(place).came));
            }
            let Some(message) = pull()? else {
                return Ok(None);
            };
            // What its sender put into the mailbox before is there by now.
            fence(Ordering::SeqCst);
            self.enter(wanted.comm, message);
        }
    }

    /// Whether MPI has not given all messages that were sent before this one.
    fn is_behind(&self, early: &Early) -> bool {
        match &early.came {
            Came::Mpi(_) => false,
            Came::Short {
                envelope, after, ..
            } => *after > self.from[envelope.source as usize].through_mpi[early.comm],
        }
    }

    /// Enters all that is in the mailbox of a rank.
    fn drain(&mut self, rank: usize) {
        let Some(inbox) = self.from.get_mut(rank).and_then(|from| from.inbox.as_mut()) else {
            return;
        };
        while let Some(envelope) = inbox.first() {
            self.early.push(Early {
                comm: envelope.comm.min(COMMS - 1),
                came: Came::Short {
                    envelope: received(rank, &envelope),
                    data: inbox.take(&envelope, |data| data.concat()),
                    after: envelope.after,
                },
            });
        }
    }

    /// Enters a message that MPI has given, before the short ones that were sent after it.
    fn enter(&mut self, comm: usize, message: Message) {
        let source = message.envelope.source;
        let rank = source as usize;
        self.drain(rank);
        let before = self.from[rank].through_mpi[comm];
        self.from[rank].through_mpi[comm] += 1;
        let comes_later = |early: &Early| match &early.came {
            Came::Mpi(_) => false,
            Came::Short {
                envelope, after, ..
            } => early.comm == comm && envelope.source == source && *after > before,
        };
        let place = self.early.iter().position(comes_later);
        let place = place.unwrap_or(self.early.len());
        let came = Came::Mpi(message);
        self.early.insert(place, Early { comm, came });
    }
}

#[cfg(test)]
mod tests;
