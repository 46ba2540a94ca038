//! A spoke: a rank that is not the hub, and holds a connection to it if it speaks for its node.

#![forbid(unsafe_code)]

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::link::gone::Gone;
use crate::link::heard::Heard;
use crate::link::invitation::Invitation;
use crate::link::message::{LONG, Message};
use crate::link::socket::{Connection, spawn};

/// How long it may take to join, and to try one address. The hub waits longer than that for a rank
/// whose connection broke.
pub(super) const JOIN: Duration = Duration::from_millis(1500);
pub(super) const TRY: Duration = Duration::from_millis(400);
/// Between two rounds through all addresses.
const ROUND: Duration = Duration::from_millis(50);
/// From one attempt to the next; it doubles up to the second, since the watch waits meanwhile.
const AGAIN: Duration = Duration::from_secs(1);
const SELDOM: Duration = Duration::from_secs(16);

/// Such a rank.
pub(super) struct Spoke {
    heard: Arc<Heard>,
    pub(super) contact: Mutex<Contact>,
}

/// Its way to the hub.
#[derive(Default)]
pub(super) struct Contact {
    pub(super) invitation: Invitation,
    pub(super) connection: Option<Arc<Connection>>,
    /// Where the hub was found last.
    pub(super) found: Option<SocketAddr>,
    /// When it was tried last to join without success, and how long there is no other attempt.
    tried: Option<(Instant, Duration)>,
    /// How long the node's longest operation had waited when that was told, and when.
    told: Option<(Duration, Instant)>,
}

impl Contact {
    /// Whether nobody listens any more where the hub was found. A hub that ends without having read
    /// all that was sent to it resets the connection, as a network may do; this tells them apart.
    fn is_refused(&self) -> bool {
        let tried = self
            .found
            .map(|place| TcpStream::connect_timeout(&place, TRY));
        matches!(tried, Some(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused)
    }
}

impl Spoke {
    /// Without a connection.
    pub(super) fn new(heard: Arc<Heard>) -> Arc<Spoke> {
        let contact = Mutex::default();
        Arc::new(Spoke { heard, contact })
    }

    /// Hears how to join, and does so if it is the lowest rank of its node.
    pub(super) fn accept(self: &Arc<Spoke>, invitation: Invitation) -> io::Result<()> {
        let mut contact = self.contact.lock();
        contact.invitation = invitation;
        match self.heard.ranks().first() {
            Some(&first) if first == self.heard.rank => self.join(&mut contact),
            _ => Ok(()),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.contact.lock().connection.is_some()
    }

    pub(super) fn send(&self, message: &Message) {
        let connection = self.contact.lock().connection.clone();
        if let Some(connection) = connection {
            connection.send(message);
        }
    }

    /// Connects, if there is no connection, the hub has not ended, and the last attempt was not
    /// just now.
    pub(super) fn tend(self: &Arc<Spoke>) {
        let mut contact = self.contact.lock();
        let ended = !matches!(self.heard.gone(0), None | Some(Gone::Lost));
        let tried = contact.tried;
        let soon = tried.is_some_and(|(tried, pause)| tried.elapsed() <= pause);
        if contact.connection.is_some() || ended || soon {
            return;
        }
        contact.tried = self.join(&mut contact).err().map(|_| {
            let pause = tried.map_or(AGAIN, |(_, pause)| SELDOM.min(2 * pause));
            (Instant::now(), pause)
        });
    }

    /// Tells the hub how long an operation of this node has waited, if it does not know.
    pub(super) fn tell_waiting(&self, longest: Duration) {
        let mut contact = self.contact.lock();
        let longest = if longest < LONG {
            Duration::ZERO
        } else {
            longest
        };
        let expected = contact
            .told
            .map_or(Duration::ZERO, |(time, since)| time + since.elapsed());
        let Some(connection) = &contact.connection else {
            return;
        };
        if longest.abs_diff(expected) < LONG {
            return;
        }
        connection.send(&Message::waiting(longest));
        contact.told = (!longest.is_zero()).then(|| (longest, Instant::now()));
    }

    /// Connects to the hub, at the first of its addresses where it is. All are tried in rounds: the
    /// hub may have no room for one more at a moment, and a network may lose a packet.
    fn join(self: &Arc<Spoke>, contact: &mut Contact) -> io::Result<()> {
        let deadline = Instant::now() + JOIN;
        let mut error = io::Error::from(io::ErrorKind::AddrNotAvailable);
        let mut places = contact.invitation.places();
        places.sort_by_key(|&place| contact.found != Some(place));
        // So that a round comes to the last one.
        let limit = TRY.min(JOIN / places.len().max(1) as u32);
        while !places.is_empty() {
            for &place in &places {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(error);
                }
                match self.connect(&contact.invitation, place, limit.min(left), TRY.min(left)) {
                    Ok(connection) => {
                        contact.found = Some(place);
                        return self.begin(contact, connection);
                    }
                    Err(reason) if left > TRY => error = reason,
                    // It had less time than it may need.
                    Err(_) => {}
                }
            }
            sleep(ROUND);
        }
        Err(error)
    }

