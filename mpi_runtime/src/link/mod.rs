//! The link: connections between the nodes of a job, over which ranks hear what MPI does not tell:
//! who has ended, and, when asked, what the ranks of other nodes do.
//!
//! It is a star. Rank 0 is the [`hub`], and one rank of every other node, the lowest that runs,
//! speaks for its node. If that rank ends, the next one connects. What is heard is shown on the
//! board of the node, so that all its ranks know.

pub(crate) mod gone;
mod hub;
pub(crate) mod invitation;
mod message;
mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::link::gone::{Gone, GoneTable};
use crate::link::hub::Hub;
use crate::link::invitation::Invitation;
use crate::link::message::Message;
use crate::link::socket::Connection;
use crate::node::board::Board;

/// How long it may take to join, and to try one address.
const JOIN: Duration = Duration::from_millis(1500);
const TRY: Duration = Duration::from_millis(400);
/// What waits for less than this is not told, nor a time that the hub can tell so well itself.
const LONG: Duration = Duration::from_millis(500);
/// Between two attempts of a rank to take the place of one that has ended.
const AGAIN: Duration = Duration::from_secs(1);

/// This rank's part of the link.
pub(crate) struct Link {
    rank: usize,
    /// The ranks of this node.
    board: Option<Arc<Board>>,
    gone: GoneTable,
    role: Role,
    /// The last question of the hub's.
    question: AtomicU64,
    /// An operation somewhere waits, as far as this rank has heard.
    waits: AtomicBool,
    /// This rank has come to its end.
    left: AtomicBool,
}

enum Role {
    Hub(Hub),
    Spoke(Mutex<Spoke>),
}

/// What a rank that is not the hub has.
#[derive(Default)]
struct Spoke {
    invitation: Invitation,
    connection: Option<Arc<Connection>>,
    tried: Option<Instant>,
    /// How long the node's longest operation had waited when that was told, and when.
    told: Option<(Duration, Instant)>,
}

impl Link {
    /// The link of `rank` in a world of `size` ranks, without connections.
    pub(crate) fn new(rank: usize, size: usize, board: Option<Arc<Board>>) -> Arc<Link> {
        let role = match rank {
            0 => Role::Hub(Hub::default()),
            _ => Role::Spoke(Mutex::default()),
        };
        Arc::new(Link {
            rank,
            board,
            gone: GoneTable::new(size),
            role,
            question: AtomicU64::new(0),
            waits: AtomicBool::new(false),
            left: AtomicBool::new(false),
        })
    }

    /// Of rank 0: listens.
    ///
    /// # Errors
    /// If it cannot.
    pub(crate) fn listen(self: &Arc<Link>) -> io::Result<Invitation> {
        Hub::listen(self)
    }

    /// Of the others: how to join. The lowest rank of a node does so now, and others may later.
    ///
    /// # Errors
    /// If this rank has to join now and cannot.
    pub(crate) fn accept(self: &Arc<Link>, invitation: Invitation) -> io::Result<()> {
        let Role::Spoke(spoke) = &self.role else {
            return Ok(());
        };
        let mut spoke = spoke.lock();
        spoke.invitation = invitation;
        match self.ranks().first() {
            Some(&first) if first == self.rank => self.join(&mut spoke),
            _ => Ok(()),
        }
    }

    /// Why a rank of another node does nothing any more, if so.
    pub(crate) fn gone(&self, rank: usize) -> Option<Gone> {
        let own = self.gone.get(rank);
        own.or_else(|| Gone::of(self.board.as_ref()?.gone_elsewhere(rank)))
    }

    /// How many ranks are known to this one to have ended before their programs did.
    pub(crate) fn missing(&self) -> usize {
        self.gone.missing()
    }

    /// Whether this is the rank that asks all others.
    pub(crate) fn is_hub(&self) -> bool {
        self.hub().is_some()
    }

    /// Whether this rank has a connection to the hub, or is it.
    pub(crate) fn is_up(&self) -> bool {
        match &self.role {
            Role::Hub(_) => true,
            Role::Spoke(spoke) => spoke.lock().connection.is_some(),
        }
    }

