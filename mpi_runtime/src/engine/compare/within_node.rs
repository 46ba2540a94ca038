//! A communicator as the ranks of this node compare it.

#![forbid(unsafe_code)]

use std::sync::atomic::AtomicU32;

use parking_lot::Mutex;

use crate::engine::compare::channel::Channel;
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
}

impl WithinNode {
    pub(super) fn new(channel: Channel) -> WithinNode {
        WithinNode {
            channel: Mutex::new(channel),
            same: AtomicU32::new(0),
            apart: AtomicU32::new(0),
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
