//! What happens to an operation: it waits for its turn, is checked, entered in the pending table,
//! executed, and its result checked. [`Engine::execute`] is the one place where this process
//! waits on a peer.

mod check;
pub mod collective_sequence;
pub mod collectives;
mod compare;
mod freed_comms;
mod identity;
pub(crate) mod idle;
mod mpi_calls;
mod nonblocking;
pub mod order;
pub(crate) mod pending;
mod post;
pub mod recorder;
mod result_canary;
mod single_rank;
mod uniform;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::device::Stream;
use crate::engine::collective_sequence::CollectiveSequence;
use crate::engine::collectives::{CollectiveContext, ReplicaGroups};
pub(crate) use crate::engine::compare::ByMpi;
use crate::engine::compare::Comparison;
pub use crate::engine::compare::Launch;
use crate::engine::freed_comms::FreedComms;
use crate::engine::mpi_calls::{MpiCalls, done};
use crate::engine::nonblocking::NonblockingMessages;
use crate::engine::order::{LaunchOrder, Order, Ticket};
use crate::engine::pending::PendingTable;
use crate::engine::recorder::RECORDER;
pub use crate::engine::uniform::UniformProgram;
use crate::error::{Failure, OperationError};
use crate::log;
use crate::mpi::communicators::{COLLECTIVES, Communicator, Communicators};
use crate::mpi::shim::{self, Shim};
use crate::node::board::Board;
use crate::node::rendezvous::Rendezvous;
use crate::operation::Operation;
use crate::transfer::direct::Direct;
use crate::transfer::staging::Staging;

/// How long it takes until others see that an operation waits: the watch looks as often.
const SHOWN: Duration = Duration::from_millis(150);

/// Executes operations in order. One per process.
pub struct Engine {
    calls: MpiCalls,
    /// The communicators by number.
    pub communicators: Communicators,
    /// Those that the user has freed and that are still used.
    freed_comms: FreedComms,
    order: Order,
    pending: Arc<PendingTable>,
    /// The replica groups of collectives.
    groups: ReplicaGroups,
    /// Errors of operations that nobody may have read yet.
    unread: Mutex<Vec<UnreadError>>,
    rank: i32,
    /// Say for each operation what served it.
    verbose: bool,
    /// Where the ranks meet, if all of them are on this node.
    pub(crate) rendezvous: Option<Rendezvous>,
}

/// An error that nobody may have read yet.
struct UnreadError {
    text: String,
    /// The thread that has launched what failed, by the number of its order.
    thread: Option<u32>,
}

/// Where the buffers of an operation are.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// In memory of the host.
    Host,
    /// In memory of the device of this staging, in their place in the program's stream: what is
    /// there comes before the operation, and what comes into it later sees the result.
    Staged(&'a Staging, Stream),
    /// The same, for an MPI that knows the device. [`Direct::can`] must hold.
    Direct(&'a Direct, Stream),
}

/// How the engine reports.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Say for each operation what served it.
    pub verbose: bool,
}

impl Engine {
    /// An engine over `shim`, or alone in the world.
    pub fn new(shim: Option<Shim>, rank: i32, options: EngineOptions) -> Engine {
        let pending = Arc::new(PendingTable::default());
        Engine {
            calls: MpiCalls::new(shim, pending.clone()),
            communicators: Communicators::default(),
            freed_comms: FreedComms::default(),
            order: Order::default(),
            pending,
            groups: ReplicaGroups::default(),
            unread: Mutex::default(),
            rank,
            verbose: options.verbose,
            rendezvous: None,
        }
    }

    /// Whether every rank has dispatched this very launch of `program` and has nothing before it
    /// to wait for. Then what is in it matches that launch everywhere, since each rank has executed
    /// as much before and no message is left over, and may be waited for on the dispatching thread.
    ///
    /// Call with the `ticket` of the launch taken, and only if its inputs are ready.
    pub fn all_have_arrived(&self, ticket: Ticket, program: UniformProgram) -> bool {
        let (Some(rendezvous), Some(history)) =
            (&self.rendezvous, self.calls.histories.of(program))
        else {
            return false;
        };
        // A receive that was started before may take a message that this launch waits for.
        let nonblocking = self.calls.nonblocking.as_ref();
        if nonblocking.is_some_and(NonblockingMessages::are_first) {
            return false;
        }
        // A caller that waited for a result is back a little before its launch is retired.
        rendezvous.meet(|| self.order.is_first(ticket), || history.arrival(program))
    }

    /// A launch that this rank has arrived at will not run, since it could not be dispatched.
    pub fn withdraw(&self) {
        if let Some(rendezvous) = &self.rendezvous {
            rendezvous.withdraw();
        }
    }

