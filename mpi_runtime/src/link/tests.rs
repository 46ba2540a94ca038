//! Links between threads of this process, each of which stands for a rank.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;

use super::hub::{HANDSHAKE, RETURN, Stranger};
use super::socket::{Connection, Listener};
use super::spoke::{Contact, JOIN, TRY};
use super::*;
use crate::node::segment::new_number;

/// Links of a hub and of two ranks of other nodes.
fn three() -> [Arc<Link>; 3] {
    let all = [0, 1, 2].map(|rank| Link::new(rank, 4, None));
    let invitation = all[0].listen().unwrap();
    for link in &all {
        link.accept(invitation.clone()).unwrap();
    }
    wait(|| all[0].hears(1) && all[0].hears(2));
    all
}

fn wait(until: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !until() {
        assert!(Instant::now() < deadline, "nothing has come");
        sleep(Duration::from_millis(1));
    }
}

fn spoke(link: &Link) -> MutexGuard<'_, Contact> {
    match &link.role {
        Role::Spoke(spoke) => spoke.contact.lock(),
        Role::Hub(_) => panic!("this is the hub"),
    }
}

/// Ends the connection of a rank as the end of its process does.
fn die(link: &Link) {
    let mut spoke = spoke(link);
    spoke.invitation.addresses.clear();
    spoke.connection.as_ref().unwrap().close();
}

/// Breaks the connection of a rank that lives.
fn break_off(link: &Link) {
    spoke(link).connection.as_ref().unwrap().break_off();
}

/// How to join a hub that listens at that port of these addresses.
fn invitation_to(port: u16, addresses: &[&str]) -> Invitation {
    Invitation {
        addresses: addresses.iter().map(|one| one.parse().unwrap()).collect(),
        ..Invitation::new(port)
    }
}

/// A hub that listens there.
fn hub_at(place: SocketAddr, invitation: Invitation) -> Arc<Link> {
    let hub = Link::new(0, 4, None);
    let listener = Listener::new(TcpListener::bind(place).unwrap());
    let link = Arc::downgrade(&hub);
    spawn(move || hub::accept(&listener, &invitation, &link));
    hub
}

#[test]
fn a_connection_that_breaks_is_made_again() {
    let [hub, first, second] = three();
    for _ in 0..3 {
        break_off(&second);
        wait(|| second.is_up() && hub.hears(2));
        sleep(Duration::from_millis(20));
    }
    first.tell_gone(3, Gone::Died);
    wait(|| second.gone(3).is_some());
    sleep(Duration::from_millis(600));
    assert_eq!(
        (hub.gone(2), first.gone(2), second.gone(0)),
        (None, None, None)
    );
}

#[test]
fn the_hub_waits_for_as_long_as_a_rank_may_take_to_return() {
    // Nobody says a word at the first address, though the kernel connects.
    let silent = TcpListener::bind("127.0.0.2:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let place = SocketAddr::from(([127, 0, 0, 1], port));
    let invitation = invitation_to(port, &["127.0.0.2", "127.0.0.1"]);
    let hub = hub_at(place, invitation.clone());
    let link = Link::new(1, 4, None);
    link.accept(invitation).unwrap();
    wait(|| hub.hears(1));
    assert_eq!(spoke(&link).found.take(), Some(place));
    break_off(&link);
    wait(|| !hub.hears(1));
    wait(|| hub.hears(1) || hub.gone(1).is_some());
    assert_eq!((hub.gone(1), link.gone(0)), (None, None));
    // What was found is tried first.
    let before = spoke(&link)
        .connection
        .as_ref()
        .map(Arc::downgrade)
        .unwrap();
    let start = Instant::now();
    break_off(&link);
    wait(|| {
        let spoke = spoke(&link);
        let now = spoke.connection.as_ref();
        now.is_some_and(|now| Arc::as_ptr(now) != before.as_ptr())
    });
    assert!(start.elapsed() < TRY);
}

#[test]
fn who_does_not_return_is_lost_and_not_dead() {
    let [hub, first, second] = three();
    spoke(&second).invitation.addresses.clear();
    break_off(&second);
    wait(|| first.gone(2).is_some() && second.gone(0).is_some());
    let all = [hub.gone(2), first.gone(2), second.gone(0)];
    assert_eq!(all, [Some(Gone::Lost); 3]);
}

/// Joins a hub that ends before it has read all. Its connection is closed first, or its place.
fn end_unread(connection_first: bool) -> Arc<Link> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let invitation = invitation_to(listener.local_addr().unwrap().port(), &["127.0.0.1"]);
    let cookie = invitation.of_hub;
    let hub = spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        Message::read(&mut stream).unwrap();
        Message::Welcome { cookie }.write(&mut stream).unwrap();
        // The rank says that it is ready, which nobody reads.
        stream.peek(&mut [0]).unwrap();
        match connection_first {
            true => {
                drop(stream);
                // Until the rank has come back in vain.
                let (again, _) = listener.accept().unwrap();
                drop((again, listener));
            }
            false => drop((listener, stream)),
        }
    });
    let link = Link::new(1, 4, None);
    link.accept(invitation).unwrap();
    hub.join().unwrap();
    link
}