    /// Of a rank that speaks for its node: connects, if there is no connection.
    pub(crate) fn tend(self: &Arc<Link>) {
        match &self.role {
            Role::Hub(hub) => {
                for rank in hub.lost() {
                    self.note_and_pass_on(rank, Gone::Lost, usize::MAX);
                }
            }
            Role::Spoke(spoke) => {
                let mut spoke = spoke.lock();
                let may = spoke.tried.is_none_or(|tried| tried.elapsed() > AGAIN);
                if spoke.connection.is_none() && may && self.gone(0).is_none() {
                    // If it fails it is tried again.
                    let _ = self.join(&mut spoke);
                    spoke.tried = Some(Instant::now());
                }
            }
        }
    }

    /// Tells everybody that a rank of this node has gone.
    pub(crate) fn tell_gone(&self, rank: usize, gone: Gone) {
        if !self.gone.note(rank, gone) {
            return;
        }
        let rank = rank as u32;
        self.send(&Message::Gone { rank, gone });
    }

    /// Tells the hub how long an operation of this node has waited; the hub tells everybody whether
    /// one waits somewhere.
    pub(crate) fn tell_waiting(&self, longest: Duration) {
        let spoke = match &self.role {
            Role::Spoke(spoke) => spoke,
            Role::Hub(hub) => {
                let longest = longest.max(hub.longest());
                if self.waits.swap(longest >= LONG, Ordering::SeqCst) != (longest >= LONG) {
                    hub.send_all(&waiting(longest), usize::MAX);
                }
                return;
            }
        };
        let mut spoke = spoke.lock();
        let longest = if longest < LONG {
            Duration::ZERO
        } else {
            longest
        };
        let expected = spoke
            .told
            .map_or(Duration::ZERO, |(time, since)| time + since.elapsed());
        let Some(connection) = &spoke.connection else {
            return;
        };
        if longest.abs_diff(expected) < LONG {
            return;
        }
        connection.send(&waiting(longest));
        spoke.told = (!longest.is_zero()).then(|| (longest, Instant::now()));
    }

    /// How long an operation of another node has waited, as far as this rank knows.
    pub(crate) fn longest_elsewhere(&self) -> Duration {
        self.hub().map_or(Duration::ZERO, Hub::longest)
    }

    /// Whether an operation of another node waits for long while this rank has not come to its end.
    pub(crate) fn is_awaited(&self) -> bool {
        let shown = || {
            self.board
                .as_ref()
                .is_some_and(|board| board.waits_elsewhere())
        };
        !self.left.load(Ordering::SeqCst) && (self.waits.load(Ordering::SeqCst) || shown())
    }

    /// Of the hub: asks the ranks of all nodes what they do.
    pub(crate) fn ask(&self) {
        if let Some(hub) = self.hub() {
            hub.ask();
        }
    }

    /// What a rank of another node has answered to the last question.
    pub(crate) fn answered(&self, rank: usize) -> Option<String> {
        self.hub()?.answered(rank)
    }

    /// Whether a rank of another node may answer.
    pub(crate) fn hears(&self, rank: usize) -> bool {
        self.hub().is_some_and(|hub| hub.hears(rank))
    }

    /// The hub's last question to this rank; 0 if there was none.
    pub(crate) fn question(&self) -> u64 {
        self.question.load(Ordering::SeqCst)
    }

    /// Answers it for a rank of this node.
    pub(crate) fn answer(&self, question: u64, rank: usize, state: String) {
        let rank = rank as u32;
        self.send(&Message::Answer {
            question,
            rank,
            state,
        });
    }

    /// This process may end from now on, and its rank has not died then. If the ranks that spoke
    /// for this node have gone, others hear it from this one.
    pub(crate) fn leave(self: &Arc<Link>) {
        let board = self.board.as_ref();
        let speaks = |&rank: &usize| board.is_none_or(|board| board.ended(rank).is_none());
        let lower = self.ranks().into_iter().filter(|&rank| rank < self.rank);
        if !lower.into_iter().any(|rank| speaks(&rank)) {
            self.tend();
        }
        self.left.store(true, Ordering::SeqCst);
        self.send(&Message::Bye);
    }

    /// The ranks of this node, in order.
    fn ranks(&self) -> Vec<usize> {
        let all = 0..self.gone.size();
        all.filter(|&rank| self.is_here(rank)).collect()
    }

    fn is_here(&self, rank: usize) -> bool {
        let on_board = self.board.as_ref().is_some_and(|board| board.sees(rank));
        on_board || rank == self.rank
    }

    fn hub(&self) -> Option<&Hub> {
        match &self.role {
            Role::Hub(hub) => Some(hub),
            Role::Spoke(_) => None,
        }
    }

