//! Ranks compare what they are about to do, before MPI sees it (`docs/checks.md`).
//!
//! MPI leaves it undefined what becomes of collectives that differ between ranks. Ranks of a node
//! see each other's steps in shared memory, so comparing them needs no message.

#![forbid(unsafe_code)]

mod channel;
mod exchange;
mod nodes;
mod outcome;
mod record;
#[cfg(test)]
mod tests;
mod unlaunched;
mod users;
mod within_node;
mod words;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mpi_shim_abi::{Kind, ShimOp};
use parking_lot::Mutex;

use crate::engine::order::Ticket;
use crate::engine::uniform::UniformProgram;
use crate::error::Failure;
use crate::mpi::communicators::{COLLECTIVES, Communicator};
use crate::node::board::Board;
use crate::operation::{OF_XLA, Operation};
pub(crate) use exchange::{ByMpi, Series};
pub(crate) use nodes::Progress;
use nodes::{BetweenNodes, Step, Told};
use record::{Compared, Record, Sequence};
use unlaunched::Unlaunched;
use users::{Messages, UsersComms, Who};
use within_node::{Come, FIXED, WithinNode, may_ask};

/// As what the start of a program for several devices counts: all of its ranks begin it.
const START: Kind = Kind::Barrier;

/// Compares the steps of this rank with those of the others on its node.
#[derive(Default)]
pub(crate) struct Comparison {
    board: Option<Arc<Board>>,
    /// With the ranks of other nodes.
    nodes: Option<BetweenNodes>,
    /// Of the communicators that always exist, by number.
    fixed: [Option<WithinNode>; FIXED],
    /// The communicators of the user, and those of replica groups.
    users: UsersComms,
    /// Handle of [`COLLECTIVES`], which the replica group of all ranks uses.
    collectives: Option<u64>,
    /// Launches in flight that are known to be one fixed sequence.
    launches: Mutex<Vec<(Ticket, Launch)>>,
    /// Sequences of operations in words.
    described: Mutex<HashMap<u64, (u64, String)>>,
    /// The kinds of their collectives, as far as they are known.
    kinds: Mutex<HashMap<u64, Arc<[Kind]>>>,
    /// What the program has refused, and the others have not been told yet.
    unlaunched: Unlaunched,
}

/// What is known of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// It is the same fixed sequence of operations wherever it runs.
    pub uniform: Option<UniformProgram>,
    /// Its collectives, if they are known before it runs.
    pub collectives: Option<KnownCollectives>,
    /// The main thread of this process has dispatched it.
    pub by_main_thread: bool,
}

/// Collectives of a program that are known before it runs.
#[derive(Clone, Copy, Debug)]
pub struct KnownCollectives {
    /// The program's name.
    pub program: &'static str,
    /// Number of the communicator of all of them.
    pub comm: i64,
    /// Their sequence, hashed; on [`COLLECTIVES`] it is the start of the program alone.
    pub sequence: u64,
}

impl Comparison {
    /// Over the board of this node, in a world of `size` ranks with that handle of
    /// [`COLLECTIVES`].
    pub(super) fn new(board: Arc<Board>, size: i32, collectives: Option<u64>) -> Comparison {
        let fixed = within_node::fixed(&board, size);
        Comparison {
            board: Some(board),
            fixed,
            collectives,
            ..Comparison::default()
        }
    }

    /// Compares with other nodes too, at each operation if `always`; those on communicators of the
    /// user's only then, by messages on `messages`, the handle of [`COLLECTIVES`].
    pub(super) fn between_nodes(&mut self, by: ByMpi, always: bool, rank: i32, messages: u64) {
        self.users.messages = always.then_some(Messages {
            shim: by.shim,
            comm: messages,
            rank,
        });
        self.collectives = Some(messages);
        let count = by.comms.len();
        self.nodes = Some(BetweenNodes::new(Box::new(by), count, always));
    }

