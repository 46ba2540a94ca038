//! Ranks compare what they are about to do, before MPI sees it (`docs/checks.md`).
//!
//! MPI leaves it undefined what becomes of collectives that differ between ranks. Ranks of a node
//! see each other's steps in shared memory, so comparing them needs no message.

#![forbid(unsafe_code)]

mod channel;
mod declined;
mod record;
#[cfg(test)]
mod tests;
mod words;

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mpi_shim_abi::ShimOp;
use parking_lot::{Mutex, RwLock};

use crate::engine::order::Ticket;
use crate::engine::uniform::UniformProgram;
use crate::error::Failure;
use crate::mpi::communicators::{COLLECTIVES, Communicator, DEFAULT, WORLD};
use crate::node::board::Board;
use crate::operation::Operation;
use channel::Channel;
use declined::Declined;
use record::{Compared, Record, Sequence};

/// Lanes of the communicators that always exist: their numbers.
const FIXED: usize = 4;

/// Compares the steps of this rank with those of the others on its node.
#[derive(Default)]
pub(crate) struct Comparison {
    board: Option<Arc<Board>>,
    /// Of the communicators that always exist, by number.
    fixed: [Option<Row>; FIXED],
    /// Of the user's communicators, by number; none where nothing can be compared.
    users: RwLock<BTreeMap<i64, Option<Arc<Row>>>>,
    /// How many channels there are with these members.
    ordinals: Mutex<HashMap<Vec<i32>, u64>>,
    /// Launches in flight that are known to be one fixed sequence.
    launches: Mutex<Vec<(Ticket, Launch)>>,
    /// Sequences of operations in words.
    described: Mutex<HashMap<u64, (u64, String)>>,
    /// What the program has refused, and the others have not been told yet.
    declined: Declined,
}

/// What is known of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// It is the same fixed sequence of operations wherever it runs.
    pub uniform: Option<UniformProgram>,
    /// The main thread of this process has dispatched it.
    pub by_main_thread: bool,
}

struct Row {
    channel: Mutex<Channel>,
    /// A launch that all ranks have launched: what is in it need not be compared.
    same: AtomicU32,
    /// A launch that was looked up, and whose operations are compared one by one.
    apart: AtomicU32,
}

impl Row {
    fn new(channel: Channel) -> Row {
        Row {
            channel: Mutex::new(channel),
            same: AtomicU32::new(0),
            apart: AtomicU32::new(0),
        }
    }
}

impl Comparison {
    /// Over the board of this node, in a world of `size` ranks.
    pub(super) fn new(board: Arc<Board>, size: i32) -> Comparison {
        let members: Vec<i32> = (0..size).collect();
        let mut fixed = [const { None }; FIXED];
        for number in [WORLD, DEFAULT, COLLECTIVES] {
            let (id, lane) = (number as u64 + 1, number as usize);
            if board.take_lane(id, lane) == Some(lane) {
                let channel = Channel::new(&board, id, lane, &members, false);
                fixed[lane] = Some(Row::new(channel));
            }
        }
        Comparison {
            board: Some(board),
            fixed,
            ..Comparison::default()
        }
    }

    /// The board, if the ranks of this node have one.
    pub(super) fn board(&self) -> Option<&Arc<Board>> {
        self.board.as_ref()
    }

    /// Whether the others of a world of `size` ranks are all on this board.
    pub(super) fn sees_everybody(&self, size: usize) -> bool {
        self.board
            .as_ref()
            .is_some_and(|board| board.ranks() == size)
    }

    /// Says in words what a sequence of operations is; `code` is the same for those that differ
    /// only in how often their loops run.
    pub(super) fn describe(&self, sequence: u64, code: u64, words: &str) {
        let mut described = self.described.lock();
        described.insert(sequence, (code, words.to_owned()));
    }

    /// Notes a launch, until [`Comparison::forget`].
    pub(super) fn note(&self, ticket: Ticket, launch: Launch) {
        if self.board.is_some() {
            self.launches.lock().push((ticket, launch));
        }
    }

    /// The launch has ended.
    pub(super) fn forget(&self, ticket: Ticket) {
        if self.board.is_some() {
            self.launches.lock().retain(|(known, _)| *known != ticket);
            if self.declined.are_any() {
                self.tell_declined();
            }
        }
    }

    /// Compares `op` of the launch `ticket`, which is a collective, with what the others are about
    /// to do. `prepared` is what MPI would execute, or why this rank refuses it: then the others
    /// are told. `members` says which ranks of the world are in the communicator.
    ///
    /// # Errors
    /// If the ranks differ, with what each of them does.
    #[inline]
    pub(super) fn operation(
        &self,
        ticket: Ticket,
        op: &Operation<'_>,
        comm: &Communicator,
        prepared: &Result<ShimOp, Failure>,
        members: impl FnOnce() -> Option<Vec<i32>>,
    ) -> Result<(), Failure> {
        let Some(board) = &self.board else {
            return Ok(());
        };
        if comm.size == 1 {
            return Ok(());
        }
        let fixed = self.fixed.get(op.comm as usize).and_then(Option::as_ref);
        if let Some(row) = fixed {
            return self.compare(board, row, ticket, op, prepared);
        }
        match self.users_row(board, ticket, op.comm, members) {
            Some(row) => self.compare(board, &row, ticket, op, prepared),
            None => Ok(()),
        }
    }

