//! A communicator as the ranks of this node compare it.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::engine::compare::channel::Channel;
use crate::engine::order::Ticket;
use crate::error::Failure;
use crate::mpi::communicators::{COLLECTIVES, DEFAULT, WORLD};
use crate::node::board::Board;

/// Lanes of the communicators that always exist: their numbers.
pub(super) const FIXED: usize = 4;

/// What the ranks of this node compare of one communicator.
pub(super) struct WithinNode {
    pub(super) channel: Mutex<Channel>,
    /// A launch that all ranks have launched: what is in it need not be compared.
    pub(super) same: AtomicU32,
    /// A launch that was looked up, and whose operations are compared one by one.
    pub(super) apart: AtomicU32,
    /// The launch that has come to a collective last, and to how many; written by its operations
    /// alone, which take turns.
    come: AtomicU64,
}

/// What a launch has come to.
#[derive(Clone, Copy)]
pub(super) enum Come {
    /// One more collective.
    Next,
    /// One that it refuses: the others know that it executes no more.
    Fails,
    /// All of its collectives: the others have it as a whole.
    ToAll,
}

/// More collectives than any launch comes to one by one.
const ALL: u32 = u32::MAX;

impl WithinNode {
    pub(super) fn new(channel: Channel) -> WithinNode {
        WithinNode {
            channel: Mutex::new(channel),
            same: AtomicU32::new(0),
            apart: AtomicU32::new(0),
            come: AtomicU64::new(0),
        }
    }

    /// The launch `ticket` has come to a collective here.
    #[inline]
    pub(super) fn come_to(&self, ticket: Ticket, what: Come) {
        let count = match what {
            Come::Next => self.come_so_far(ticket).saturating_add(1),
            Come::Fails | Come::ToAll => ALL,
        };
        let both = u64::from(ticket.0) << 32 | u64::from(count);
        self.come.store(both, Ordering::Relaxed);
    }

    /// To how many collectives here the launch `ticket` has come.
    #[inline]
    pub(super) fn come_so_far(&self, ticket: Ticket) -> u32 {
        let both = self.come.load(Ordering::Relaxed);
        match (both >> 32) as u32 == ticket.0 {
            true => both as u32,
            false => 0,
        }
    }
}

/// The communicators that always exist, by number, in a world of `size` ranks.
pub(super) fn fixed(board: &Board, size: i32) -> [Option<WithinNode>; FIXED] {
    let members: Vec<i32> = (0..size).collect();
    let mut fixed = [const { None }; FIXED];
    for number in [WORLD, DEFAULT, COLLECTIVES] {
        let (id, lane) = (number as u64 + 1, number as usize);
        if board.take_lane(id, lane) == Some(lane) {
            let mut channel = Channel::new(board, id, lane, &members, false);
            channel.is_told_elsewhere();
            fixed[lane] = Some(WithinNode::new(channel));
        }
    }
    fixed
}

/// Whether the other nodes can be asked after this on the own one: not if one of its ranks has
/// gone, which takes part in nothing more.
#[inline]
pub(super) fn may_ask<T>(on_node: &Result<T, Failure>, within: Option<&WithinNode>) -> bool {
    on_node.is_ok() || !within.is_some_and(|within| within.channel.lock().is_closed())
}
