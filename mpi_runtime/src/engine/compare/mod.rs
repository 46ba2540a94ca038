//! Ranks compare what they are about to do, before MPI sees it (`docs/checks.md`).
//!
//! MPI leaves it undefined what becomes of collectives that differ between ranks. Ranks of a node
//! see each other's steps in shared memory, so comparing them needs no message.

#![forbid(unsafe_code)]

mod channel;
mod declined;
mod exchange;
mod nodes;
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
use crate::engine::post::tags_of;
use crate::engine::uniform::UniformProgram;
use crate::error::Failure;
use crate::mpi::communicators::{COLLECTIVES, Communicator, DEFAULT, WORLD};
use crate::mpi::shim::Shim;
use crate::node::board::Board;
use crate::operation::Operation;
use channel::Channel;
use declined::Declined;
use exchange::ByMessages;
pub(crate) use exchange::ByMpi;
pub(crate) use nodes::Progress;
use nodes::{BetweenNodes, Step, Told};
use record::{Compared, Record, Sequence};

/// Where programs for several devices are compared between nodes.
const PROGRAMS: usize = 2;
/// Lanes of the communicators that always exist: their numbers.
const FIXED: usize = 4;

/// Compares the steps of this rank with those of the others on its node.
#[derive(Default)]
pub(crate) struct Comparison {
    board: Option<Arc<Board>>,
    /// With the ranks of other nodes.
    nodes: Option<BetweenNodes>,
    /// Of the communicators that always exist, by number.
    fixed: [Option<Row>; FIXED],
    /// How communicators of the user's are compared between nodes, if they are.
    messages: Option<Messages>,
    /// Of the user's communicators, by number.
    users: RwLock<BTreeMap<i64, Arc<Users>>>,
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

/// How ranks of a communicator of the user's tell each other what they do.
struct Messages {
    shim: Shim,
    /// Handle of a communicator of ours.
    comm: u64,
    /// In the world.
    rank: i32,
}

/// Of a communicator of the user's.
#[derive(Default)]
struct Users {
    row: Option<Row>,
    nodes: Option<BetweenNodes>,
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

