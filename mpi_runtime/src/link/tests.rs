//! Links between threads of this process, each of which stands for a rank.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::*;

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

/// Breaks the connection of a rank, which can make no other.
fn die(link: &Link) {
    let Role::Spoke(spoke) = &link.role else {
        return;
    };
    spoke.lock().invitation.addresses.clear();
    break_off(link);
}

fn break_off(link: &Link) {
    let Role::Spoke(spoke) = &link.role else {
        return;
    };
    let connection = spoke.lock().connection.clone();
    connection.unwrap().shut_down();
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
fn who_dies_is_known_everywhere() {
    let [hub, first, second] = three();
    assert!(first.is_up() && !first.is_hub() && hub.is_hub());
    second.tell_gone(3, Gone::Died);
    wait(|| first.gone(3).is_some() && hub.gone(3).is_some());
    assert_eq!(first.gone(3), Some(Gone::Died));
    die(&second);
    wait(|| first.gone(2).is_some() && hub.gone(2).is_some());
    assert_eq!(hub.gone(2), Some(Gone::Died));
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
    let Role::Spoke(spoke) = &second.role else {
        panic!();
    };
    let late = Link::new(3, 4, None);
    late.accept(spoke.lock().invitation.clone()).unwrap();
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
