//! One communicator's lane on the board, and the rounds in which its ranks compare their steps.
//!
//! In a round each rank has one current record, and waits until it sees those of all others. What
//! follows from them is the same on all ranks (`outcome.rs`).
//!
//! Ranks that fail have used up the same records, so a program may go on after the error.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use mpi_shim_abi::Kind;

use crate::engine::compare::outcome::{Outcome, Words, outcome};
use crate::engine::compare::record::Record;
use crate::engine::compare::words;
use crate::engine::recorder::RECORDER;
use crate::engine::recorder::clock::Ticks;
use crate::error::Failure;
use crate::log;
use crate::node::board::Board;
use crate::node::patience::Patience;

/// How long a rank waits for the others' words once it knows that they differ.
const EXPLAIN: Duration = Duration::from_secs(2);
/// How long a rank waits for one that may be in a call of mpi4py's on the same communicator.
const SHARED: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// Refused operations of which a rank does not wait for the ends of the rounds. The ring of the
/// board has room for them, twice.
const MOST_OWED: usize = 4;
/// Why a communicator is closed whose ranks have differed on one of its nodes.
pub(super) const OTHER_NODES: &str = "ranks of this node have differed in an operation, \
    and those of other nodes may have executed it: this communicator cannot be used any more";

/// Where the ranks of a communicator compare what they do.
pub(super) struct Channel {
    id: u64,
    lane: usize,
    /// Rank of this process in the communicator.
    rank: i32,
    peers: Vec<Peer>,
    /// Those that it does not wait for any more, since it has stopped.
    former: Vec<Peer>,
    /// The records that this rank has written.
    written: u64,
    /// The rounds that are over for this rank. All ranks take part in all of them.
    rounds: u64,
    /// Refused operations whose rounds are not over: this rank did not wait for the others.
    owed: VecDeque<Record>,
    /// The user's, who may use it with mpi4py too.
    shared: bool,
    /// Some of its ranks are on other nodes, and do not hear of what differs here.
    partial: bool,
    /// All of its ranks are on this node.
    whole: bool,
    /// A rank has waited in vain, so that none of them compares any more.
    stopped: bool,
    /// It is not used any more, for this reason.
    closed: Option<Failure>,
}

struct Peer {
    /// In the communicator, and in the world.
    rank: i32,
    world_rank: usize,
    lane: Option<usize>,
    /// Number of its current record.
    current: u64,
}

impl Peer {
    /// Its current record, if it is there.
    #[inline]
    fn record(&self, board: &Board) -> Option<Words> {
        board.read(self.world_rank, self.lane?, self.current)
    }

    /// The same, of a lane that it may have by now for the channel `id`.
    fn look(&mut self, board: &Board, id: u64) -> Option<Words> {
        if self.lane.is_none() {
            self.lane = board.find_lane(self.world_rank, id);
        }
        self.record(board)
    }

    /// See [`Board::has_stopped`].
    fn has_stopped(&self, board: &Board) -> Option<bool> {
        let has = |lane| board.has_stopped(self.world_rank, lane, self.current);
        self.lane.map_or(Some(false), has)
    }
}

/// A lane of a channel that this rank uses no more.
pub(super) struct Retired {
    id: u64,
    lane: usize,
    /// The ranks that have used it too, and their lanes.
    readers: Vec<(usize, usize)>,
}

impl Retired {
    /// Gives the lane back if nobody reads there any more; whether it has.
    pub(super) fn give_back(&self, board: &Board) -> bool {
        let mut readers = self.readers.iter();
        let over = readers.all(|&(rank, lane)| board.has_retired(rank, lane, self.id));
        if over {
            board.free_lane(self.lane);
        }
        over
    }
}

impl Channel {
    /// A channel called `id`, the same on all its ranks, over a lane of this rank's that was taken
    /// for it. `members` are the ranks of the communicator in the world.
    pub(super) fn new(board: &Board, id: u64, lane: usize, members: &[i32], shared: bool) -> Self {
        let own = board.rank();
        let ranks = members.iter().enumerate();
        let peers = ranks.clone().filter_map(|(rank, &world_rank)| {
            let world_rank = usize::try_from(world_rank).ok()?;
            (world_rank != own && board.sees(world_rank)).then_some(Peer {
                rank: rank as i32,
                world_rank,
                lane: None,
                current: 1,
            })
        });
        let peers: Vec<Peer> = peers.collect();
        let partial = peers.len() + 1 < members.len();
        let mut own_rank = ranks.clone().filter(|&(_, &member)| member == own as i32);
        Channel {
            id,
            lane,
            rank: own_rank.next().map_or(-1, |(rank, _)| rank as i32),
            peers,
            former: Vec::new(),
            written: 0,
            rounds: 0,
            owed: VecDeque::new(),
            shared,
            partial,
            whole: !partial,
            stopped: false,
            closed: None,
        }
    }

