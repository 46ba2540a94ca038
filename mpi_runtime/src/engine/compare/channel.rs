//! One communicator's lane on the board, and the rounds in which its ranks compare their steps.
//!
//! In a round each rank has one current record, and waits until it sees those of all others. What
//! follows from them is the same on all ranks, since all see the same records:
//!
//! | current records | outcome |
//! | --- | --- |
//! | all are launches of the same sequence | nothing in these launches needs to be compared |
//! | launches of the same code with loops of other lengths | all ranks fail |
//! | other launches, and operations | the launches are over; their operations are compared |
//! | the same operation everywhere | it may run |
//! | different operations, or a refused one | all ranks fail |
//!
//! Ranks that fail have used up the same records, so a program may go on after the error.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use mpi_shim_abi::Kind;

use crate::engine::compare::record::Record;
use crate::engine::compare::words;
use crate::engine::recorder::RECORDER;
use crate::engine::recorder::clock::Ticks;
use crate::error::Failure;
use crate::node::board::{Board, RECORD, RecordNumber};
use crate::node::patience::Patience;

/// How long a rank waits for the others' words once it knows that they differ.
const EXPLAIN: Duration = Duration::from_secs(2);
/// How long a rank waits for one that may be in a call of mpi4py's on the same communicator.
const SHARED: Duration = Duration::from_secs(10);

type Words = [u64; RECORD];

/// Where the ranks of a communicator compare what they do.
pub(super) struct Channel {
    id: u64,
    lane: usize,
    /// Rank of this process in the communicator.
    rank: i32,
    peers: Vec<Peer>,
    /// The records that this rank has written.
    written: u64,
    /// Refused operations whose rounds are not over: this rank did not wait for the others.
    owed: Option<Record>,
    /// The user's, who may use it with mpi4py too.
    shared: bool,
    /// The notes that this rank has seen, its own among them: a new one makes all current records
    /// void, and each rank writes its own again.
    epoch: u64,
    /// The record beside which this rank has left its last notes, and how many.
    noted: (u64, u64),
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
    /// The notes of it that this rank has seen.
    seen: u64,
}

/// Says that a rank has refused a collective where it would have written its next record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Note {
    kind: u64,
    record: u64,
}

impl Note {
    const NONE: Note = Note { kind: 0, record: 0 };

    fn new(kind: Kind, record: u64) -> Note {
        let kind = kind as u64 + 1;
        Note { kind, record }
    }

    fn word(self) -> u64 {
        self.kind | self.record << 8
    }

    fn from_word(word: u64) -> Note {
        Note {
            kind: word & 0xff,
            record: word >> 8,
        }
    }
}

impl Peer {
    /// Its current record, if it is there.
    #[inline]
    fn record(&self, board: &Board, epoch: u64) -> Option<Words> {
        let number = RecordNumber {
            number: self.current,
            epoch,
        };
        board.read(self.world_rank, self.lane?, number)
    }

    /// A note about its current record that this rank has not seen: how many there are of it, and
    /// the last.
    #[inline]
    fn unseen(&self, board: &Board) -> Option<(u64, Note)> {
        let (notes, last) = board.notes(self.world_rank, self.lane?);
        if notes == self.seen {
            return None;
        }
        // It may have gone on, and left one about its next record.
        let last = Note::from_word(last);
        (last.record == self.current).then_some((notes, last))
    }
}

/// What a rank sees of another one.
enum Seen {
    Record(Words),
    /// The peer of that index has left notes: how many, and the last.
    Note(usize, u64, Note),
    /// It may be elsewhere, and is not waited for any more.
    Nothing,
}

