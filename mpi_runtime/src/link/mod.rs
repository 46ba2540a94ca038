//! The link: connections between the nodes of a job, over which ranks hear what MPI does not tell:
//! who has ended, and, when asked, what the ranks of other nodes do.
//!
//! It is a star. Rank 0 is the [`hub`], and one rank of every other node, the lowest that runs,
//! speaks for its node. If that rank ends, the next one connects. What is heard is shown on the
//! board of the node, so that all its ranks know.

pub(crate) mod gone;
mod heard;
mod hub;
pub(crate) mod invitation;
mod message;
pub(crate) mod relay;
mod socket;
mod spoke;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::link::gone::Gone;
use crate::link::heard::Heard;
use crate::link::hub::Hub;
use crate::link::invitation::Invitation;
use crate::link::message::{LONG, Message};
use crate::link::spoke::Spoke;
use crate::node::board::Board;

/// This rank's part of the link.
pub(crate) struct Link {
    heard: Arc<Heard>,
    role: Role,
}

enum Role {
    Hub(Hub),
    Spoke(Arc<Spoke>),
}

impl Link {
    /// The link of `rank` in a world of `size` ranks, without connections.
    pub(crate) fn new(rank: usize, size: usize, board: Option<Arc<Board>>) -> Arc<Link> {
        let heard = Arc::new(Heard::new(rank, size, board));
        let role = match rank {
            0 => Role::Hub(Hub::default()),
            _ => Role::Spoke(Spoke::new(heard.clone())),
        };
        Arc::new(Link { heard, role })
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
    pub(crate) fn accept(&self, invitation: Invitation) -> io::Result<()> {
        match &self.role {
            Role::Hub(_) => Ok(()),
            Role::Spoke(spoke) => spoke.accept(invitation),
        }
    }

    /// Why a rank of another node does nothing any more, if so.
    pub(crate) fn gone(&self, rank: usize) -> Option<Gone> {
        self.heard.gone(rank)
    }

    /// How many ranks are known to this one to have ended before their programs did.
    pub(crate) fn missing(&self) -> usize {
        self.heard.missing()
    }

    /// Whether this is the rank that asks all others.
    pub(crate) fn is_hub(&self) -> bool {
        self.hub().is_some()
    }

    /// Whether this rank has a connection to the hub, or is it.
    pub(crate) fn is_up(&self) -> bool {
        match &self.role {
            Role::Hub(_) => true,
            Role::Spoke(spoke) => spoke.is_up(),
        }
    }

    /// Of a rank that speaks for its node: connects, if there is no connection.
    pub(crate) fn tend(&self) {
        match &self.role {
            Role::Hub(hub) => {
                for rank in hub.lost() {
                    self.lose(hub, rank);
                }
            }
            Role::Spoke(spoke) => spoke.tend(),
        }
    }

    /// Tells everybody that a rank of this node has gone.
    pub(crate) fn tell_gone(&self, rank: usize, gone: Gone) {
        if self.heard.note(rank, gone) {
            let rank = rank as u32;
            self.send(&Message::Gone { rank, gone });
        }
    }

    /// Tells the hub how long an operation of this node has waited; the hub tells everybody whether
    /// one waits somewhere.
    pub(crate) fn tell_waiting(&self, longest: Duration) {
        match &self.role {
            Role::Spoke(spoke) => spoke.tell_waiting(longest),
            Role::Hub(hub) => {
                let longest = longest.max(hub.longest());
                let waits = longest >= LONG;
                if self.heard.waits.swap(waits, Ordering::SeqCst) != waits {
                    hub.send_all(&Message::waiting(longest), usize::MAX);
                }
            }
        }
    }

    /// How long an operation of another node has waited, as far as this rank knows.
    pub(crate) fn longest_elsewhere(&self) -> Duration {
        self.hub().map_or(Duration::ZERO, Hub::longest)
    }

    /// Whether an operation of another node waits for long while this rank has not come to its end.
    pub(crate) fn is_awaited(&self) -> bool {
        self.heard.is_awaited()
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
        self.heard.question.load(Ordering::SeqCst)
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

    /// Of a rank that speaks for its node: tells the hub that a rank wants JAX's coordinator.
    pub(crate) fn want_coordinator(&self) {
        if !self.is_hub() {
            self.send(&Message::WantsCoordinator);
        }
    }

    /// Of the hub: whether a rank of another node wants it.
    pub(crate) fn is_coordinator_wanted(&self) -> bool {
        self.heard.wants_coordinator.load(Ordering::SeqCst)
    }

    /// Of the hub: tells everybody where it is, by its own address and the port.
    pub(crate) fn tell_coordinator(&self, place: SocketAddr) {
        self.heard.note_coordinator(place);
        self.send(&Message::Coordinator { port: place.port() });
    }

    /// Where it is, if this rank has heard that.
    pub(crate) fn coordinator(&self) -> Option<SocketAddr> {
        self.heard.coordinator()
    }

    /// This process may end from now on, and its rank has not died then. If the ranks that spoke
    /// for this node have gone, others hear it from this one.
    pub(crate) fn leave(&self) {
        if self.heard.is_lowest() {
            self.tend();
        }
        self.heard.left.store(true, Ordering::SeqCst);
        self.send(&Message::Bye);
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
            Role::Spoke(spoke) => spoke.send(message),
        }
    }

    /// Of the hub: notes what was heard, and tells it to all nodes but the one of `from`.
    fn note_and_pass_on(&self, hub: &Hub, rank: usize, gone: Gone, from: usize) {
        let _order = hub.order.lock();
        if self.heard.note(rank, gone) {
            let rank = rank as u32;
            hub.send_all(&Message::Gone { rank, gone }, from);
        }
    }

    /// Of the hub: nothing has been heard of a rank for too long.
    fn lose(&self, hub: &Hub, rank: usize) {
        self.note_and_pass_on(hub, rank, Gone::Lost, usize::MAX);
        // Its node may have joined in this moment.
        if hub.hears(rank) {
            self.find(hub, rank);
        }
    }

    /// Of the hub: a rank is there, and counts as lost no more.
    fn find(&self, hub: &Hub, rank: usize) {
        let _order = hub.order.lock();
        if self.heard.find(rank) {
            let rank = rank as u32;
            hub.send_all(&Message::Found { rank }, usize::MAX);
        }
    }
}