    /// Says that this rank is about to take the step `record`: to launch a sequence, or to execute
    /// a collective. Whether all ranks launch this sequence, or execute this collective; if not,
    /// the launches are over. `words` describe the step.
    ///
    /// # Errors
    /// If the ranks differ, or one of them has left.
    #[inline]
    pub(super) fn step(
        &mut self,
        board: &Board,
        record: Record,
        words: impl Fn() -> String,
    ) -> Result<bool, Failure> {
        self.settle(board)?;
        if self.stopped {
            return Ok(true);
        }
        self.write(board, record);
        match self.rounds(board, record)? {
            Outcome::Same => {
                if self.whole {
                    RECORDER.met();
                }
                Ok(true)
            }
            Outcome::LaunchesAreOver | Outcome::UnlaunchedAreOver => Ok(false),
            Outcome::Differ => {
                self.close_if_partial();
                Err(self.explain(board, record.words(), words()))
            }
        }
    }

    /// Tells the others that this rank has refused an operation, and does not wait for them.
    pub(super) fn refuse(&mut self, board: &Board, record: Record, words: &str) {
        if self.settle(board).is_ok() && !self.stopped {
            board.write_text(self.key(self.rank, self.written + 1), words);
            self.owed.push_back(record);
            self.write(board, record);
        }
    }

    /// Tells the others that the program has refused a collective, without waiting for rounds that
    /// are not over; not if there are many of those.
    pub(super) fn refuse_unlaunched(&mut self, board: &Board, kind: Kind, words: &str) {
        if self.closed.is_none() && !self.stopped && self.owed.len() < MOST_OWED {
            let record = Record::RefusedUnlaunched(kind);
            board.write_text(self.key(self.rank, self.written + 1), words);
            self.owed.push_back(record);
            self.write(board, record);
        }
    }

    /// Tells the others that a launch has failed before a collective; if there is no room, once the
    /// others have come to the ones before.
    pub(super) fn refuse_of_launch(&mut self, board: &Board, kind: Kind, words: &str) {
        if self.owed.len() < MOST_OWED || self.settle(board).is_ok() {
            self.refuse_unlaunched(board, kind, words);
        }
    }

    /// The communicator is gone. The lane is given back later: a rank may see the last records of
    /// all others, end, and be here before another one has looked at its own.
    pub(super) fn retire(&mut self, board: &Board) -> Retired {
        self.closed = Some("the communicator has been freed".into());
        board.retire_lane(self.lane);
        let peers = self.peers.drain(..).chain(self.former.drain(..));
        let readers = peers.filter_map(|peer| {
            let lane = peer
                .lane
                .or_else(|| board.find_lane(peer.world_rank, self.id));
            Some((peer.world_rank, lane?))
        });
        Retired {
            id: self.id,
            lane: self.lane,
            readers: readers.collect(),
        }
    }

    /// Number of rounds that are over: ranks with the same number have taken the same steps. None
    /// if this rank has still to end a round, or the channel is not used any more.
    pub(super) fn position(&self) -> Option<u64> {
        let open = self.owed.is_empty() && self.closed.is_none() && !self.stopped;
        open.then_some(self.rounds)
    }

    /// Whether it is not used any more: a rank has gone, or ranks have differed.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// Those on other nodes hear of it otherwise.
    pub(super) fn is_told_elsewhere(&mut self) {
        self.partial = false;
    }

    /// Ends the rounds of operations that this rank has refused.
    #[inline]
    fn settle(&mut self, board: &Board) -> Result<(), Failure> {
        if let Some(closed) = &self.closed {
            return Err(closed.clone());
        }
        while let Some(own) = self.owed.pop_front() {
            if self.rounds(board, own)? == Outcome::Differ {
                self.close_if_partial();
                self.closed.clone().map_or(Ok(()), Err)?;
            }
        }
        Ok(())
    }

