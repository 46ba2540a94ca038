//! The hub: rank 0, to which one rank of every other node holds a connection.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::link::Link;
use crate::link::gone::Gone;
use crate::link::invitation::Invitation;
use crate::link::message::Message;
use crate::link::socket::{Connection, Listener, spawn};
use crate::link::spoke::JOIN;

/// How long whoever connects may take to show that it belongs to the job.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(2);
/// How many may be about to show it.
const STRANGERS: usize = 256;
/// After a connection broke, a rank that lives has so long to make another one: as long as it may
/// take to join, and what it takes the rank to notice.
pub(super) const RETURN: Duration = JOIN.saturating_add(Duration::from_millis(500));
/// After the rank that spoke for a node has died, another one has so long to take its place.
const SUCCESSION: Duration = Duration::from_secs(10);

/// What the hub knows of the others.
#[derive(Default)]
pub(super) struct Hub {
    speakers: Mutex<Vec<Speaker>>,
    /// Ranks of nodes for which nobody speaks, since then.
    orphans: Mutex<Vec<(Instant, usize)>>,
    /// The last question, and what ranks have answered to it.
    answers: Mutex<(u64, HashMap<usize, String>)>,
    strangers: AtomicUsize,
    /// Held while it is changed and told who has gone, so that all hear it in the same order.
    pub(super) order: Mutex<()>,
}

/// A rank that speaks for its node.
struct Speaker {
    rank: usize,
    ranks: Vec<usize>,
    connection: Arc<Connection>,
    /// How long an operation of its node had waited when it said so.
    waiting: Option<(Duration, Instant)>,
}

impl Hub {
    /// Listens, and serves whoever joins `link`.
    pub(super) fn listen(link: &Arc<Link>) -> io::Result<Invitation> {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
        let invitation = Invitation::new(listener.local_addr()?.port());
        let listener = Listener::new(listener);
        let (known, link) = (invitation.clone(), Arc::downgrade(link));
        spawn("mpi_cuda hub", move || accept(&listener, &known, &link))?;
        Ok(invitation)
    }

    pub(super) fn send_all(&self, message: &Message, except: usize) {
        let speakers = self.speakers.lock();
        let others = speakers.iter().filter(|speaker| speaker.rank != except);
        let connections: Vec<_> = others.map(|speaker| speaker.connection.clone()).collect();
        drop(speakers);
        for connection in connections {
            connection.send(message);
        }
    }

    /// Asks all nodes; the number of the question.
    pub(super) fn ask(&self) -> u64 {
        let mut answers = self.answers.lock();
        let number = answers.0 + 1;
        *answers = (number, HashMap::new());
        drop(answers);
        self.send_all(&Message::Question { number }, usize::MAX);
        number
    }

    pub(super) fn answered(&self, rank: usize) -> Option<String> {
        self.answers.lock().1.get(&rank).cloned()
    }

    /// Whether somebody speaks for the node of that rank.
    pub(super) fn hears(&self, rank: usize) -> bool {
        let speakers = self.speakers.lock();
        speakers.iter().any(|speaker| speaker.ranks.contains(&rank))
    }

    /// How long the operation has waited that has waited longest, on other nodes.
    pub(super) fn longest(&self) -> Duration {
        let speakers = self.speakers.lock();
        let waiting = speakers.iter().filter_map(|speaker| speaker.waiting);
        let longest = waiting.map(|(time, since)| time + since.elapsed()).max();
        longest.unwrap_or_default()
    }

    /// Ranks of a node that has been silent for too long since the rank died that spoke for it.
    pub(super) fn lost(&self) -> Vec<usize> {
        let mut orphans = self.orphans.lock();
        orphans.retain(|&(_, rank)| !self.hears(rank));
        let lost = orphans.extract_if(.., |(since, _)| since.elapsed() > SUCCESSION);
        lost.map(|(_, rank)| rank).collect()
    }

    fn add(&self, speaker: Speaker) {
        let mut speakers = self.speakers.lock();
        let same = |known: &mut Speaker| known.rank == speaker.rank;
        for known in speakers.extract_if(.., same) {
            known.connection.break_off();
        }
        speakers.push(speaker);
    }

    fn remove(&self, connection: &Arc<Connection>) -> Option<Speaker> {
        let mut speakers = self.speakers.lock();
        let place = speakers
            .iter()
            .position(|speaker| Arc::ptr_eq(&speaker.connection, connection))?;
        Some(speakers.swap_remove(place))
    }