    fn send(&self, message: &Message) {
        match &self.role {
            Role::Hub(hub) => hub.send_all(message, usize::MAX),
            Role::Spoke(spoke) => {
                let connection = spoke.lock().connection.clone();
                if let Some(connection) = connection {
                    connection.send(message);
                }
            }
        }
    }

    /// What somebody who joins has to hear.
    fn news(&self) -> Vec<Message> {
        let gone = self.gone.all().map(|(rank, gone)| {
            let rank = rank as u32;
            Message::Gone { rank, gone }
        });
        let bye = self.left.load(Ordering::SeqCst).then_some(Message::Bye);
        let waits = self.is_hub() && self.waits.load(Ordering::SeqCst);
        gone.chain(bye)
            .chain(waits.then(|| waiting(LONG)))
            .collect()
    }

    /// Notes what was heard, shows it to this node, and tells it to the others but `from`.
    fn note_and_pass_on(&self, rank: usize, gone: Gone, from: usize) {
        if !self.gone.note(rank, gone) {
            return;
        }
        if let Some(board) = self.board.as_ref().filter(|board| !board.sees(rank)) {
            board.show_gone_elsewhere(rank, gone.number());
        }
        if let Some(hub) = self.hub() {
            let rank = rank as u32;
            hub.send_all(&Message::Gone { rank, gone }, from);
        }
    }

    fn hear_of_waiting(&self, waits: bool) {
        self.waits.store(waits, Ordering::SeqCst);
        if let Some(board) = &self.board {
            board.show_waits_elsewhere(waits);
        }
    }

    /// Connects to the hub, at the first of its addresses where it is.
    fn join(self: &Arc<Link>, spoke: &mut Spoke) -> io::Result<()> {
        let deadline = Instant::now() + JOIN;
        let mut error = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for place in spoke.invitation.places() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            match self.connect(&spoke.invitation, place, TRY.min(left)) {
                Ok(stream) => return self.begin(spoke, stream),
                Err(reason) => error = reason,
            }
        }
        Err(error)
    }

    /// Connects there, and makes sure that it is the hub.
    fn connect(
        &self,
        invitation: &Invitation,
        place: SocketAddr,
        limit: Duration,
    ) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&place, limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        stream.set_nodelay(true)?;
        let ranks = self.ranks().into_iter().map(|rank| rank as u32);
        let hello = Message::Hello {
            cookie: invitation.of_rank,
            rank: self.rank as u32,
            ranks: ranks.collect(),
        };
        hello.write(&mut stream)?;
        let cookie = invitation.of_hub;
        if Message::read(&mut stream)? != (Message::Welcome { cookie }) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Message::Ready.write(&mut stream)?;
        Ok(stream)
    }

    fn begin(self: &Arc<Link>, spoke: &mut Spoke, stream: TcpStream) -> io::Result<()> {
        let connection = Arc::new(Connection::new(stream)?);
        for message in self.news() {
            connection.send(&message);
        }
        spoke.connection = Some(connection.clone());
        spoke.told = None;
        let link = self.clone();
        hub::spawn("mpi_cuda link", move || link.listen_to_hub(&connection))
    }

    /// Reads what the hub says, until it is gone.
    fn listen_to_hub(self: &Arc<Link>, connection: &Connection) {
        let mut bye = false;
        let end = loop {
            match connection.read() {
                Ok(Message::Bye) => bye = true,
                Ok(Message::Gone { rank, gone }) => {
                    self.note_and_pass_on(rank as usize, gone, usize::MAX);
                }
                Ok(Message::Waiting { milliseconds }) => self.hear_of_waiting(milliseconds != 0),
                Ok(Message::Question { number }) => self.question.store(number, Ordering::SeqCst),
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        let Role::Spoke(spoke) = &self.role else {
            return;
        };
        let mut spoke = spoke.lock();
        spoke.connection = None;
        self.hear_of_waiting(false);
        // A connection may break while both sides live.
        if !bye && self.join(&mut spoke).is_ok() {
            return;
        }
        let gone = if bye {
            Gone::Left
        } else {
            socket::meaning(&end)
        };
        self.note_and_pass_on(0, gone, usize::MAX);
    }
}

fn waiting(time: Duration) -> Message {
    Message::Waiting {
        milliseconds: if time < LONG {
            0
        } else {
            time.as_millis() as u64
        },
    }
}