#[test]
fn a_hub_that_ends_before_it_has_read_all_has_died() {
    for connection_first in [false, true] {
        let link = end_unread(connection_first);
        wait(|| link.gone(0).is_some());
        assert_eq!(link.gone(0), Some(Gone::Died));
    }
}

#[test]
fn a_reset_that_a_write_hears_of_is_one_for_the_reader_too() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let connection = Connection::new(stream).unwrap();
    connection.send(&Message::Ready);
    let (stream, _) = listener.accept().unwrap();
    // With bytes that nobody has read, which the kernel answers by a reset.
    stream.peek(&mut [0]).unwrap();
    drop(stream);
    connection.send(&Message::Ready);
    let end = connection.read().unwrap_err();
    assert!(
        connection.was_reset(&end) && !connection.was_closed(&end),
        "{end}"
    );
}

#[test]
fn who_was_lost_counts_as_there_when_it_joins_again() {
    let number = new_number();
    let mut boards = [1, 2].map(|rank| Board::make(number, rank, 4).unwrap());
    boards.iter_mut().for_each(Board::open);
    boards.iter().for_each(Board::unlink);
    let [one, two] = boards.map(|board| Some(Arc::new(board)));
    let hub = Link::new(0, 4, None);
    let [first, second, other] =
        [(1, one), (2, two), (3, None)].map(|(rank, board)| Link::new(rank, 4, board));
    let invitation = hub.listen().unwrap();
    for link in [&first, &second, &other] {
        link.accept(invitation.clone()).unwrap();
    }
    assert!(!second.is_up());
    wait(|| hub.hears(2) && hub.hears(3));
    spoke(&other).invitation.addresses.clear();
    break_off(&other);
    let known = |links: &[&Arc<Link>]| links.iter().map(|link| link.gone(3)).collect::<Vec<_>>();
    let all = [&hub, &first, &second];
    wait(|| known(&all) == [Some(Gone::Lost); 3] && other.gone(0) == Some(Gone::Lost));
    let missing = || (hub.missing(), first.missing(), other.missing());
    wait(|| missing() == (1, 1, 1));
    // A rank tries on, also when it counts the hub as lost.
    spoke(&other).invitation = invitation;
    other.tend();
    assert!(other.is_up());
    wait(|| known(&all) == [None; 3] && other.gone(0).is_none());
    wait(|| missing() == (0, 0, 0));
    // What is certain stays.
    first.tell_gone(2, Gone::Died);
    wait(|| other.gone(2).is_some());
    break_off(&first);
    break_off(&other);
    wait(|| first.is_up() && other.is_up());
    sleep(Duration::from_millis(50));
    assert_eq!(
        (hub.gone(2), other.gone(2)),
        (Some(Gone::Died), Some(Gone::Died))
    );
}

#[test]
fn all_addresses_are_tried_until_the_time_is_over() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = free.local_addr().unwrap();
    drop(free);
    let invitation = invitation_to(place.port(), &["127.0.0.1"]);
    let known = invitation.clone();
    let late = spawn(move || {
        sleep(JOIN / 5);
        hub_at(place, known)
    });
    Link::new(1, 4, None).accept(invitation).unwrap();
    let hub = late.join().unwrap();
    wait(|| hub.hears(1));
}

#[test]
fn who_dies_is_known_everywhere() {
    let [hub, first, second] = three();
    assert!(first.is_up() && !first.is_hub() && hub.is_hub());
    second.tell_gone(3, Gone::Died);
    wait(|| first.gone(3).is_some() && hub.gone(3).is_some());
    assert_eq!(first.gone(3), Some(Gone::Died));
    let start = Instant::now();
    die(&second);
    wait(|| first.gone(2).is_some() && hub.gone(2).is_some());
    assert_eq!(hub.gone(2), Some(Gone::Died));
    // Nobody waits for one who has died to come back.
    assert!(start.elapsed() < RETURN / 2);
    assert_eq!((first.missing(), first.gone(1)), (2, None));
}

#[test]
fn an_end_that_was_announced_is_no_death() {
    let [hub, first, second] = three();
    second.leave();
    sleep(Duration::from_millis(50));
    assert_eq!(hub.gone(2), None);
    die(&second);
    wait(|| first.gone(2).is_some());
    assert_eq!(first.gone(2), Some(Gone::Left));
    assert_eq!((first.missing(), hub.missing()), (0, 0));
}