    /// The ranks of this node have differed. If those of other nodes hear of it is not known here.
    fn close_if_partial(&mut self) {
        if self.partial {
            self.closed = Some(OTHER_NODES.into());
        }
    }

    #[inline]
    fn write(&mut self, board: &Board, record: Record) {
        self.written += 1;
        board.write(self.lane, self.written, record.words());
    }

    /// Rounds until the own record is used up.
    #[inline]
    fn rounds(&mut self, board: &Board, record: Record) -> Result<Outcome, Failure> {
        let own = record.words();
        loop {
            let mut result = Outcome::Same;
            for index in 0..self.peers.len() {
                match self.wait(board, index) {
                    Ok(Some(theirs)) if theirs == own => {}
                    Ok(Some(_)) => result = Outcome::Differ,
                    Ok(None) => return Ok(self.stop()),
                    Err(failure) => {
                        self.closed = Some(failure.clone());
                        return Err(failure);
                    }
                }
            }
            // Who has come while another waited in vain may have been seen by some ranks alone.
            if self.shared {
                match self.any_has_stopped(board) {
                    Some(true) => return Ok(self.stop()),
                    Some(false) => {}
                    None => continue,
                }
            }
            if result == Outcome::Differ {
                let peers = self.peers.iter();
                result = outcome(&own, peers.filter_map(|peer| peer.record(board)));
            }
            self.use_up(board, result);
            if result.uses_up(&own) {
                return Ok(result);
            }
        }
    }

    /// Whether a rank that has come to this round goes on without comparing; none if it is about to
    /// find out. The same on all ranks that see the records of all.
    #[inline]
    fn any_has_stopped(&self, board: &Board) -> Option<bool> {
        fence(Ordering::SeqCst);
        let mut stopped = Some(false);
        for peer in &self.peers {
            match peer.has_stopped(board) {
                Some(true) => return Some(true),
                Some(false) => {}
                None => stopped = None,
            }
        }
        stopped
    }

    /// Compares nothing any more, as all the other ranks do that come to this round.
    #[cold]
    fn stop(&mut self) -> Outcome {
        self.stopped = true;
        self.former.append(&mut self.peers);
        self.owed.clear();
        Outcome::Same
    }

    #[inline]
    fn use_up(&mut self, board: &Board, outcome: Outcome) {
        self.rounds += 1;
        for peer in &mut self.peers {
            let all = matches!(outcome, Outcome::Same | Outcome::Differ);
            let used = all || peer.record(board).is_some_and(|r| outcome.uses_up(&r));
            peer.current += u64::from(used);
        }
    }

    /// The current record of a peer, once it is there; none if it may be elsewhere, and is not
    /// waited for any more.
    #[inline]
    fn wait(&mut self, board: &Board, index: usize) -> Result<Option<Words>, Failure> {
        if let Some(record) = self.peers[index].record(board) {
            return Ok(Some(record));
        }
        let start = Ticks::now();
        let record = self.wait_long(board, index);
        RECORDER.waited(start);
        record
    }

    fn wait_long(&mut self, board: &Board, index: usize) -> Result<Option<Words>, Failure> {
        let (id, shared, lane) = (self.id, self.shared, self.lane);
        let number = self.written - self.owed.len() as u64;
        let Peer {
            rank, world_rank, ..
        } = self.peers[index];
        let mut patience = Patience::new();
        let start = Instant::now();
        loop {
            let peer = &mut self.peers[index];
            let slept = patience.wait(board.bell(world_rank), || peer.look(board, id).is_some());
            if shared && peer.has_stopped(board) == Some(true) {
                return Ok(None);
            }
            let gone = slept.then(|| board.gone(world_rank)).flatten();
            if let Some(record) = peer.look(board, id) {
                return Ok(Some(record));
            }
            if let Some(gone) = gone {
                return Err(format!(
                    "rank {rank}, which this waits for, {gone}; look for an error of that rank, or \
                     for a collective that it does not execute: all ranks must execute the same \
                     ones in the same order"
                )
                .into());
            }
            if slept && shared && start.elapsed() > SHARED {
                if self.any_has_stopped(board) == Some(true) {
                    return Ok(None);
                }
                let peer = &mut self.peers[index];
                if board.stop_unless(lane, number, || peer.look(board, id).is_some()) {
                    log::line(&words::not_compared(board.rank(), world_rank));
                    return Ok(None);
                }
            }
        }
    }