    /// Says which ranks the group `number` has that this rank is in.
    pub fn know_group(&self, number: i64, members: Vec<i32>) {
        self.groups.know(number, members);
    }

    /// Begins the launch `ticket` of `program`, once it is its turn: waits, with backoff, for other
    /// ranks that may still be compiling, and checks that they are about to run the same sequence
    /// of collectives.
    pub fn begin_collectives(
        &self,
        ticket: Ticket,
        program: &CollectiveSequence,
    ) -> Result<(), OperationError> {
        let channel = self.order.wait_turn(ticket);
        if program.everybody && channel == 0 {
            self.calls.histories.count_collective_launch();
        }
        let recording = RECORDER.begin_program(ticket, &program.recorded());
        let context = self.collective_context();
        let result = match channel {
            0 => self.groups.begin(context, program),
            _ => self.groups.begin_apart(context, program, channel),
        };
        recording.end(&result);
        result.inspect_err(|error| self.note_unread(&error.to_string(), self.order.thread(ticket)))
    }

    fn collective_context(&self) -> CollectiveContext<'_> {
        CollectiveContext {
            shim: self.calls.shim.as_ref(),
            communicators: &self.communicators,
            pending: &self.pending,
            comparison: &self.calls.comparison,
            rank: self.rank,
        }
    }

    /// Executes `op` of the launch `ticket`, whose buffers are at `place`. Returns when those of
    /// the host may be used again; on a device, the stream of the program waits for what is still
    /// to be copied.
    pub fn execute(
        &self,
        ticket: Ticket,
        op: &Operation<'_>,
        place: Place<'_>,
    ) -> Result<(), OperationError> {
        let channel = self.order.wait_turn(ticket);
        let apart;
        let op = match channel {
            0 => op,
            _ => {
                apart = self.groups.apart(op, channel);
                &apart
            }
        };
        let start = self.verbose.then(Instant::now);
        let recording = RECORDER.begin(ticket, op, || self.communicators.get(op.comm));
        let result = self.run(ticket, op, place);
        recording.end(&result);
        if let Some(start) = start {
            self.log(ticket, op, start.elapsed(), result.is_ok());
        }
        result.inspect_err(|error| self.note_unread(&error.to_string(), self.order.thread(ticket)))
    }

    fn log(&self, ticket: Ticket, op: &Operation<'_>, time: Duration, done: bool) {
        let comm = self.communicators.get(op.comm);
        let comm = comm.map_or("an unknown communicator", |comm| comm.name);
        let by = self.calls.shim.map_or("no MPI", |shim| shim.family.name());
        let end = if done { "done" } else { "failed" };
        log::line(&format!(
            "rank {}, launch {}: {op} on {comm} {end} by {by} in {:.1} us",
            self.rank,
            ticket.0,
            time.as_secs_f64() * 1e6
        ));
    }

    fn run(
        &self,
        ticket: Ticket,
        op: &Operation<'_>,
        place: Place<'_>,
    ) -> Result<(), OperationError> {
        let mut comm = self.communicator(op)?;
        if comm.freed && self.freed_comms.are_used_by(op.comm, ticket) {
            comm.freed = false;
        }
        self.run_at(ticket, place, op, &comm)
            .map_err(|reason| OperationError {
                operation: op.to_string(),
                rank: comm.rank,
                comm: comm.name.to_owned(),
                size: comm.size,
                reason,
            })
    }

    /// The communicator of an operation; that of a replica group is made for the first one.
    fn communicator(&self, op: &Operation<'_>) -> Result<Communicator, OperationError> {
        if let Some(known) = self.communicators.get(op.comm) {
            return Ok(known);
        }
        let made = self.groups.make(self.collective_context(), op)?;
        made.ok_or_else(|| OperationError {
            operation: op.to_string(),
            rank: -1,
            comm: format!("communicator {}", op.comm),
            size: 0,
            reason: "no communicator has this number in this process; if a compiled program \
                     was loaded from another run, make the communicators that it uses first, \
                     of the same ranks, and pass each to an operation"
                .into(),
        })
    }

    fn run_at(
        &self,
        ticket: Ticket,
        place: Place<'_>,
        op: &Operation<'_>,
        comm: &Communicator,
    ) -> Result<(), Failure> {
        let calls = &self.calls;
        match place {
            Place::Host => calls.execute(ticket, op, comm),
            Place::Direct(direct, main) => {
                let _pending = self.pending.enter(op, comm);
                self.prepare_whole(ticket, op, comm)?;
                let mut perform = |op: &Operation<'_>| {
                    let shim_op = check::prepare(op, comm)?;
                    // SAFETY: prepared above.
                    unsafe { calls.call(op, comm, &shim_op) }.map(done)
                };
                direct.execute(op, comm, main, &mut perform).map(drop)
            }
            Place::Staged(staging, main) => {
                // More is known of a message in two halves where it is waited for, and said there.
                let pending = (!op.kind.is_end()).then(|| self.pending.enter(op, comm));
                if pending.is_some() {
                    // As a whole, so that nothing begins that cannot end.
                    self.prepare_whole(ticket, op, comm)?;
                }
                let done = staging.execute(op, comm, main, &mut calls.on(op.comm, comm))?;
                calls.say_received(op, done)
            }
        }
    }

    /// Checks an operation of which MPI will see parts.
    fn prepare_whole(
        &self,
        ticket: Ticket,
        op: &Operation<'_>,
        comm: &Communicator,
    ) -> Result<(), Failure> {
        let prepared = if op.kind.is_collective() {
            self.calls.prepare_collective(ticket, op, comm)
        } else {
            check::prepare(op, comm)
        };
        prepared.map(drop)
    }

    /// Whether another rank waits in an operation while this one has not come to its end. It shows
    /// that after a moment, for which this waits.
    pub fn is_awaited(&self) -> bool {
        let Some(board) = self.calls.comparison.board() else {
            return idle::is_awaited_elsewhere();
        };
        if board.has_left(board.rank()) {
            return false;
        }
        let awaited = || {
            let mut others = board.others();
            others.any(|rank| !board.waiting(rank).is_zero()) || idle::is_awaited_elsewhere()
        };
        for _ in 0..SHOWN.as_millis() / 10 {
            if awaited() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        awaited()
    }

    /// Whether messages are on their way whose end nobody waits for.
    pub(crate) fn sends_in_background(&self) -> impl Fn() -> bool + Send + 'static {
        let nonblocking = self.calls.nonblocking.clone();
        move || {
            let messages = nonblocking.as_ref();
            messages.is_some_and(|messages| !messages.unfinished().is_empty())
        }
    }

    /// What this rank waits for.
    pub(crate) fn pending(&self) -> Arc<PendingTable> {
        self.pending.clone()
    }

    /// The ranks of this node compare what they do on this board; in a world of `size` ranks.
    pub(crate) fn compare_on(&mut self, board: Arc<Board>, size: i32) {
        self.calls.comparison = Comparison::new(board, size);
    }

    /// The ranks of several nodes compare what they do; at each operation if `always`.
    pub(crate) fn compare_between_nodes(&mut self, by: ByMpi, always: bool) {
        let messages = self
            .communicators
            .get(COLLECTIVES)
            .map_or(0, |comm| comm.handle);
        self.calls
            .comparison
            .between_nodes(by, always, self.rank, messages);
    }

    /// Says that this rank executes nothing more, to those that wait for it.
    pub fn leave(&self) {
        if let Some(board) = self.calls.comparison.board() {
            board.leave();
        }
    }

    /// Notes what is known of the launch that has taken `ticket`, before it begins.
    pub fn note_launch(&self, ticket: Ticket, launch: Launch) {
        self.pending.note_thread();
        self.calls.comparison.note(ticket, launch);
    }

    /// Says in words what the sequence of a [`UniformProgram`] is; `code` is the same for those
    /// that differ only in how often their loops run.
    pub fn describe_sequence(&self, sequence: u64, code: u64, words: &str) {
        self.calls.comparison.describe(sequence, code, words);
    }

    /// Ends all messages that were started, and says which of them nobody has waited for. Last,
    /// when everything else has ended.
    pub fn finish_messages(&self) {
        for lost in self.calls.finish_messages(&self.communicators) {
            log::line(&format!("rank {}: {lost}", self.rank));
        }
    }

    /// Takes the ticket of what a host callback launches, if its own program has none: that program
    /// runs now, so it comes before everything that has not begun.
    pub fn issue_ticket_now(&self, order: LaunchOrder) -> Ticket {
        self.order.issue_first(order)
    }

    /// Takes the ticket of a new launch.
    pub fn issue_ticket(&self, order: LaunchOrder) -> Ticket {
        self.order.issue(order)
    }

    /// Waits until every earlier launch of other threads that this one is ordered with has ended.
    pub fn wait_for_other_threads(&self, ticket: Ticket) {
        self.order.wait_for_other_threads(ticket);
    }

    /// Waits until it is the launch's turn.
    pub fn wait_turn(&self, ticket: Ticket) {
        self.order.wait_turn(ticket);
    }

    /// Whether a launch of another thread is in flight that one like this would be ordered with.
    pub fn has_other_threads(&self, order: &LaunchOrder) -> bool {
        self.order.has_other_threads(order)
    }

    /// Ends a launch; without this, later launches wait forever.
    pub fn retire(&self, ticket: Ticket) {
        self.calls.comparison.forget(ticket);
        self.order.retire(ticket);
        // Nobody else has used these communicators.
        for comm in self.freed_comms.let_go(ticket) {
            if let Some(nonblocking) = &self.calls.nonblocking {
                nonblocking.free(comm.handle);
            }
            if let Some(shim) = &self.calls.shim
                && let Err(error) = shim.comm_free(comm.handle)
            {
                log::line(&format!(
                    "rank {}: cannot free communicator {}: {}",
                    self.rank, comm.number, error
                ));
            }
        }
    }

    /// Waits until the launches dispatched so far have ended.
    pub fn wait_idle(&self) {
        self.order.wait_idle();
    }

    /// The operations that have waited longer than that, in words.
    pub(crate) fn waiting_longer_than(&self, age: Duration) -> Vec<String> {
        self.pending.longer_than(age)
    }

    /// Waits until a launch has ended.
    pub fn wait_launch(&self, ticket: Ticket) {
        self.order.wait_launch(ticket);
    }

    /// Number of launches that have not ended.
    pub fn in_flight(&self) -> usize {
        self.order.in_flight()
    }

    /// Notes an error of an operation that a thread has launched, by the number of its order; none
    /// if that is not known. Somebody may still read it.
    pub fn note_unread(&self, error: &str, thread: Option<u32>) {
        let mut unread = self.unread.lock();
        if !unread.iter().any(|known| error.contains(&known.text)) {
            let text = error.to_owned();
            unread.push(UnreadError { text, thread });
        }
    }

    /// The first error that nobody has read, of what the thread with that number has launched, or
    /// of all threads; forgets the others of these. What no thread is known for is the first
    /// thread's.
    pub fn take_unread_error(&self, thread: Option<u32>) -> Option<String> {
        let mut unread = self.unread.lock();
        let concerns = |error: &UnreadError| {
            thread.is_none_or(|thread| error.thread.unwrap_or_default() == thread)
        };
        let first = unread.iter().find(|error| concerns(error));
        let first = first.map(|error| error.text.clone());
        unread.retain(|error| !concerns(error));
        first
    }

    /// The number of the order of the thread that has launched what has this ticket.
    pub fn thread(&self, ticket: Ticket) -> Option<u32> {
        self.order.thread(ticket)
    }

    /// Somebody has read an error with this text.
    pub fn mark_read(&self, text: &str) {
        let mut unread = self.unread.lock();
        if !unread.is_empty() {
            unread.retain(|error| !text.contains(&error.text));
        }
    }

    /// The number of the user's communicator `handle`, which is registered at first use.
    /// Nothing collective happens: it is used as it is.
    pub fn register(
        &self,
        handle: u64,
        name: &str,
        deleted: mpi_shim_abi::CommDeleted,
    ) -> Result<i64, Failure> {
        if let Some(number) = self.communicators.find(handle) {
            return Ok(number);
        }
        let Some(shim) = &self.calls.shim else {
            return Err("communicators need an MPI, and this process runs without one".into());
        };
        let (rank, size, inter) = shim.comm_info(handle)?;
        if inter {
            return Err("intercommunicators are not supported; use an intracommunicator".into());
        }
        let members = shim.comm_members(handle, size)?;
        let row = Communicator {
            // Few communicators live as long as the process; their names may.
            name: String::leak(name.to_owned()),
            handle,
            user_handle: handle,
            rank,
            size,
            members: Vec::leak(members.clone()),
            largest_tag: 0,
            freed: false,
        };
        let number = self.communicators.add_users(&members, row);
        shim.comm_watch(handle, number, deleted)?;
        Ok(number)
    }

    /// The user frees communicator `number`: waits for our operations if `may_wait`, then refuses
    /// later ones. Whether MPI must keep it for launches dispatched before.
    ///
    /// MPICH calls this when the last operation in progress on it ends, on that operation's own
    /// thread, which must not wait for itself: it is freed when the launches that may use it have
    /// ended.
    pub fn comm_deleted(&self, number: i64, may_wait: bool) -> bool {
        let executing = shim::is_in_call();
        if may_wait && !executing {
            self.order.wait_comm(number);
        }
        let handle = self.communicators.get(number).map(|comm| comm.handle);
        if !executing && let (Some(nonblocking), Some(handle)) = (&self.calls.nonblocking, handle) {
            nonblocking.free(handle);
        }
        if executing && let Some(handle) = handle {
            self.freed_comms
                .keep(number, handle, || self.order.not_ended(number));
        }
        self.communicators.free(number);
        self.calls.comparison.free(number);
        executing
    }
}