    /// Connects there within `limit`, and makes sure within `handshake` that it is the hub.
    fn connect(
        &self,
        invitation: &Invitation,
        place: SocketAddr,
        limit: Duration,
        handshake: Duration,
    ) -> io::Result<Connection> {
        let connection = Connection::new(TcpStream::connect_timeout(&place, limit)?)?;
        let ranks = self.heard.ranks().into_iter().map(|rank| rank as u32);
        let hello = Message::Hello {
            cookie: invitation.of_rank,
            rank: self.heard.rank as u32,
            ranks: ranks.collect(),
        };
        let cookie = invitation.of_hub;
        connection.shake_hands(Instant::now() + handshake, |stream| {
            hello.write(stream)?;
            match Message::read(stream)? == (Message::Welcome { cookie }) {
                true => Ok(()),
                false => Err(io::ErrorKind::PermissionDenied.into()),
            }
        })?;
        Ok(connection)
    }

    fn begin(self: &Arc<Spoke>, contact: &mut Contact, connection: Connection) -> io::Result<()> {
        let connection = Arc::new(connection);
        let (own, to_read) = (self.clone(), connection.clone());
        // The hub has not heard yet that this rank is ready, so it says nothing if this fails.
        spawn("mpi_cuda link", move || own.listen(to_read))?;
        self.heard.find_all();
        connection.send(&Message::Ready);
        for message in self.heard.news() {
            connection.send(&message);
        }
        contact.connection = Some(connection);
        contact.told = None;
        Ok(())
    }

    /// Reads what the hub says, until it is gone.
    fn listen(self: &Arc<Spoke>, connection: Arc<Connection>) {
        let mut bye = false;
        let end = loop {
            match connection.read() {
                Ok(Message::Bye) => bye = true,
                Ok(message) => self.hear(message),
                Err(error) => break error,
            }
        };
        let (closed, reset) = (connection.was_closed(&end), connection.was_reset(&end));
        drop(connection);
        let mut contact = self.contact.lock();
        contact.connection = None;
        self.heard.note_waiting(false);
        let gone = match (bye, closed) {
            (true, _) => Gone::Left,
            (_, true) => Gone::Died,
            _ if reset && contact.is_refused() => Gone::Died,
            _ if self.join(&mut contact).is_ok() => return,
            // The kernel may close the place after the connection.
            _ if reset && contact.is_refused() => Gone::Died,
            _ => Gone::Lost,
        };
        self.heard.note(0, gone);
    }

    fn hear(&self, message: Message) {
        let heard = &self.heard;
        match message {
            Message::Gone { rank, gone } => drop(heard.note(rank as usize, gone)),
            Message::Found { rank } => drop(heard.find(rank as usize)),
            Message::Waiting { milliseconds } => heard.note_waiting(milliseconds != 0),
            Message::Coordinator { port } => {
                let found = self.contact.lock().found;
                if let Some(hub) = found {
                    heard.note_coordinator(SocketAddr::new(hub.ip(), port));
                }
            }
            Message::Question { number } => heard.question.store(number, Ordering::SeqCst),
            _ => {}
        }
    }
}
