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
use crate::link::socket::{self, Connection};

/// How long whoever connects may take to show that it belongs to the job.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// How many may be about to show it.
const STRANGERS: usize = 256;
/// Bytes of the stack of a thread that reads.
const STACK: usize = 256 << 10;
/// After a connection broke, a rank that lives has so long to make another one.
const RETURN: Duration = Duration::from_millis(400);
/// After the rank that spoke for a node has died, another one has so long to take its place.
const SUCCESSION: Duration = Duration::from_secs(10);

/// What the hub knows of the others.
#[derive(Default)]
pub(super) struct Hub {
    spokes: Mutex<Vec<Spoke>>,
    /// Ranks of nodes for which nobody speaks, since then.
    orphans: Mutex<Vec<(Instant, usize)>>,
    /// The last question, and what ranks have answered to it.
    answers: Mutex<(u64, HashMap<usize, String>)>,
    strangers: AtomicUsize,
}

/// A rank that speaks for its node.
struct Spoke {
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
        let (known, link) = (invitation.clone(), Arc::downgrade(link));
        spawn("mpi_cuda hub", move || accept(&listener, &known, &link))?;
        Ok(invitation)
    }

    pub(super) fn send_all(&self, message: &Message, except: usize) {
        let spokes = self.spokes.lock();
        let others = spokes.iter().filter(|spoke| spoke.rank != except);
        let connections: Vec<_> = others.map(|spoke| spoke.connection.clone()).collect();
        drop(spokes);
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
        let spokes = self.spokes.lock();
        spokes.iter().any(|spoke| spoke.ranks.contains(&rank))
    }

    /// How long the operation has waited that has waited longest, on other nodes.
    pub(super) fn longest(&self) -> Duration {
        let spokes = self.spokes.lock();
        let waiting = spokes.iter().filter_map(|spoke| spoke.waiting);
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

    fn add(&self, spoke: Spoke) {
        let mut spokes = self.spokes.lock();
        spokes.retain(|known| known.rank != spoke.rank);
        spokes.push(spoke);
    }

    fn remove(&self, connection: &Arc<Connection>) -> Option<Spoke> {
        let mut spokes = self.spokes.lock();
        let place = spokes
            .iter()
            .position(|spoke| Arc::ptr_eq(&spoke.connection, connection))?;
        Some(spokes.swap_remove(place))
    }

    /// Whether a rank whose connection broke has made another one: then it has not died.
    fn has_returned(&self, rank: usize) -> bool {
        let start = Instant::now();
        loop {
            if self.spokes.lock().iter().any(|spoke| spoke.rank == rank) {
                return true;
            }
            if start.elapsed() > RETURN {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn is_waiting(&self, rank: usize, time: Duration) {
        let mut spokes = self.spokes.lock();
        if let Some(spoke) = spokes.iter_mut().find(|spoke| spoke.rank == rank) {
            spoke.waiting = (!time.is_zero()).then(|| (time, Instant::now()));
        }
    }
}

fn accept(listener: &TcpListener, invitation: &Invitation, link: &Weak<Link>) {
    loop {
        let Ok((stream, _)) = listener.accept() else {
            // There are no descriptors left, perhaps for a moment.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        let Some(link) = link.upgrade() else { return };
        let Some(hub) = link.hub() else { return };
        if hub.strangers.load(Ordering::Relaxed) >= STRANGERS {
            continue;
        }
        hub.strangers.fetch_add(1, Ordering::Relaxed);
        let invitation = invitation.clone();
        let serving = spawn("mpi_cuda spoke", move || {
            let Some(hub) = link.hub() else { return };
            let joined = welcome(&stream, &invitation);
            hub.strangers.fetch_sub(1, Ordering::Relaxed);
            if let Ok((rank, ranks)) = joined {
                serve(&link, hub, stream, rank, ranks);
            }
        });
        // Without a thread the node has no link: nothing is said of it.
        drop(serving);
    }
}

/// Hears who connects: its rank, and those it speaks for.
fn welcome(stream: &TcpStream, invitation: &Invitation) -> io::Result<(usize, Vec<usize>)> {
    stream.set_read_timeout(Some(HANDSHAKE))?;
    stream.set_write_timeout(Some(HANDSHAKE))?;
    stream.set_nodelay(true)?;
    let strange = || io::Error::from(io::ErrorKind::PermissionDenied);
    let mut stream = stream;
    let Message::Hello {
        cookie,
        rank,
        ranks,
    } = Message::read(&mut stream)?
    else {
        return Err(strange());
    };
    if cookie != invitation.of_rank {
        return Err(strange());
    }
    let cookie = invitation.of_hub;
    Message::Welcome { cookie }.write(&mut stream)?;
    match Message::read(&mut stream)? {
        Message::Ready => {
            let ranks = ranks.into_iter().map(|rank| rank as usize);
            Ok((rank as usize, ranks.collect()))
        }
        _ => Err(strange()),
    }
}

/// Reads what that rank says, until it is gone.
fn serve(link: &Arc<Link>, hub: &Hub, stream: TcpStream, rank: usize, ranks: Vec<usize>) {
    let Ok(connection) = Connection::new(stream) else {
        return;
    };
    let connection = Arc::new(connection);
    hub.add(Spoke {
        rank,
        ranks,
        connection: connection.clone(),
        waiting: None,
    });
    for message in link.news() {
        connection.send(&message);
    }
    let mut bye = false;
    let end = loop {
        match connection.read() {
            Ok(Message::Bye) => bye = true,
            Ok(Message::Gone { rank: who, gone }) => {
                link.note_and_pass_on(who as usize, gone, rank)
            }
            Ok(Message::Waiting { milliseconds }) => {
                hub.is_waiting(rank, Duration::from_millis(milliseconds));
            }
            Ok(Message::Answer {
                question,
                rank,
                state,
            }) => {
                let mut answers = hub.answers.lock();
                if answers.0 == question {
                    answers.1.insert(rank as usize, state);
                }
            }
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    let spoke = hub.remove(&connection);
    if !bye && hub.has_returned(rank) {
        return;
    }
    let gone = match socket::meaning(&end) {
        _ if bye => Gone::Left,
        _ if connection.is_broken() => Gone::Lost,
        gone => gone,
    };
    link.note_and_pass_on(rank, gone, rank);
    if let Some(spoke) = spoke.filter(|_| !bye) {
        let now = Instant::now();
        let orphans = spoke.ranks.into_iter().map(|rank| (now, rank));
        hub.orphans.lock().extend(orphans);
    }
}

pub(super) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = std::thread::Builder::new().name(name.into());
    builder.stack_size(STACK).spawn(run).map(drop)
}
