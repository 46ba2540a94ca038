//! What happens to an operation: it waits for its turn, is checked, entered in the pending table,
//! executed, and its result checked. [`Engine::execute`] is the one place where this process
//! waits on a peer.

mod check;
pub mod collective_sequence;
pub mod collectives;
mod compare;
mod exchange_counts;
mod freed_comms;
mod identity;
pub(crate) mod idle;
mod launches;
mod mpi_calls;
mod nonblocking;
mod on_communicator;
mod on_node;
pub mod order;
pub(crate) mod pending;
mod post;
pub mod recorder;
mod result_canary;
pub(crate) mod short_messages;
mod single_rank;
mod uniform;
mod unread;
mod user_comms;

use std::sync::Arc;
use std::time::{Duration, Instant};

use mpi_shim_abi::{Reduction, ShimOp};
use parking_lot::Mutex;

use crate::device::Stream;
use crate::engine::collective_sequence::CollectiveSequence;
use crate::engine::collectives::{CollectiveContext, ReplicaGroups};
use crate::engine::compare::Comparison;
pub(crate) use crate::engine::compare::{ByMpi, Progress, Series};
pub use crate::engine::compare::{KnownCollectives, Launch};
use crate::engine::freed_comms::FreedComms;
use crate::engine::mpi_calls::{MpiCalls, check_dtype};
use crate::engine::on_communicator::{OnCommunicator, done};
use crate::engine::on_node::OnNode;
use crate::engine::order::{Order, Ticket};
use crate::engine::pending::{Pending, PendingTable, Waiting};
use crate::engine::recorder::RECORDER;
use crate::engine::recorder::clock::Ticks;
use crate::engine::short_messages::ShortMessages;
pub use crate::engine::uniform::UniformProgram;
use crate::engine::unread::UnreadError;
use crate::error::{Failure, OperationError};
use crate::log;
use crate::mpi::communicators::{COLLECTIVES, Communicator, Communicators, DEFAULT, WORLD};
use crate::mpi::shim::Shim;
use crate::node::board::Board;
use crate::node::mailbox::Mailboxes;
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
    /// Collectives of more bytes go in parts.
    pub part_bytes: i64,
}