/// What follows from a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Same,
    Differ,
    /// Some ranks have launched a sequence, and some execute operations.
    LaunchesAreOver,
    /// The peer of that index has refused it.
    Refused(usize),
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
                seen: 0,
            })
        });
        let mut own_rank = ranks.clone().filter(|&(_, &member)| member == own as i32);
        Channel {
            id,
            lane,
            rank: own_rank.next().map_or(-1, |(rank, _)| rank as i32),
            peers: peers.collect(),
            written: 0,
            owed: None,
            shared,
            epoch: 0,
            noted: (0, 0),
            closed: None,
        }
    }

    /// Says that this rank is about to take the step `record`: to launch a sequence, or to execute
    /// a collective. Whether all ranks launch this sequence, or execute this collective; if not,
    /// the launches are over. `words` describe the step.
    ///
    /// # Errors
    /// If the ranks differ, or one has refused what this one is about to do.
    #[inline]
    pub(super) fn step(
        &mut self,
        board: &Board,
        record: Record,
        words: impl Fn() -> String,
    ) -> Result<bool, Failure> {
        self.settle(board)?;
        self.written += 1;
        match self.rounds(board, record)? {
            Outcome::Same => Ok(true),
            Outcome::LaunchesAreOver => Ok(false),
            Outcome::Differ => Err(self.explain(board, record.words(), words())),
            Outcome::Refused(index) => {
                // Nobody has used up the record.
                self.written -= 1;
                Err(self.explain_refusal(board, index))
            }
        }
    }

    /// Tells the others that this rank has refused a collective before it could be compared: those
    /// that are about to execute one of that kind fail. The place of this rank stays the same.
    pub(super) fn note(&mut self, board: &Board, kind: Kind, words: &str) {
        if self.settle(board).is_ok() {
            let note = Note::new(kind, self.written + 1);
            let (record, count) = self.noted;
            let before = if record == note.record { count } else { 0 };
            self.noted = (note.record, before + 1);
            self.epoch += 1;
            board.write_text(self.key(self.rank, note.word() << 16), words);
            board.leave_note(self.lane, note.word());
        }
    }

    /// Tells the others that this rank has refused an operation, and does not wait for them.
    pub(super) fn refuse(&mut self, board: &Board, record: Record, words: &str) {
        if self.settle(board).is_ok() {
            self.written += 1;
            board.write_text(self.key(self.rank, self.written), words);
            self.owed = Some(record);
            self.write(board, record);
        }
    }

    /// The communicator is gone: gives the lane back.
    pub(super) fn give_back(&mut self, board: &Board) {
        self.closed = Some("the communicator has been freed".into());
        board.free_lane(self.lane);
    }

    /// Ends the round of an operation that this rank has refused.
    fn settle(&mut self, board: &Board) -> Result<(), Failure> {
        if let Some(closed) = &self.closed {
            return Err(closed.clone());
        }
        match self.owed.take() {
            Some(own) => self.rounds(board, own).map(drop),
            None => Ok(()),
        }
    }

    #[inline]
    fn write(&self, board: &Board, record: Record) {
        let number = RecordNumber {
            number: self.written,
            epoch: self.epoch,
        };
        board.write(self.lane, number, record.words());
    }

    /// Rounds until the own record is used up.
    #[inline]
    fn rounds(&mut self, board: &Board, record: Record) -> Result<Outcome, Failure> {
        let own = record.words();
        'again: loop {
            self.write(board, record);
            let mut outcome = Outcome::Same;
            for index in 0..self.peers.len() {
                let theirs = match self.wait(board, index) {
                    Ok(Seen::Record(theirs)) => theirs,
                    Ok(Seen::Note(of, notes, note)) => match self.see(of, notes, note, record) {
                        Some(refused) => return Ok(refused),
                        None => continue 'again,
                    },
                    Ok(Seen::Nothing) => {
                        self.peers.clear();
                        return Ok(Outcome::Same);
                    }
                    Err(failure) => {
                        self.closed = Some(failure.clone());
                        return Err(failure);
                    }
                };
                if theirs != own {
                    outcome = Outcome::Differ;
                }
            }
            if outcome == Outcome::Differ || Record::is_refusal(&own) {
                outcome = self.outcome(board, own);
            }
            self.use_up(board, outcome);
            if outcome != Outcome::LaunchesAreOver || Record::is_launch(&own) {
                return Ok(outcome);
            }
        }
    }

    /// What follows from the current records, if they are not the same.
    #[cold]
    fn outcome(&self, board: &Board, own: Words) -> Outcome {
        let peers = self.peers.iter();
        outcome(
            &own,
            peers.filter_map(|peer| peer.record(board, self.epoch)),
        )
    }

    #[inline]
    fn use_up(&mut self, board: &Board, outcome: Outcome) {
        for peer in &mut self.peers {
            let stays = outcome == Outcome::LaunchesAreOver
                && !peer
                    .record(board, self.epoch)
                    .is_some_and(|record| Record::is_launch(&record));
            peer.current += u64::from(!stays);
        }
    }

    /// Takes notice of a peer's notes, which make all current records void. Whether it has refused
    /// the very thing that this rank is about to do, and this rank has not.
    #[cold]
    fn see(&mut self, index: usize, notes: u64, note: Note, own: Record) -> Option<Outcome> {
        let peer = &mut self.peers[index];
        let new = notes - peer.seen;
        peer.seen = notes;
        self.epoch += new;
        let kind = own.kind().map_or(0, |kind| kind as u64 + 1);
        let concerns = note.kind == kind;
        // Ranks that refuse as much here refuse alike.
        let matched = self.noted.0 == self.written && self.noted.1 >= new;
        (concerns && !matched).then_some(Outcome::Refused(index))
    }

    /// The error of a refusal, in the words of the rank that has refused.
    #[cold]
    fn explain_refusal(&self, board: &Board, index: usize) -> Failure {
        let peer = &self.peers[index];
        let note = Note {
            record: peer.current,
            ..peer.lane.map_or(Note::NONE, |lane| {
                Note::from_word(board.notes(peer.world_rank, lane).1)
            })
        };
        let text = board.text(peer.world_rank, self.key(peer.rank, note.word() << 16));
        let text = text.unwrap_or_else(|| "its arguments are wrong".into());
        format!("rank {} has refused it: {text}", peer.rank).into()
    }

    /// The current record of a peer or a note, once it is there.
    #[inline]
    fn wait(&mut self, board: &Board, index: usize) -> Result<Seen, Failure> {
        let epoch = self.epoch;
        let peer = &self.peers[index];
        if let Some(record) = peer.record(board, epoch) {
            return Ok(match peer.unseen(board) {
                None => Seen::Record(record),
                Some((notes, note)) => Seen::Note(index, notes, note),
            });
        }
        let start = Ticks::now();
        let seen = self.wait_long(board, index);
        RECORDER.waited(start);
        seen
    }

    fn wait_long(&mut self, board: &Board, index: usize) -> Result<Seen, Failure> {
        let (rank, world_rank) = (self.peers[index].rank, self.peers[index].world_rank);
        let mut patience = Patience::new();
        let start = Instant::now();
        loop {
            let slept = patience.wait(board.bell(world_rank), || self.look(board, index).is_some());
            let gone = slept.then(|| board.gone(world_rank)).flatten();
            if let Some(seen) = self.look(board, index) {
                return Ok(seen);
            }
            if let Some(gone) = gone {
                return Err(format!(
                    "rank {rank}, which this waits for, {gone}; all ranks must execute the same \
                     collectives in the same order"
                )
                .into());
            }
            if slept && self.shared && start.elapsed() > SHARED {
                return Ok(Seen::Nothing);
            }
        }
    }

    /// The current record of a peer, or a note of any.
    fn look(&mut self, board: &Board, index: usize) -> Option<Seen> {
        let (id, epoch) = (self.id, self.epoch);
        for peer in &mut self.peers {
            if peer.lane.is_none() {
                peer.lane = board.find_lane(peer.world_rank, id);
            }
        }
        let record = self.peers[index].record(board, epoch).map(Seen::Record);
        // A record may not come any more since a note has made it void. A note stands before the
        // record that comes after it.
        let mut peers = self.peers.iter().enumerate();
        let note = peers.find_map(|(index, peer)| {
            let (notes, note) = peer.unseen(board)?;
            Some(Seen::Note(index, notes, note))
        });
        note.or(record)
    }

    /// The error of ranks that differ, in the words of each.
    fn explain(&mut self, board: &Board, own: Words, own_words: String) -> Failure {
        board.write_text(self.key(self.rank, self.written), &own_words);
        let deadline = Instant::now() + EXPLAIN;
        let mut all = vec![(self.rank, own_words)];
        for peer in &self.peers {
            let number = peer.current - 1;
            let at = RecordNumber {
                number,
                epoch: self.epoch,
            };
            let record = peer
                .lane
                .and_then(|lane| board.read(peer.world_rank, lane, at));
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
        let place = (number << 32 | rank as u32 as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (self.id ^ place).max(1)
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

/// What follows when this rank's record is `own` and the others', of which not all are the same,
/// are `others`.
#[cold]
fn outcome(own: &Words, others: impl Iterator<Item = Words> + Clone) -> Outcome {
    let all = || others.clone().chain([*own]);
    let launches = || all().filter(Record::is_launch);
    // Few ranks differ, if any, so that this is quadratic does not matter.
    let clash = |one: Words| launches().any(|other| Record::clash(&one, &other));
    if launches().next().is_none() || launches().any(clash) {
        Outcome::Differ
    } else {
        Outcome::LaunchesAreOver
    }
}
