use std::cell::RefCell;
use std::collections::VecDeque;

use super::*;
use crate::node::mailbox::tests::mailboxes;

/// A rank that receives, and what the others send it.
struct Pair {
    /// Of the ranks 0 and 1 to rank 2.
    outgoing: Vec<Outgoing>,
    incoming: Incoming,
    /// MPI's queue: communicator and message.
    queue: RefCell<VecDeque<(usize, Message)>>,
}

impl Pair {
    fn new() -> Pair {
        let mut all = mailboxes(&[0, 1, 2]);
        let own = all.pop().unwrap().boxes();
        let to_own = |mailboxes: Mailboxes| Outgoing {
            outbox: mailboxes.boxes().pop().unwrap().outbox,
            through_mpi: [0; COMMS],
        };
        let from = own.into_iter().map(|boxes| Sender {
            inbox: Some(boxes.inbox),
            through_mpi: [0; COMMS],
        });
        Pair {
            outgoing: all.into_iter().map(to_own).collect(),
            incoming: Incoming {
                from: from.collect(),
                here: vec![0, 1, 2],
                early: Vec::new(),
            },
            queue: RefCell::default(),
        }
    }

    /// A message of one byte, which tells it from others.
    fn short(&mut self, source: usize, comm: usize, tag: i32, data: u8) {
        let outgoing = &mut self.outgoing[source];
        let envelope = Envelope {
            comm,
            tag,
            code: 1,
            after: outgoing.through_mpi[comm],
            bytes: 1,
        };
        assert!(outgoing.outbox.push(&envelope, &[data]));
    }

    /// One through MPI, whose length tells it from others.
    fn long(&mut self, source: usize, comm: usize, tag: i32, bytes: i64) {
        self.outgoing[source].through_mpi[comm] += 1;
        let mut message = Message::default();
        message.envelope = ShimReceived {
            source: source as i32,
            tag,
            code: 1,
            bytes,
        };
        self.queue.borrow_mut().push_back((comm, message));
    }

    /// What is received: the byte of a short message, or the length of a long one.
    fn receive(&mut self, source: i32, comm: usize, tag: i32) -> Option<i64> {
        let wanted = Wanted { comm, source, tag };
        if let Some((rank, envelope)) = self.incoming.next(&wanted) {
            let inbox = self.incoming.from[rank].inbox.as_mut().unwrap();
            return Some(inbox.take(&envelope, |data| i64::from(data[0][0])));
        }
        let queue = &self.queue;
        let pull = || {
            let mut queue = queue.borrow_mut();
            let is = |entry: &(usize, Message)| {
                entry.0 == comm && (source == ANY || entry.1.envelope.source == source)
            };
            let place = queue.iter().position(is);
            Ok(place.map(|place| queue.remove(place).unwrap().1))
        };
        let came = self.incoming.take(&wanted, pull).unwrap();
        came.map(|came| match came {
            Came::Mpi(message) => message.envelope.bytes,
            Came::Short { data, .. } => i64::from(data[0]),
        })
    }
}

#[test]
fn long_and_short_messages_of_a_rank_keep_their_order() {
    let mut pair = Pair::new();
    pair.short(0, 0, 7, 1);
    pair.long(0, 0, 7, 1000);
    pair.short(0, 0, 7, 2);
    pair.short(0, 0, 7, 3);
    pair.long(0, 0, 7, 2000);
    pair.long(0, 0, 7, 3000);
    pair.short(0, 0, 7, 4);
    let received: Vec<_> = std::iter::from_fn(|| pair.receive(0, 0, 7)).collect();
    assert_eq!(received, [1, 1000, 2, 3, 2000, 3000, 4]);
}

#[test]
fn a_short_message_waits_for_the_long_one_before_it() {
    let mut pair = Pair::new();
    pair.long(0, 0, 7, 1000);
    pair.short(0, 0, 7, 1);
    let late = pair.queue.take();
    assert_eq!(pair.receive(0, 0, 7), None);
    assert_eq!(pair.receive(ANY, 0, ANY), None);
    // Another sender's, and one on another communicator, come after nothing.
    pair.short(1, 0, 7, 2);
    pair.short(0, 1, 7, 3);
    assert_eq!(pair.receive(ANY, 0, ANY), Some(2));
    assert_eq!(pair.receive(0, 1, 7), Some(3));
    pair.queue.replace(late);
    assert_eq!(pair.receive(ANY, 0, ANY), Some(1000));
    assert_eq!(pair.receive(ANY, 0, ANY), Some(1));
}

#[test]
fn a_tag_may_be_received_before_what_was_sent_earlier() {
    let mut pair = Pair::new();
    pair.short(0, 0, 1, 1);
    pair.long(0, 0, 1, 1000);
    pair.short(0, 0, 2, 2);
    pair.short(0, 0, 1, 3);
    pair.long(0, 0, 2, 2000);
    assert_eq!(pair.receive(0, 0, 2), Some(2));
    assert_eq!(pair.receive(0, 0, 2), Some(2000));
    let left: Vec<_> = std::iter::from_fn(|| pair.receive(ANY, 0, ANY)).collect();
    assert_eq!(left, [1, 1000, 3]);
}

#[test]
fn each_message_is_received_once_and_in_order_whatever_is_sent() {
    let mut seed = 12345u64;
    let mut draw = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    let mut pair = Pair::new();
    // Of each sender and communicator, tag and name of what was sent and not received.
    let mut sent: Vec<Vec<(i32, i64)>> = vec![Vec::new(); 2 * COMMS];
    let mut in_mailbox = [0; 2];
    for step in 0..5000 {
        let (source, comm) = (draw(2) as usize, draw(COMMS as u64) as usize);
        let tag = draw(3) as i32;
        let list = &mut sent[source * COMMS + comm];
        if draw(2) == 0 && list.len() < 20 {
            if draw(3) == 0 || in_mailbox[source] > 20 {
                pair.long(source, comm, tag, 1000 + step);
                list.push((tag, 1000 + step));
            } else {
                pair.short(source, comm, tag, step as u8);
                list.push((tag, i64::from(step as u8)));
                in_mailbox[source] += 1;
            }
            continue;
        }
        let tag = if draw(2) == 0 { tag } else { ANY };
        let any = draw(2) == 0;
        let from = if any { ANY } else { source as i32 };
        let first = |source: usize| {
            let list = &sent[source * COMMS + comm];
            list.iter().position(|one| tag == ANY || one.0 == tag)
        };
        let possible: Vec<_> = (0..2)
            .filter(|&one| any || one == source)
            .filter_map(|one| first(one).map(|place| (one, place)))
            .collect();
        let got = pair.receive(from, comm, tag);
        let fits = |&&(one, place): &&(usize, usize)| {
            let list = &sent[one * COMMS + comm];
            Some(list[place].1) == got
        };
        let Some(&(one, place)) = possible.iter().find(fits) else {
            assert!(
                got.is_none() && possible.is_empty(),
                "step {step}: {got:?} {possible:?}"
            );
            continue;
        };
        sent[one * COMMS + comm].remove(place);
        in_mailbox = [0, 1].map(|one| {
            let own = &sent[one * COMMS..(one + 1) * COMMS];
            own.iter().flatten().filter(|one| one.1 < 1000).count()
        });
    }
}
