//! The user's communicators, and those of replica groups: what each is compared by, from its first
//! collective until it is freed.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::engine::compare::channel::{Channel, Retired};
use crate::engine::compare::exchange::ByMessages;
use crate::engine::compare::nodes::BetweenNodes;
use crate::engine::compare::within_node::{FIXED, WithinNode};
use crate::engine::post::Tags;
use crate::mpi::shim::Shim;
use crate::node::board::Board;

/// The user's communicators that are in use.
#[derive(Default)]
pub(super) struct UsersComms {
    /// How they are compared between nodes, if they are.
    pub(super) messages: Option<Messages>,
    /// By number.
    known: RwLock<BTreeMap<i64, Arc<UsersComm>>>,
    /// How many there were with these members.
    ordinals: Mutex<HashMap<Vec<i32>, u64>>,
    /// Lanes of those that were freed, which others may still read.
    retired: Mutex<Vec<Retired>>,
}

/// The ranks of a communicator, and how they call it.
pub(super) struct Who {
    members: Vec<i32>,
    /// Its name, the same on all of them; else it is known by how many with its members came
    /// before.
    id: Option<u64>,
}

impl Who {
    /// One of the user's, which mpi4py may use too.
    pub(super) fn users(members: Vec<i32>) -> Who {
        Who { members, id: None }
    }

    /// That of a replica group, whose number is the same on all its ranks.
    pub(super) fn group(number: i64, members: Vec<i32>) -> Who {
        let id = Some(named(&members, number as u64));
        Who { members, id }
    }
}

/// How ranks of a communicator of the user's tell each other what they do.
pub(super) struct Messages {
    pub(super) shim: Shim,
    /// Handle of a communicator of ours.
    pub(super) comm: u64,
    /// In the world.
    pub(super) rank: i32,
}

/// What a communicator of the user's is compared by.
#[derive(Default)]
pub(super) struct UsersComm {
    pub(super) within: Option<WithinNode>,
    pub(super) between: Option<BetweenNodes>,
}

impl UsersComms {
    /// What the communicator `number` is compared by, if it has had a collective.
    pub(super) fn known(&self, number: i64) -> Option<Arc<UsersComm>> {
        self.known.read().get(&number).cloned()
    }

    /// What the communicator `number` is compared by, made for its first collective. Ranks know it
    /// by its members and by how many with these members came before. That is the same on all of
    /// them as long as one thread uses them: `who` has none for those of other threads, which are
    /// not compared.
    pub(super) fn get(
        &self,
        number: i64,
        board: Option<&Arc<Board>>,
        who: impl FnOnce() -> Option<Who>,
    ) -> Arc<UsersComm> {
        if let Some(known) = self.known.read().get(&number) {
            return known.clone();
        }
        let made = who().map(|who| self.make(board, &who));
        let made = Arc::new(made.unwrap_or_default());
        self.known.write().insert(number, made.clone());
        made
    }

    fn make(&self, board: Option<&Arc<Board>>, who: &Who) -> UsersComm {
        let members = &who.members[..];
        let id = who.id.unwrap_or_else(|| self.next_id(members));
        let within = board.and_then(|board| {
            let lane = self.take_lane(board, id)?;
            let mut channel = Channel::new(board, id, lane, members, who.id.is_none());
            if self.messages.is_some() {
                channel.is_told_elsewhere();
            }
            Some(WithinNode::new(channel))
        });
        let here = |&rank: &i32| board.is_some_and(|board| board.sees(rank as usize));
        let messages = self.messages.as_ref();
        let messages = messages.filter(|_| !members.iter().all(here));
        let between = messages.map(|messages| {
            let by = ByMessages {
                shim: messages.shim,
                comm: messages.comm,
                tag: Tags::of(&messages.shim).of_channel(id),
                rank: messages.rank,
                members: members.to_vec(),
            };
            BetweenNodes::new(Box::new(by), 1, true)
        });
        UsersComm { within, between }
    }

    /// The communicator was freed.
    pub(super) fn free(&self, number: i64, board: Option<&Arc<Board>>) {
        let known = self.known.write().remove(&number);
        let within = known.as_ref().and_then(|known| known.within.as_ref());
        if let (Some(board), Some(within)) = (board, within) {
            let retired = within.channel.lock().retire(board);
            self.retired.lock().push(retired);
        }
    }

    /// A lane for the channel `id`, maybe that of one that was freed.
    fn take_lane(&self, board: &Board, id: u64) -> Option<usize> {
        let mut retired = self.retired.lock();
        retired.retain(|lane| !lane.give_back(board));
        board.take_lane(id, FIXED)
    }

    fn next_id(&self, members: &[i32]) -> u64 {
        let mut ordinals = self.ordinals.lock();
        let ordinal = ordinals.entry(members.to_vec()).or_default();
        *ordinal += 1;
        named(members, *ordinal)
    }
}

/// What those call a channel who know it by its members and this number.
fn named(members: &[i32], number: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (members, number).hash(&mut hasher);
    hasher.finish().max(FIXED as u64 + 1)
}