    /// The error of ranks that differ, in the words of each.
    fn explain(&mut self, board: &Board, own: Words, own_words: String) -> Failure {
        board.write_text(self.key(self.rank, self.written), &own_words);
        let deadline = Instant::now() + EXPLAIN;
        let mut all = vec![(self.rank, own_words)];
        for peer in &self.peers {
            let number = peer.current - 1;
            let record = peer
                .lane
                .and_then(|lane| board.read(peer.world_rank, lane, number));
            // Who does the same says the same.
            let text = if record == Some(own) {
                Some(all[0].1.clone())
            } else {
                text_until(
                    board,
                    peer.world_rank,
                    self.key(peer.rank, number),
                    deadline,
                )
            };
            let text = text.or_else(|| record.map(|record| Record::describe(&record)));
            let unknown = || "something that it has not told".into();
            all.push((peer.rank, text.unwrap_or_else(unknown)));
        }
        let what = match Record::is_launch(&own) {
            true => "the ranks run different programs",
            false => "the ranks execute different operations",
        };
        words::differ(what, all).into()
    }

    /// What the text about a record of a rank of this channel is known by; not 0.
    fn key(&self, rank: i32, number: u64) -> u64 {
        let which = (number << 32 | rank as u32 as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (self.id ^ which).max(1)
    }
}

/// The words that a rank leaves under `key`, if it does before the deadline.
fn text_until(board: &Board, rank: usize, key: u64, deadline: Instant) -> Option<String> {
    loop {
        let text = board.text(rank, key);
        let left = deadline.saturating_duration_since(Instant::now());
        if text.is_some() || left.is_zero() || board.gone(rank).is_some() {
            return text;
        }
        std::thread::sleep(Duration::from_micros(200).min(left));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::compare::record::Sequence;
    use crate::node::segment::new_number;

    /// The boards of two ranks, of which one process has both.
    fn two_boards() -> [Board; 2] {
        let number = new_number();
        let mut boards = [0, 1].map(|rank| Board::make(number, rank, 2).unwrap());
        boards.iter_mut().for_each(Board::open);
        boards.iter().for_each(Board::unlink);
        boards
    }

    #[test]
    fn ranks_are_at_the_same_place_also_after_one_has_refused_a_step() {
        let boards = two_boards();
        let [mut first, mut second] = [0, 1].map(|rank: usize| {
            let lane = boards[rank].take_lane(9, 0).unwrap();
            Channel::new(&boards[rank], 9, lane, &[0, 1], false)
        });
        let record = Record::Launch(Sequence {
            first: Some(Kind::Barrier),
            ..Sequence::default()
        });
        first.refuse_unlaunched(&boards[0], Kind::Barrier, "a refusal");
        assert_eq!((first.position(), second.position()), (None, Some(0)));
        assert!(second.step(&boards[1], record, String::new).is_err());
        assert_eq!((first.position(), second.position()), (None, Some(1)));
        first.settle(&boards[0]).unwrap();
        assert_eq!(first.position(), Some(1));
    }

    #[test]
    fn who_frees_a_communicator_leaves_its_records_to_those_that_look_later() {
        const ID: u64 = 77;
        let [first, second] = &two_boards();
        let channel = |board: &Board| {
            let lane = board.take_lane(ID, 0).unwrap();
            (lane, Channel::new(board, ID, lane, &[0, 1], true))
        };
        let (early_lane, mut early) = channel(first);
        let (late_lane, mut late) = channel(second);
        let record = Record::Launch(Sequence::default());

        // The second rank has written its record, and has not looked at the other one yet.
        second.write(late_lane, 1, record.words());
        assert_eq!(early.step(first, record, String::new), Ok(true));
        let early = early.retire(first);
        assert!(!early.give_back(first));

        assert_eq!(late.step(second, record, String::new), Ok(true));
        assert!(!late.stopped);
        let late = late.retire(second);
        assert!(early.give_back(first));
        assert_eq!(first.take_lane(ID + 1, 0), Some(early_lane));
        assert!(late.give_back(second));
    }
}