    #[inline]
    fn compare(
        &self,
        board: &Board,
        row: &Row,
        ticket: Ticket,
        op: &Operation<'_>,
        prepared: &Result<ShimOp, Failure>,
    ) -> Result<(), Failure> {
        if ticket.0 != 0 && row.same.load(Ordering::Relaxed) == ticket.0 {
            return Ok(());
        }
        let mut channel = row.channel.lock();
        if self.declined.are_any() {
            self.tell_declined_before(ticket, op.comm, &mut channel, board);
        }
        let shim_op = match prepared {
            Ok(shim_op) => shim_op,
            Err(reason) => {
                let words = format!("{op}, which it refused: {reason}");
                channel.refuse(board, Record::Refused(op.kind), &words);
                return Ok(());
            }
        };
        if row.apart.load(Ordering::Relaxed) != ticket.0 {
            if let Some(sequence) = self.sequence(ticket, op.comm) {
                let described = self.described.lock().get(&sequence).cloned();
                let begins = || format!("a program that begins with {op}");
                let (code, words) = described.unwrap_or_else(|| (0, begins()));
                let launch = Record::Launch(Sequence {
                    hash: sequence,
                    code,
                    first: Some(op.kind),
                });
                if channel.step(board, launch, || words.clone())? {
                    row.same.store(ticket.0, Ordering::Relaxed);
                    return Ok(());
                }
            }
            row.apart.store(ticket.0, Ordering::Relaxed);
        }
        let record = Record::Operation(Compared::new(op, shim_op));
        let words = || self.in_words(op);
        channel.step(board, record, words).map(drop)
    }

    /// What an operation is and, if that is known, where it stands.
    fn in_words(&self, op: &Operation<'_>) -> String {
        match self.described.lock().get(&op.place) {
            Some((_, place)) if op.place != 0 => format!("{op} {place}"),
            _ => op.to_string(),
        }
    }

    /// Compares a launch with collectives of XLA's that all ranks run.
    pub(super) fn launch(
        &self,
        sequence: u64,
        words: impl Fn() -> String,
    ) -> Result<bool, Failure> {
        let row = self.fixed[COLLECTIVES as usize].as_ref();
        match (&self.board, row) {
            (Some(board), Some(row)) => {
                // All ranks run the same programs of this kind.
                let record = Record::Launch(Sequence {
                    hash: sequence,
                    code: 1,
                    first: None,
                });
                row.channel.lock().step(board, record, words)
            }
            _ => Ok(true),
        }
    }

    /// The sequence of a launch whose operations are all on `comm`, if it is fixed, and can be
    /// compared as a whole.
    fn sequence(&self, ticket: Ticket, comm: i64) -> Option<u64> {
        let launches = self.launches.lock();
        let (_, launch) = launches.iter().find(|(known, _)| *known == ticket)?;
        let uniform = launch.uniform.filter(|uniform| uniform.comm == comm)?;
        // What ranks exchange may depend on them.
        uniform.balance.is_none().then_some(uniform.sequence)
    }

    /// The row of a communicator of the user's, made for its first collective. Ranks know it by
    /// its members and by how many with these members came before. That is the same on all of them
    /// as long as one thread uses them, so those of other threads are not compared.
    fn users_row(
        &self,
        board: &Board,
        ticket: Ticket,
        number: i64,
        members: impl FnOnce() -> Option<Vec<i32>>,
    ) -> Option<Arc<Row>> {
        if let Some(known) = self.users.read().get(&number) {
            return known.clone();
        }
        let launches = self.launches.lock();
        let launch = launches.iter().find(|(known, _)| *known == ticket);
        let by_main_thread = launch.is_some_and(|(_, launch)| launch.by_main_thread);
        drop(launches);
        let row = members().filter(|_| by_main_thread).and_then(|members| {
            let id = self.next_id(&members);
            let lane = board.take_lane(id, FIXED)?;
            let channel = Channel::new(board, id, lane, &members, true);
            Some(Arc::new(Row::new(channel)))
        });
        self.users.write().insert(number, row.clone());
        row
    }

    /// The communicator was freed.
    pub(super) fn free(&self, number: i64) {
        let row = self.users.write().remove(&number).flatten();
        if let (Some(board), Some(row)) = (&self.board, row) {
            row.channel.lock().give_back(board);
        }
    }

    fn next_id(&self, members: &[i32]) -> u64 {
        let mut ordinals = self.ordinals.lock();
        let ordinal = ordinals.entry(members.to_vec()).or_default();
        *ordinal += 1;
        let mut hasher = DefaultHasher::new();
        (members, *ordinal).hash(&mut hasher);
        hasher.finish().max(FIXED as u64 + 1)
    }
}