    /// How far this rank is in comparing with other nodes, for the communicators that are.
    pub(super) fn progress(&self) -> Option<Arc<[Progress]>> {
        self.nodes.as_ref().map(|nodes| nodes.progress.clone())
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

    /// How many steps the ranks of this node have compared on the communicator `comm`, which always
    /// exists: those with the same number have taken the same ones. None if that is not known now.
    pub(super) fn position(&self, comm: i64) -> Option<u64> {
        if self.unlaunched.are_any() {
            return None;
        }
        let within = self.fixed.get(usize::try_from(comm).ok()?)?.as_ref()?;
        // Whoever holds it is in the middle of a step.
        within.channel.try_lock()?.position()
    }

    /// Whether these ranks of the world are all on this board.
    pub(super) fn sees(&self, members: &[i32]) -> bool {
        let board = self.board.as_ref();
        board.is_some_and(|board| members.iter().all(|&rank| board.sees(rank as usize)))
    }

    /// Says in words what a sequence of operations is; `code` is the same for those that differ
    /// only in how often their loops run.
    pub(super) fn describe(&self, sequence: u64, code: u64, words: &str) {
        let mut described = self.described.lock();
        described.insert(sequence, (code, words.to_owned()));
    }

    /// Says of which kinds the first collectives of a sequence are.
    pub(super) fn know_kinds(&self, sequence: u64, kinds: &[Kind]) {
        self.kinds.lock().insert(sequence, kinds.into());
    }

    /// Whether anything is compared.
    fn is_used(&self) -> bool {
        self.board.is_some() || self.nodes.is_some()
    }

    /// Notes a launch, until [`Comparison::forget`].
    pub(super) fn note(&self, ticket: Ticket, launch: Launch) {
        if self.is_used() {
            self.launches.lock().push((ticket, launch));
        }
    }

    /// A collective of the launch `ticket` has failed on that communicator.
    #[cold]
    pub(super) fn failed(&self, ticket: Ticket, comm: i64) {
        let comm = usize::try_from(comm).unwrap_or(FIXED);
        if let Some(Some(within)) = self.fixed.get(comm) {
            within.come_to(ticket, Come::Fails);
        }
    }

    /// The launch has ended.
    pub(super) fn forget(&self, ticket: Ticket) {
        if self.is_used() {
            self.launches.lock().retain(|(known, _)| *known != ticket);
            if self.unlaunched.are_any() {
                self.tell_unlaunched();
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
        prepared: Result<&ShimOp, &Failure>,
        members: impl FnOnce() -> Option<Vec<i32>>,
    ) -> Result<(), Failure> {
        if comm.size == 1 {
            return Ok(());
        }
        if (op.comm as usize) < FIXED {
            return self.on_fixed(op.comm, ticket, op, prepared);
        }
        let is_xlas = op.of == Some(OF_XLA);
        if is_xlas && Some(comm.handle) == self.collectives {
            return self.on_fixed(COLLECTIVES, ticket, op, prepared);
        }
        if self.board.is_none() && self.users.messages.is_none() {
            return Ok(());
        }
        let who = || match is_xlas {
            true => members().map(|members| Who::group(op.comm, members)),
            false => members()
                .filter(|_| self.is_by_main_thread(ticket))
                .map(Who::users),
        };
        let users = self.users.get(op.comm, self.board.as_ref(), who);
        let within = users.within.as_ref();
        if is_xlas && self.board.is_some() && within.is_none() {
            return Err(NO_LANE.into());
        }
        let on_node = self.compare_within(within, ticket, op, prepared);
        match &users.between {
            Some(nodes) if may_ask(&on_node, within) => {
                self.compare_between(nodes, 0, ticket, op, prepared, on_node)
            }
            _ => on_node,
        }
    }

    /// The same on the communicator of that number, which always exists.
    #[inline]
    fn on_fixed(
        &self,
        number: i64,
        ticket: Ticket,
        op: &Operation<'_>,
        prepared: Result<&ShimOp, &Failure>,
    ) -> Result<(), Failure> {
        let within = self.fixed[number as usize].as_ref();
        let on_node = self.compare_within(within, ticket, op, prepared);
        match &self.nodes {
            Some(nodes) if may_ask(&on_node, within) => match Series::of(number) {
                Some(series) => {
                    self.compare_between(nodes, series as usize, ticket, op, prepared, on_node)
                }
                None => on_node,
            },
            _ => on_node,
        }
    }

    #[inline]
    fn compare_within(
        &self,
        within: Option<&WithinNode>,
        ticket: Ticket,
        op: &Operation<'_>,
        prepared: Result<&ShimOp, &Failure>,
    ) -> Result<(), Failure> {
        match (&self.board, within) {
            (Some(board), Some(within)) => self
                .compare(board, within, ticket, op, prepared)
                .inspect_err(|_| within.come_to(ticket, Come::Fails)),
            _ => Ok(()),
        }
    }

    #[inline]
    fn compare(
        &self,
        board: &Board,
        within: &WithinNode,
        ticket: Ticket,
        op: &Operation<'_>,
        prepared: Result<&ShimOp, &Failure>,
    ) -> Result<(), Failure> {
        if ticket.0 != 0 && within.same.load(Ordering::Relaxed) == ticket.0 {
            return Ok(());
        }
        let mut channel = within.channel.lock();
        if self.unlaunched.are_any() {
            self.tell_unlaunched_before(ticket, op.comm, &mut channel, board);
        }
        let shim_op = match prepared {
            Ok(shim_op) => shim_op,
            Err(reason) => {
                channel.refuse(board, Record::Refused(op.kind), &refused(op, reason));
                within.come_to(ticket, Come::Fails);
                return Ok(());
            }
        };
        within.come_to(ticket, Come::Next);
        if within.apart.load(Ordering::Relaxed) != ticket.0 {
            if let Some((sequence, words)) = self.described(ticket, op) {
                let launch = Record::Launch(sequence);
                if channel.step(board, launch, || words.clone())? {
                    within.come_to(ticket, Come::ToAll);
                    within.same.store(ticket.0, Ordering::Relaxed);
                    return Ok(());
                }
            }
            within.apart.store(ticket.0, Ordering::Relaxed);
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

    /// Compares `op` with other nodes, when this one has, on a communicator of theirs.
    fn compare_between(
        &self,
        nodes: &BetweenNodes,
        index: usize,
        ticket: Ticket,
        op: &Operation<'_>,
        prepared: Result<&ShimOp, &Failure>,
        on_node: Result<(), Failure>,
    ) -> Result<(), Failure> {
        let record = match prepared {
            Ok(shim_op) => Record::Operation(Compared::new(op, shim_op)),
            Err(_) => Record::Refused(op.kind),
        };
        let step = match (on_node, prepared) {
            (Ok(()), Ok(_)) => Step::Execute(record.words()),
            (Ok(()), Err(reason)) => Step::Refuse(record.words(), reason.clone()),
            (Err(failure), _) => Step::Differ(record.words(), failure),
        };
        let sequence = || self.sequence_or_place(ticket, op);
        let words = |told| match (told, prepared, sequence()) {
            (Told::Sequence, _, Some((_, words))) => words,
            (_, Ok(_), _) => self.in_words(op),
            (_, Err(reason), _) => refused(op, reason),
        };
        nodes.step(index, step, || sequence().map(|(it, _)| it), words)
    }

    /// The sequence that `op` is in, or its place in a program, with words.
    fn sequence_or_place(&self, ticket: Ticket, op: &Operation<'_>) -> Option<(Sequence, String)> {
        let place = || Sequence {
            hash: op.place,
            code: record::program(op.place),
            first: None,
        };
        let sequence = self.described(ticket, op);
        sequence.or_else(|| (op.place != 0).then(|| (place(), self.in_words(op))))
    }

    /// The fixed sequence that `op` is in, if it is one, with words.
    fn described(&self, ticket: Ticket, op: &Operation<'_>) -> Option<(Sequence, String)> {
        let hash = self.sequence(ticket, op.comm)?;
        let described = self.described.lock().get(&hash).cloned();
        let begins = || format!("a program that begins with {op}");
        let (code, words) = described.unwrap_or_else(|| (0, begins()));
        let first = Some(op.kind);
        Some((Sequence { hash, code, first }, words))
    }

    /// Compares a launch with collectives of XLA's that all ranks run.
    pub(super) fn launch(
        &self,
        ticket: Ticket,
        sequence: u64,
        words: impl Fn() -> String,
    ) -> Result<bool, Failure> {
        let within = self.fixed[COLLECTIVES as usize].as_ref();
        if let Some(within) = within {
            within.come_to(ticket, Come::ToAll);
        }
        // All ranks run the same programs of this kind.
        let record = Record::Launch(Sequence {
            hash: sequence,
            code: record::PROGRAMS,
            first: Some(START),
        });
        let on_node = match (&self.board, within) {
            (Some(board), Some(within)) => within.channel.lock().step(board, record, &words),
            _ => Ok(true),
        };
        let nodes = match &self.nodes {
            Some(nodes) if may_ask(&on_node, within) => nodes,
            _ => return on_node,
        };
        let step = match on_node {
            Ok(_) => Step::Execute(record.words()),
            Err(failure) => Step::Differ(record.words(), failure),
        };
        nodes.step(Series::Programs as usize, step, || None, |_| words())?;
        Ok(true)
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

    /// Whether the main thread has dispatched this launch.
    fn is_by_main_thread(&self, ticket: Ticket) -> bool {
        let launches = self.launches.lock();
        let launch = launches.iter().find(|(known, _)| *known == ticket);
        launch.is_some_and(|(_, launch)| launch.by_main_thread)
    }

    /// The communicator of the user's was freed.
    pub(super) fn free(&self, number: i64) {
        self.users.free(number, self.board.as_ref());
    }
}

/// Why a collective of a replica group is refused that cannot be compared.
const NO_LANE: &str = "this rank compares collectives on so many communicators already that there \
    is no room for this one; use fewer meshes and communicators in one process";

/// What is said of an operation that this rank refuses before it communicates.
pub(super) fn refused(op: &Operation<'_>, reason: &Failure) -> String {
    format!("{op}, which it refused: {reason}")
}