#[test]
fn who_joins_late_hears_what_was_said_before() {
    let [hub, first, second] = three();
    first.tell_gone(3, Gone::Left);
    wait(|| hub.gone(3).is_some() && second.gone(3).is_some());
    let late = Link::new(3, 4, None);
    late.accept(spoke(&second).invitation.clone()).unwrap();
    wait(|| hub.hears(3) && late.gone(3) == Some(Gone::Left));
}

#[test]
fn questions_are_answered() {
    let [hub, first, second] = three();
    hub.ask();
    wait(|| first.question() == 1 && second.question() == 1);
    first.answer(1, 1, "one".into());
    second.answer(1, 3, "three".into());
    second.answer(7, 2, "to something else".into());
    wait(|| hub.answered(1).is_some() && hub.answered(3).is_some());
    assert_eq!(hub.answered(3).as_deref(), Some("three"));
    assert_eq!((hub.answered(2), hub.hears(3)), (None, false));
    hub.ask();
    assert_eq!(hub.answered(1), None);
}

#[test]
fn the_hub_knows_how_long_others_have_waited() {
    let [hub, first, second] = three();
    first.tell_waiting(Duration::from_millis(100));
    second.tell_waiting(Duration::from_secs(7));
    wait(|| hub.longest_elsewhere() >= Duration::from_secs(7));
    hub.tell_waiting(Duration::ZERO);
    wait(|| first.is_awaited() && hub.is_awaited());
    second.tell_waiting(Duration::ZERO);
    wait(|| hub.longest_elsewhere().is_zero());
    hub.tell_waiting(Duration::ZERO);
    wait(|| !first.is_awaited());
}

#[test]
fn strangers_are_sent_away() {
    let hub = Link::new(0, 2, None);
    let mut invitation = hub.listen().unwrap();
    let place = invitation.places()[0];
    let mut stranger = TcpStream::connect(place).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(Message::read(&mut stranger).is_err());
    let right = invitation.of_rank;
    invitation.of_rank += 1;
    let link = Link::new(1, 2, None);
    assert!(link.accept(invitation.clone()).is_err() && !link.is_up());
    // The rank makes sure of the hub as well.
    invitation.of_rank = right;
    invitation.of_hub += 1;
    assert!(link.accept(invitation).is_err() && !link.is_up());
    sleep(Duration::from_millis(50));
    assert_eq!((hub.hears(1), hub.gone(1)), (false, None));
}

#[test]
fn a_hub_that_is_not_there_takes_little_time() {
    let hub = Link::new(0, 2, None);
    let mut invitation = hub.listen().unwrap();
    // Nobody has these (RFC 5737).
    invitation.addresses = (1..9).map(|host| [192, 0, 2, 100 + host].into()).collect();
    let start = Instant::now();
    assert!(Link::new(1, 2, None).accept(invitation).is_err());
    assert!(start.elapsed() < 2 * JOIN);
}

/// Begins to say something and goes on a little at a time, until the other side has enough.
fn dribble(mut stream: TcpStream) -> Duration {
    let start = Instant::now();
    let pause = TRY / 4;
    stream.set_read_timeout(Some(pause)).unwrap();
    stream.write_all(&200_u32.to_le_bytes()).unwrap();
    for _ in 0..100 {
        let mut byte = [0];
        let ended = match stream.read(&mut byte) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        };
        if ended || stream.write_all(b"H").is_err() {
            break;
        }
    }
    start.elapsed()
}

#[test]
fn strangers_who_say_little_at_a_time_are_sent_away() {
    let hub = Link::new(0, 2, None);
    let mut invitation = hub.listen().unwrap();
    let stranger = TcpStream::connect(invitation.places()[0]).unwrap();
    let took = dribble(stranger);
    assert!(took < HANDSHAKE + 3 * TRY, "{took:?}");
    // The rank does not listen to a stranger for longer either.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = listener.local_addr().unwrap();
    (invitation.addresses, invitation.port) = (vec![place.ip()], place.port());
    spawn(move || {
        for stream in listener.incoming() {
            spawn(move || dribble(stream.unwrap()));
        }
    });
    let start = Instant::now();
    assert!(Link::new(1, 2, None).accept(invitation).is_err());
    assert!(start.elapsed() < 2 * JOIN);
}

#[test]
fn strangers_are_not_counted_any_more_without_a_thread() {
    let hub = Link::new(0, 2, None);
    let mut admitted: Vec<_> = std::iter::from_fn(|| Stranger::admit(&hub)).collect();
    assert!(admitted.len() > 100);
    // What a thread would have run is dropped if there is none.
    let stranger = admitted.pop();
    let serve = move || drop(stranger);
    assert!(Stranger::admit(&hub).is_none());
    drop(serve);
    assert!(Stranger::admit(&hub).is_some());
}