impl Engine {
    /// An engine over `shim`, or alone in the world.
    pub fn new(shim: Option<Shim>, rank: i32, options: EngineOptions) -> Engine {
        let pending = Arc::new(PendingTable::default());
        Engine {
            calls: MpiCalls::new(shim, pending.clone(), options.part_bytes),
            communicators: Communicators::default(),
            freed_comms: FreedComms::default(),
            order: Order::default(),
            pending,
            groups: ReplicaGroups::new(shim.as_ref()),
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
        let Some(rendezvous) = &self.rendezvous else {
            return false;
        };
        // A receive that was started before may take a message that this launch waits for.
        if self.calls.nonblocking.are_first() {
            return false;
        }
        // A caller that waited for a result is back a little before its launch is retired.
        let calls = &self.calls;
        let arrival = || {
            let position = calls.comparison.position(program.comm)?;
            Some((program.mark(position), calls.balances.after(program)))
        };
        rendezvous.meet(|| self.order.is_first(ticket), arrival)
    }

    /// A launch that this rank has arrived at will not run, since it could not be dispatched.
    pub fn withdraw(&self) {
        if let Some(rendezvous) = &self.rendezvous {
            rendezvous.withdraw();
        }
    }

    /// The tag of messages of a collective of XLA's at that place of its program, which no message
    /// at another place has.
    pub fn tag_at(&self, place: u64) -> i32 {
        self.groups.tag_at(place)
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
    ) -> Result<(), Box<OperationError>> {
        let channel = self.order.wait_turn(ticket);
        let recording = RECORDER.begin_program(ticket, &program.recorded());
        let context = self.collective_context();
        let result = match channel {
            0 => self.groups.begin(context, ticket, program),
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
    ) -> Result<(), Box<OperationError>> {
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
        let result = self.run(ticket, recording.start, op, place);
        recording.end(&result);
        if let Some(start) = start {
            self.log(ticket, op, place, start.elapsed(), result.is_ok());
        }
        result.inspect_err(|error| {
            if op.kind.is_collective() {
                self.calls.comparison.failed(ticket, op.comm);
            }
            self.note_unread(&error.to_string(), self.order.thread(ticket));
        })
    }

    /// Compares a collective of XLA's, which is executed as messages, with what the others of its
    /// group are about to do. Its arrays have no memory.
    pub fn compare(&self, ticket: Ticket, op: &Operation<'_>) -> Result<(), Box<OperationError>> {
        let op = match self.order.wait_turn(ticket) {
            0 => *op,
            channel => self.groups.apart(op, channel),
        };
        let comm = self.communicator(&op)?;
        let pending = self.pending.begin(&op, &comm);
        let compared = self.prepare_whole(ticket, &op, &comm, &pending);
        compared.map_err(|reason| error_of(&op, &comm, reason))
    }

    fn log(
        &self,
        ticket: Ticket,
        op: &Operation<'_>,
        place: Place<'_>,
        time: Duration,
        done: bool,
    ) {
        let comm = self.communicators.get(op.comm);
        let is_direct = matches!(place, Place::Direct(..));
        let mpi = self.calls.shim.map_or("no MPI", |shim| shim.family.name());
        let by = match &comm {
            Some(comm) if !is_direct && self.calls.on_node.serves(op, comm) => "shared memory",
            Some(comm) if self.calls.may_be_short(op, comm) => &format!("shared memory or {mpi}"),
            _ => mpi,
        };
        let comm = comm.map_or("an unknown communicator", |comm| comm.name);
        let end = if done { "done" } else { "failed" };
        log::line(&format!(
            "launch {}: {op} on {comm} {end} by {by} in {:.1} us",
            ticket.0,
            time.as_secs_f64() * 1e6
        ));
    }

    fn run(
        &self,
        ticket: Ticket,
        start: Ticks,
        op: &Operation<'_>,
        place: Place<'_>,
    ) -> Result<(), Box<OperationError>> {
        let mut comm = self.communicator(op)?;
        if comm.freed && self.freed_comms.are_used_by(op.comm, ticket) {
            // What was started needs it no more.
            comm.freed = !op.kind.is_end() && !self.calls.is_kept(&comm, op.comm);
        }
        self.run_at(ticket, start, place, op, &comm)
            .map_err(|reason| error_of(op, &comm, reason))
    }

    /// The communicator of an operation; that of a replica group is made for the first one.
    fn communicator(&self, op: &Operation<'_>) -> Result<Communicator, Box<OperationError>> {
        if let Some(known) = self.communicators.get(op.comm) {
            return Ok(known);
        }
        let made = self.groups.make(self.collective_context(), op)?;
        made.ok_or_else(|| {
            Box::new(OperationError {
                operation: op.to_string(),
                rank: -1,
                comm: format!("communicator {}", op.comm),
                size: 0,
                reason: "no communicator has this number in this process; if a compiled program \
                     was loaded from another run, make the communicators that it uses first, \
                     of the same ranks, and pass each to an operation"
                    .into(),
            })
        })
    }

    fn run_at(
        &self,
        ticket: Ticket,
        start: Ticks,
        place: Place<'_>,
        op: &Operation<'_>,
        comm: &Communicator,
    ) -> Result<(), Failure> {
        let calls = &self.calls;
        match place {
            Place::Host => calls.execute(ticket, start, op, comm),
            Place::Direct(direct, main) => {
                let pending = self.pending.begin(op, comm);
                self.prepare_whole(ticket, op, comm, &pending)?;
                let mut perform = |op: &Operation<'_>| {
                    let shim_op = check::prepare(op, comm)?;
                    // SAFETY: prepared above.
                    let received = unsafe { calls.call(op, comm, &shim_op) }?;
                    if op.kind.is_receive() {
                        check_dtype(op, &received)?;
                    }
                    Ok(done(received))
                };
                direct.execute(op, comm, main, &mut perform).map(drop)
            }
            Place::Staged(staging, main) => {
                // More is known of a message in two halves where it is waited for, and said there.
                let pending = (!op.kind.is_end()).then(|| self.pending.begin(op, comm));
                if let Some(pending) = &pending {
                    // As a whole, so that nothing begins that cannot end.
                    self.prepare_whole(ticket, op, comm, pending)?;
                    if op.reduction == Some(Reduction::User) {
                        pending.calls_user();
                    }
                }
                let mut on_communicator = OnCommunicator::new(calls, op, comm);
                let done = staging.execute(op, comm, main, &mut on_communicator)?;
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
        pending: &Pending<'_>,
    ) -> Result<(), Failure> {
        let mut shim_op = ShimOp::new(op.kind, comm.handle);
        if op.kind.is_collective() {
            self.calls
                .prepare_collective(&mut shim_op, ticket, op, comm, pending)
        } else {
            check::prepare_in(&mut shim_op, op, comm)
        }
    }

    /// Whether another rank waits in an operation while this one has not come to its end. It shows
    /// that after a moment, and shows it for a moment longer: this waits for both.
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
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        awaited() && {
            std::thread::sleep(SHOWN + idle::shown_elsewhere());
            awaited()
        }
    }

    /// The messages and collectives that were started and have not ended, whether an operation
    /// waits for them or not.
    pub(crate) fn started_in_background(&self) -> impl Fn() -> Vec<Waiting> + Send + 'static {
        let nonblocking = self.calls.nonblocking.clone();
        move || nonblocking.in_background()
    }

    /// What this rank waits for.
    pub(crate) fn pending(&self) -> Arc<PendingTable> {
        self.pending.clone()
    }

    /// The ranks of this node compare what they do on this board, in a world of `size` ranks. If
    /// `collectives`, and those are all ranks, they also execute collectives without MPI: who waits
    /// in MPI moves on what it has for other nodes, and who waits here does so more seldom.
    pub(crate) fn share(&mut self, board: Arc<Board>, size: i32, collectives: bool) {
        if collectives && board.ranks() == size as usize {
            self.calls.on_node = OnNode::over(board.clone());
        }
        let collectives = self.communicators.get(COLLECTIVES);
        self.calls.comparison = Comparison::new(board, size, collectives.map(|comm| comm.handle));
    }

    /// The ranks of a node send each other short messages in memory that they share.
    pub(crate) fn share_messages(&mut self, mailboxes: Mailboxes, board: Arc<Board>, size: i32) {
        let handle = |number| {
            let comm = self.communicators.get(number)?;
            Some(comm.handle)
        };
        if let (Some(world), Some(default)) = (handle(WORLD), handle(DEFAULT)) {
            let comms = [world, default];
            let short = ShortMessages::new(mailboxes, board, size as usize, comms);
            self.calls.nonblocking.share(short);
        }
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

    /// How far this rank is in comparing with other nodes, by communicator.
    pub(crate) fn progress(&self) -> Option<Arc<[Progress]>> {
        self.calls.comparison.progress()
    }

    /// Says that this rank executes nothing more, to those that wait for it.
    pub fn leave(&self) {
        if let Some(board) = self.calls.comparison.board() {
            board.leave();
        }
    }

    /// Ends all messages and collectives that were started, and says which of them nobody has
    /// waited for. Last, when everything else has ended.
    pub fn finish_started(&self) {
        for lost in self.calls.finish_started(&self.communicators) {
            log::line(&lost);
        }
    }
}

fn error_of(op: &Operation<'_>, comm: &Communicator, reason: Failure) -> Box<OperationError> {
    Box::new(OperationError {
        operation: op.to_string(),
        rank: comm.rank,
        comm: comm.name.to_owned(),
        size: comm.size,
        reason,
    })
}