    /// Compares with other nodes too, at each operation if `always`; those on communicators of the
    /// user's only then, by messages on the communicator `messages`.
    pub(super) fn between_nodes(&mut self, by: ByMpi, always: bool, rank: i32, messages: u64) {
        self.messages = always.then_some(Messages {
            shim: by.shim,
            comm: messages,
            rank,
        });
        let places = by.comms.len();
        self.nodes = Some(BetweenNodes::new(Box::new(by), places, always));
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

    /// Says in words what a sequence of operations is; `code` is the same for those that differ
    /// only in how often their loops run.
    pub(super) fn describe(&self, sequence: u64, code: u64, words: &str) {
        let mut described = self.described.lock();
        described.insert(sequence, (code, words.to_owned()));
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

    /// The launch has ended.
    pub(super) fn forget(&self, ticket: Ticket) {
        if self.is_used() {
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
        prepared: Result<&ShimOp, &Failure>,
        members: impl FnOnce() -> Option<Vec<i32>>,
    ) -> Result<(), Failure> {
        if comm.size == 1 {
            return Ok(());
        }
        let place = op.comm as usize;
        if place < FIXED {
            let row = self.fixed[place].as_ref();
            let on_node = self.on_node(row, ticket, op, prepared);
            return match &self.nodes {
                Some(nodes) if may_ask(&on_node, row) => {
                    self.between(nodes, place, ticket, op, prepared, on_node)
                }
                _ => on_node,
            };
        }
        if self.board.is_none() && self.messages.is_none() {
            return Ok(());
        }
        let users = self.users_comm(ticket, op.comm, members);
        let row = users.row.as_ref();
        let on_node = self.on_node(row, ticket, op, prepared);
        match &users.nodes {
            Some(nodes) if may_ask(&on_node, row) => {
                self.between(nodes, 0, ticket, op, prepared, on_node)
            }
            _ => on_node,
        }
    }

    #[inline]
    fn on_node(
        &self,
        row: Option<&Row>,
        ticket: Ticket,
        op: &Operation<'_>,
        prepared: Result<&ShimOp, &Failure>,
    ) -> Result<(), Failure> {
        match (&self.board, row) {
            (Some(board), Some(row)) => self.compare(board, row, ticket, op, prepared),
            _ => Ok(()),
        }
    }

    #[inline]
    fn compare(
        &self,
        board: &Board,
        row: &Row,
        ticket: Ticket,
        op: &Operation<'_>,
        prepared: Result<&ShimOp, &Failure>,
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
                channel.refuse(board, Record::Refused(op.kind), &refused(op, reason));
                return Ok(());
            }
        };
        if row.apart.load(Ordering::Relaxed) != ticket.0 {
            if let Some((sequence, words)) = self.described(ticket, op) {
                let launch = Record::Launch(sequence);
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

    /// Compares `op` with other nodes, when this one has.
    fn between(
        &self,
        nodes: &BetweenNodes,
        place: usize,
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
        let sequence = || self.placed(ticket, op);
        let words = |told| match (told, prepared, sequence()) {
            (Told::Sequence, _, Some((_, words))) => words,
            (_, Ok(_), _) => self.in_words(op),
            (_, Err(reason), _) => refused(op, reason),
        };
        nodes.step(place, step, || sequence().map(|(it, _)| it), words)
    }

    /// The sequence that `op` is in, or its place in a program, with words.
    fn placed(&self, ticket: Ticket, op: &Operation<'_>) -> Option<(Sequence, String)> {
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
        sequence: u64,
        words: impl Fn() -> String,
    ) -> Result<bool, Failure> {
        let row = self.fixed[COLLECTIVES as usize].as_ref();
        // All ranks run the same programs of this kind.
        let record = Record::Launch(Sequence {
            hash: sequence,
            code: 1,
            first: None,
        });
        let on_node = match (&self.board, row) {
            (Some(board), Some(row)) => row.channel.lock().step(board, record, &words),
            _ => Ok(true),
        };
        let nodes = match &self.nodes {
            Some(nodes) if may_ask(&on_node, row) => nodes,
            _ => return on_node,
        };
        let step = match on_node {
            Ok(_) => Step::Execute(record.words()),
            Err(failure) => Step::Differ(record.words(), failure),
        };
        nodes.step(PROGRAMS, step, || None, |_| words())?;
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

    /// What a communicator of the user's is compared by, made for its first collective. Ranks know
    /// it by its members and by how many with these members came before. That is the same on all
    /// of them as long as one thread uses them, so those of other threads are not compared.
    fn users_comm(
        &self,
        ticket: Ticket,
        number: i64,
        members: impl FnOnce() -> Option<Vec<i32>>,
    ) -> Arc<Users> {
        if let Some(known) = self.users.read().get(&number) {
            return known.clone();
        }
        let launches = self.launches.lock();
        let launch = launches.iter().find(|(known, _)| *known == ticket);
        let by_main_thread = launch.is_some_and(|(_, launch)| launch.by_main_thread);
        drop(launches);
        let members = members().filter(|_| by_main_thread);
        let users =
            Arc::new(members.map_or_else(Users::default, |members| self.compared(&members)));
        self.users.write().insert(number, users.clone());
        users
    }

    fn compared(&self, members: &[i32]) -> Users {
        let id = self.next_id(members);
        let row = self.board.as_ref().and_then(|board| {
            let lane = board.take_lane(id, FIXED)?;
            let mut channel = Channel::new(board, id, lane, members, true);
            if self.messages.is_some() {
                channel.is_told_elsewhere();
            }
            Some(Row::new(channel))
        });
        let here = |&rank: &i32| self.board.as_ref().is_some_and(|b| b.sees(rank as usize));
        let messages = self.messages.as_ref();
        let messages = messages.filter(|_| !members.iter().all(here));
        let nodes = messages.map(|messages| {
            let by = ByMessages {
                shim: messages.shim,
                comm: messages.comm,
                tag: tags_of(id),
                rank: messages.rank,
                members: members.to_vec(),
            };
            BetweenNodes::new(Box::new(by), 1, true)
        });
        Users { row, nodes }
    }

    /// The communicator was freed.
    pub(super) fn free(&self, number: i64) {
        let users = self.users.write().remove(&number);
        let row = users.as_ref().and_then(|users| users.row.as_ref());
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

/// Whether the other nodes can be asked after this on the own one: not if one of its ranks has
/// gone, which takes part in nothing more.
#[inline]
fn may_ask<T>(on_node: &Result<T, Failure>, row: Option<&Row>) -> bool {
    on_node.is_ok() || !row.is_some_and(|row| row.channel.lock().is_closed())
}

fn refused(op: &Operation<'_>, reason: &Failure) -> String {
    format!("{op}, which it refused: {reason}")
}
