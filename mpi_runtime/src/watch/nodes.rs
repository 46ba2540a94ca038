//! The ranks of all nodes, as the watch sees them: over the board those of this node, over the link
//! the others.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::link::Link;
use crate::link::gone::Gone;
use crate::node::board::Board;
use crate::watch::state::State;
use crate::watch::stuck::Known;

/// How long ranks of this node may take to tell what they do, and those of others.
const ANSWER: Duration = Duration::from_millis(1500);
const ANSWER_ELSEWHERE: Duration = Duration::from_millis(2500);
/// A rank that has left is told of once it was seen so often to do nothing more.
const LOOKS: u32 = 3;

/// The ranks of the job.
pub(super) struct Nodes {
    pub(super) board: Option<Arc<Board>>,
    pub(super) link: Option<Arc<Link>>,
    /// This rank, and the size of the world.
    pub(super) rank: usize,
    pub(super) size: usize,
}

/// What the watch remembers of them.
#[derive(Default)]
pub(super) struct Seen {
    /// The last question of the hub's that this rank has answered.
    answered: u64,
    /// How often ranks of this node were seen to do nothing more; empty before the first look.
    over: Vec<u32>,
}

impl Nodes {
    /// The ranks of this node, in order.
    fn here(&self) -> impl Iterator<Item = usize> {
        (0..self.size).filter(|&rank| self.is_here(rank))
    }

    fn is_here(&self, rank: usize) -> bool {
        let board = self.board.as_ref();
        rank == self.rank || board.is_some_and(|board| board.sees(rank))
    }

    /// Why a rank of this node does nothing any more, if so.
    fn ended(&self, rank: usize) -> Option<&'static str> {
        self.board.as_ref()?.ended(rank)
    }

    /// Whether this is the lowest rank of its node that runs.
    fn is_first(&self) -> bool {
        let mut running = self.here().filter(|&rank| self.ended(rank).is_none());
        running.next() == Some(self.rank)
    }

    /// Whether this is the rank that examines the job: the hub of the link, and where that is not
    /// there, one of each node.
    pub(super) fn examines(&self) -> bool {
        match &self.link {
            Some(link) if link.is_hub() => true,
            Some(link) if link.is_up() => false,
            _ => self.is_first(),
        }
    }

    /// How long the operation has waited that has waited longest, of all that this rank hears of.
    pub(super) fn longest(&self, own: Duration) -> Duration {
        let elsewhere = self.link.as_ref().map(|link| link.longest_elsewhere());
        self.longest_here(own).max(elsewhere.unwrap_or_default())
    }

    fn longest_here(&self, own: Duration) -> Duration {
        let Some(board) = &self.board else { return own };
        let waiting = self.here().map(|rank| (rank, board.waiting(rank)));
        // Whether a rank runs is only asked of those that wait: it takes a system call.
        let running =
            waiting.filter(|&(rank, time)| !time.is_zero() && board.ended(rank).is_none());
        let longest = running.map(|(_, time)| time).max();
        longest.unwrap_or_default().max(own)
    }

    /// How many ranks of other nodes have ended before their programs did.
    pub(super) fn missing(&self) -> usize {
        self.link.as_ref().map_or(0, |link| link.missing())
    }

    /// Speaks for this node, if this rank does: tells the others who has gone, how long its
    /// operations have waited, and what its ranks do, if that was asked.
    pub(super) fn speak(&self, own: Duration, seen: &mut Seen, state: impl Fn() -> State) {
        let Some(link) = &self.link else { return };
        let first = self.is_first();
        if !first && !link.is_up() {
            return;
        }
        link.tend();
        seen.over.resize(self.size, 0);
        for rank in self.here() {
            match self.ended(rank) {
                None => seen.over[rank] = 0,
                Some(_) if self.has_left(rank) => {
                    seen.over[rank] += 1;
                    if seen.over[rank] >= LOOKS {
                        link.tell_gone(rank, Gone::Left);
                    }
                }
                Some(_) => link.tell_gone(rank, Gone::Died),
            }
        }
        link.tell_waiting(self.longest_here(own));
        let question = link.question();
        if question != seen.answered {
            seen.answered = question;
            for (rank, known) in self.ask_here(&state) {
                if let Known::Told(state) = known {
                    link.answer(question, rank, state.encode());
                }
            }
        }
    }

    fn has_left(&self, rank: usize) -> bool {
        let board = self.board.as_ref();
        board.is_some_and(|board| board.has_left(rank))
    }

    /// What the ranks of this node do.
    fn ask_here(&self, state: impl Fn() -> State) -> Vec<(usize, Known)> {
        let question = self.board.as_ref().map(|board| board.ask());
        let deadline = Instant::now() + ANSWER;
        let own = match self.ended(self.rank) {
            Some(words) => Known::Ended(words.into()),
            None => Known::Told(state()),
        };
        let known = |rank| match (&self.board, question) {
            (Some(board), Some(question)) if rank != self.rank => {
                told(board, rank, question, deadline)
            }
            _ => own.clone(),
        };
        self.here().map(|rank| (rank, known(rank))).collect()
    }

    /// What all ranks do, as far as they tell.
    pub(super) fn ask(&self, state: impl Fn() -> State) -> Vec<Known> {
        let deadline = Instant::now() + ANSWER_ELSEWHERE;
        if let Some(link) = &self.link {
            link.ask();
        }
        let mut all = vec![Known::Nothing; self.size];
        for (rank, known) in self.ask_here(state) {
            all[rank] = known;
        }
        if let Some(link) = &self.link {
            for rank in (0..self.size).filter(|&rank| !self.is_here(rank)) {
                all[rank] = told_elsewhere(link, rank, deadline);
            }
        }
        all
    }
}

fn told(board: &Board, rank: usize, question: u64, deadline: Instant) -> Known {
    wait_for(deadline, || {
        if let Some(ended) = board.ended(rank) {
            return Some(Known::Ended(ended.into()));
        }
        let text = board.answered(rank, question)?;
        Some(State::decode(&text).map_or(Known::Nothing, Known::Told))
    })
}

fn told_elsewhere(link: &Link, rank: usize, deadline: Instant) -> Known {
    wait_for(deadline, || {
        if let Some(text) = link.answered(rank) {
            return Some(State::decode(&text).map_or(Known::Nothing, Known::Told));
        }
        if let Some(gone) = link.gone(rank) {
            return Some(Known::Ended(gone.words().into()));
        }
        (!link.hears(rank)).then_some(Known::Nothing)
    })
}

fn wait_for(deadline: Instant, look: impl Fn() -> Option<Known>) -> Known {
    loop {
        if let Some(known) = look() {
            return known;
        }
        if Instant::now() > deadline {
            return Known::Nothing;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