    /// Whether a rank whose connection broke, or another one of its node, makes another one.
    fn returns(&self, rank: usize) -> bool {
        let start = Instant::now();
        while !self.hears(rank) {
            if start.elapsed() > RETURN {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }

    fn is_waiting(&self, rank: usize, time: Duration) {
        let mut speakers = self.speakers.lock();
        if let Some(speaker) = speakers.iter_mut().find(|speaker| speaker.rank == rank) {
            speaker.waiting = (!time.is_zero()).then(|| (time, Instant::now()));
        }
    }
}

/// One that is about to show that it belongs to the job; counted until this is dropped.
pub(super) struct Stranger(Arc<Link>);

impl Stranger {
    /// None if there are too many.
    pub(super) fn admit(link: &Arc<Link>) -> Option<Stranger> {
        let strangers = &link.hub()?.strangers;
        let more = |count| (count < STRANGERS).then_some(count + 1);
        let admitted = strangers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        admitted.ok().map(|_| Stranger(link.clone()))
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        if let Some(hub) = self.0.hub() {
            hub.strangers.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

pub(super) fn accept(listener: &Listener, invitation: &Invitation, link: &Weak<Link>) {
    loop {
        let Ok(stream) = listener.accept() else {
            // There are no descriptors left, perhaps for a moment.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        let Some(link) = link.upgrade() else { return };
        let Some(stranger) = Stranger::admit(&link) else {
            continue;
        };
        let invitation = invitation.clone();
        let serving = spawn("mpi_cuda speaker", move || {
            let joined = welcome(stream, &invitation);
            drop(stranger);
            if let (Some(hub), Ok((rank, ranks, connection))) = (link.hub(), joined) {
                serve(&link, hub, rank, ranks, connection);
            }
        });
        // Without a thread the rank is refused, and tries again.
        drop(serving);
    }
}

/// Hears who connects: its rank, and those it speaks for.
fn welcome(
    stream: TcpStream,
    invitation: &Invitation,
) -> io::Result<(usize, Vec<usize>, Connection)> {
    let connection = Connection::new(stream)?;
    let strange = || io::Error::from(io::ErrorKind::PermissionDenied);
    let (rank, ranks) = connection.shake_hands(Instant::now() + HANDSHAKE, |stream| {
        let (rank, ranks) = match Message::read(stream)? {
            Message::Hello {
                cookie,
                rank,
                ranks,
            } if cookie == invitation.of_rank => (rank, ranks),
            _ => return Err(strange()),
        };
        let cookie = invitation.of_hub;
        Message::Welcome { cookie }.write(stream)?;
        match Message::read(stream)? {
            Message::Ready => Ok((rank, ranks)),
            _ => Err(strange()),
        }
    })?;
    let ranks = ranks.into_iter().map(|rank| rank as usize);
    Ok((rank as usize, ranks.collect(), connection))
}

/// Reads what that rank says, until it is gone.
fn serve(link: &Arc<Link>, hub: &Hub, rank: usize, ranks: Vec<usize>, connection: Connection) {
    let connection = Arc::new(connection);
    let known = ranks.clone();
    hub.add(Speaker {
        rank,
        ranks,
        connection: connection.clone(),
        waiting: None,
    });
    known.into_iter().for_each(|rank| link.find(hub, rank));
    let order = hub.order.lock();
    for message in link.heard.news() {
        connection.send(&message);
    }
    drop(order);
    let mut bye = false;
    let end = loop {
        match connection.read() {
            Ok(Message::Bye) => bye = true,
            Ok(message) => hear(link, hub, rank, message),
            Err(error) => break error,
        }
    };
    let closed = connection.was_closed(&end);
    let ranks = hub.remove(&connection).map(|speaker| speaker.ranks);
    drop(connection);
    let gone = match (bye, closed) {
        (true, _) => Gone::Left,
        (_, true) => Gone::Died,
        _ if hub.returns(rank) => return,
        _ => Gone::Lost,
    };
    match gone {
        Gone::Lost => link.lose(hub, rank),
        _ => link.note_and_pass_on(hub, rank, gone, rank),
    }
    if let Some(ranks) = ranks.filter(|_| !bye) {
        let now = Instant::now();
        let orphans = ranks.into_iter().map(|rank| (now, rank));
        hub.orphans.lock().extend(orphans);
    }
}

/// Does what a message of that rank says.
fn hear(link: &Link, hub: &Hub, rank: usize, message: Message) {
    match message {
        Message::Gone { rank: who, gone } => link.note_and_pass_on(hub, who as usize, gone, rank),
        Message::Waiting { milliseconds } => {
            hub.is_waiting(rank, Duration::from_millis(milliseconds));
        }
        Message::Answer {
            question,
            rank,
            state,
        } => {
            let mut answers = hub.answers.lock();
            if answers.0 == question {
                answers.1.insert(rank as usize, state);
            }
        }
        Message::WantsCoordinator => {
            link.heard.wants_coordinator.store(true, Ordering::SeqCst);
        }
        _ => {}
    }
}
