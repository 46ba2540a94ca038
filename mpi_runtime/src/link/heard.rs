//! What a rank has heard of the ranks of other nodes. It is shown on the board of its node, so that
//! all ranks there know, whichever of them hears it.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::link::gone::{Gone, GoneTable};
use crate::link::message::{LONG, Message};
use crate::node::board::Board;

/// What this rank has heard.
pub(super) struct Heard {
    pub(super) rank: usize,
    /// The ranks of this node.
    board: Option<Arc<Board>>,
    gone: GoneTable,
    /// The last question of the hub's; 0 if there was none.
    pub(super) question: AtomicU64,
    /// An operation somewhere waits.
    pub(super) waits: AtomicBool,
    /// This rank has come to its end.
    pub(super) left: AtomicBool,
    /// Of the hub: a rank of another node wants JAX's coordinator.
    pub(super) wants_coordinator: AtomicBool,
    /// Where the coordinator is.
    coordinator: OnceLock<SocketAddr>,
}

impl Heard {
    /// Of `rank` in a world of `size` ranks.
    pub(super) fn new(rank: usize, size: usize, board: Option<Arc<Board>>) -> Heard {
        Heard {
            rank,
            board,
            gone: GoneTable::new(size),
            question: AtomicU64::new(0),
            waits: AtomicBool::new(false),
            left: AtomicBool::new(false),
            wants_coordinator: AtomicBool::new(false),
            coordinator: OnceLock::new(),
        }
    }

    /// Where JAX's coordinator is, if that was heard.
    pub(super) fn coordinator(&self) -> Option<SocketAddr> {
        self.coordinator.get().copied()
    }

    /// Notes where it is, and shows it to the ranks of this node.
    pub(super) fn note_coordinator(&self, place: SocketAddr) {
        let noted = *self.coordinator.get_or_init(|| place);
        if let Some(board) = &self.board {
            board.show_coordinator(noted);
        }
    }

    /// Why a rank of another node does nothing any more, if so.
    pub(super) fn gone(&self, rank: usize) -> Option<Gone> {
        let own = self.gone.get(rank);
        own.or_else(|| Gone::of(self.board.as_ref()?.gone_elsewhere(rank)))
    }

    /// How many ranks are known to this one to have ended before their programs did.
    pub(super) fn missing(&self) -> usize {
        self.gone.missing()
    }

    /// Notes that a rank has gone, and shows it if it is one of another node; whether that is news.
    pub(super) fn note(&self, rank: usize, gone: Gone) -> bool {
        let noted = self.gone.note(rank, gone);
        if noted {
            self.show(rank, gone.number());
        }
        noted
    }

    /// A rank is there, and counts as lost no more; whether it did.
    pub(super) fn find(&self, rank: usize) -> bool {
        // Another rank of this node may have shown that it was lost.
        let shown = self.gone(rank) == Some(Gone::Lost);
        let noted = self.gone.found(rank);
        if shown {
            self.show(rank, 0);
        }
        noted
    }

    /// The hub is there, and says who is lost now.
    pub(super) fn find_all(&self) {
        for rank in 0..self.gone.size() {
            self.find(rank);
        }
    }

    fn show(&self, rank: usize, how: u8) {
        if let Some(board) = self.board.as_ref().filter(|board| !board.sees(rank)) {
            board.show_gone_elsewhere(rank, how);
        }
    }

    /// Whether an operation of another node waits.
    pub(super) fn note_waiting(&self, waits: bool) {
        self.waits.store(waits, Ordering::SeqCst);
        if let Some(board) = &self.board {
            board.show_waits_elsewhere(waits);
        }
    }

    /// Whether an operation of another node waits for long while this rank has not come to its end.
    pub(super) fn is_awaited(&self) -> bool {
        let board = self.board.as_ref();
        let shown = || board.is_some_and(|board| board.waits_elsewhere());
        !self.left.load(Ordering::SeqCst) && (self.waits.load(Ordering::SeqCst) || shown())
    }

    /// What the other side of a new connection has to hear. Who is lost, the hub says.
    pub(super) fn news(&self) -> Vec<Message> {
        let is_hub = self.rank == 0;
        let gone = self.gone.all();
        let gone = gone.filter(|&(_, gone)| is_hub || gone != Gone::Lost);
        let gone = gone.map(|(rank, gone)| {
            let rank = rank as u32;
            Message::Gone { rank, gone }
        });
        let bye = self.left.load(Ordering::SeqCst).then_some(Message::Bye);
        let waits = is_hub && self.waits.load(Ordering::SeqCst);
        let waiting = waits.then(|| Message::waiting(LONG));
        let coordinator = self.coordinator().filter(|_| is_hub);
        let coordinator = coordinator.map(|place| Message::Coordinator { port: place.port() });
        gone.chain(bye).chain(waiting).chain(coordinator).collect()
    }

    /// The ranks of this node, in order.
    pub(super) fn ranks(&self) -> Vec<usize> {
        let board = self.board.as_ref();
        let is_here =
            |rank| rank == self.rank || board.is_some_and(|board: &Arc<Board>| board.sees(rank));
        (0..self.gone.size())
            .filter(|&rank| is_here(rank))
            .collect()
    }

    /// Whether this is the lowest rank of its node that has not ended.
    pub(super) fn is_lowest(&self) -> bool {
        let runs = |&rank: &usize| {
            self.board
                .as_ref()
                .is_none_or(|board| board.ended(rank).is_none())
        };
        let lower = self
            .ranks()
            .into_iter()
            .take_while(|&rank| rank < self.rank);
        !lower.into_iter().any(|rank| runs(&rank))
    }
}
