//! What happens to an operation: it waits for its turn, is checked, entered in the pending table,
//! executed, and its result checked. [`Engine::execute`] is the one place where this process
//! waits on a peer.

pub mod check;
pub mod collectives;
mod identity;
pub mod nonblocking;
pub mod order;
pub mod pending;
mod result_canary;
pub mod single_rank;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mpi_shim_abi::{ANY, Kind, PROC_NULL, ShimOp, ShimReceived};
use parking_lot::Mutex;

use crate::device::Stream;
use crate::engine::collectives::{CollectiveContext, CollectiveSequence, ReplicaGroups};
use crate::engine::nonblocking::NonblockingMessages;
use crate::engine::order::{Order, Ticket};
use crate::engine::pending::PendingTable;
use crate::error::OperationError;
use crate::log;
use crate::mpi::communicators::{COLLECTIVES, Communicator, Communicators, DEFAULT, WORLD};
use crate::mpi::shim::{self, Request, Shim};
use crate::node::rendezvous::Rendezvous;
use crate::operation::{Buffer, Operation};
use crate::transfer::direct::Direct;
use crate::transfer::staging::Staging;
use crate::transfer::transport::{Done, Transport};

/// How the engine reports.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Operations that take longer are printed.
    pub warn_after: Duration,
    /// Say for each operation what served it.
    pub verbose: bool,
}

/// A program that is the same fixed sequence of collectives and exchanges of all ranks, wherever it
/// runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniformProgram {
    /// The communicator of all of them: [`WORLD`], [`DEFAULT`] or [`COLLECTIVES`].
    pub comm: i64,
    /// The sequence, hashed.
    pub sequence: u64,
    /// If it has exchanges: the messages that this rank sends, less those that it receives, each
    /// hashed. Over all ranks they add up to 0 if every message sent is received.
    pub balance: Option<u64>,
}

impl UniformProgram {
    /// Names the launch of this program that comes after `position` collectives; the same number in
    /// every process. Never 0.
    fn mark(self, position: u64) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.comm, self.sequence, position).hash(&mut hasher);
        hasher.finish().max(1)
    }
}

/// What this rank has executed on one communicator of all ranks.
#[derive(Default)]
struct History {
    /// Number of collectives. Messages do not count: ranks may exchange different numbers of them,
    /// and the balance tells whether they are done with.
    position: AtomicU64,
    /// Messages sent less messages received, as in [`UniformProgram::balance`].
    balance: AtomicU64,
}

impl History {
    fn add(&self, op: &Operation<'_>, rank: i32, received: &ShimReceived) {
        if !matches!(
            op.kind,
            Kind::Send | Kind::Recv | Kind::Sendrecv | Kind::Isend | Kind::Irecv
        ) {
            self.position.fetch_add(1, Ordering::Relaxed);
        }
        if matches!(op.kind, Kind::Send | Kind::Sendrecv | Kind::Isend) && op.dest != PROC_NULL {
            self.balance
                .fetch_add(message(rank, op.dest), Ordering::Relaxed);
        }
        if matches!(op.kind, Kind::Recv | Kind::Sendrecv) && received.source >= 0 {
            self.balance
                .fetch_sub(message(received.source, rank), Ordering::Relaxed);
        }
    }
}

/// A message between two ranks, hashed: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn message(source: i32, dest: i32) -> u64 {
    // SplitMix64's increment, since its finalizer maps 0 to 0.
    let mut bits = ((source as u64) << 32 | dest as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Where the buffers of an operation are.
#[derive(Clone, Copy)]
enum Place<'a> {
    Host,
    Staged(&'a Staging, Stream),
    Direct(&'a Direct, Stream),
}

/// A communicator that the user has freed and that launches dispatched before still use.
struct Leaving {
    number: i64,
    handle: u64,
    launches: Vec<Ticket>,
}

/// Executes operations in order. One per process.
pub struct Engine {
    pub(crate) shim: Option<Shim>,
    /// The communicators by number.
    pub communicators: Communicators,
    pub(crate) order: Order,
    pub(crate) pending: Arc<PendingTable>,
    /// The replica groups of collectives.
    pub(crate) groups: ReplicaGroups,
    /// Errors of operations that nobody may have read yet.
    pub(crate) unread: Mutex<Vec<OperationError>>,
    /// What was executed so far on [`WORLD`], on [`DEFAULT`], and of collectives of programs for several devices.
    histories: [History; 3],
    /// Messages whose start and end are separate; none without MPI.
    nonblocking: Option<NonblockingMessages>,
    leaving: Mutex<Vec<Leaving>>,
    /// How many there are; spares the lock where there are none.
    leaving_count: AtomicUsize,
    pub(crate) rank: i32,
    /// Say for each operation what served it.
    verbose: bool,
    /// Where the ranks meet, if all of them are on this node.
    pub(crate) rendezvous: Option<Rendezvous>,
}

impl Engine {
    /// An engine over `shim`, or alone in the world.
    pub fn new(shim: Option<Shim>, rank: i32, options: EngineOptions) -> Engine {
        let pending = Arc::new(PendingTable::default());
        pending::watch(&pending, rank, options.warn_after);
        Engine {
            shim,
            communicators: Communicators::default(),
            order: Order::default(),
            pending,
            unread: Mutex::default(),
            groups: ReplicaGroups::default(),
            histories: Default::default(),
            nonblocking: shim.map(NonblockingMessages::new),
            leaving: Mutex::default(),
            leaving_count: AtomicUsize::new(0),
            rank,
            verbose: options.verbose,
            rendezvous: None,
        }
    }

    /// Whether every rank has dispatched this very launch of `program` and has nothing before it
    /// to wait for. Then what is in it matches that launch everywhere, since each rank has executed
    /// as much before and no message is left over, and may be waited for on the dispatching thread.
    ///
    /// Call with the ticket of the launch taken, and only if its inputs are ready.
    pub fn all_have_arrived(&self, program: UniformProgram) -> bool {
        let (Some(rendezvous), Some(history)) = (&self.rendezvous, self.history_of(program)) else {
            return false;
        };
        // A receive that was started before may take a message that this launch waits for.
        if self
            .nonblocking
            .as_ref()
            .is_some_and(NonblockingMessages::are_first)
        {
            return false;
        }
        // A caller that waited for a result is back a little before its launch is retired.
        rendezvous.meet(
            || self.in_flight() == 1,
            || {
                let balance = program.balance.map_or(0, |balance| {
                    balance.wrapping_add(history.balance.load(Ordering::Relaxed))
                });
                (
                    program.mark(history.position.load(Ordering::Relaxed)),
                    balance,
                )
            },
        )
    }

    fn history_of(&self, program: UniformProgram) -> Option<&History> {
        match program.comm {
            COLLECTIVES => Some(&self.histories[2]),
            comm => self.history(comm),
        }
    }

    fn history(&self, comm: i64) -> Option<&History> {
        match comm {
            WORLD => Some(&self.histories[0]),
            DEFAULT => Some(&self.histories[1]),
            _ => None,
        }
    }

    /// Says which ranks the group `number` has that this rank is in.
    pub fn know_group(&self, number: i64, members: Vec<i32>) {
        self.groups.know(number, members);
    }

    /// Begins the launch `ticket` of `program`, once it is its turn: waits, asleep, for other ranks that may
    /// still be compiling, and checks that they are about to run the same sequence of collectives. `first`
    /// says that this very program has not run here.
    pub fn begin_collectives(
        &self,
        ticket: Ticket,
        program: &CollectiveSequence,
        first: bool,
    ) -> Result<(), OperationError> {
        self.order.wait_turn(ticket);
        let launch = program.everybody.then(|| {
            let before = self.histories[2].position.fetch_add(1, Ordering::Relaxed);
            before + 1
        });
        self.groups
            .begin(self.collective_context(), program, launch, first)
            .inspect_err(|error| self.unread.lock().push(error.clone()))
    }

    fn collective_context(&self) -> CollectiveContext<'_> {
        CollectiveContext {
            shim: self.shim.as_ref(),
            communicators: &self.communicators,
            pending: &self.pending,
            rendezvous: self.rendezvous.as_ref(),
            rank: self.rank,
        }
    }

    /// Executes `op` of the launch `ticket`; returns when its buffers may be used again.
    pub fn execute(&self, ticket: Ticket, op: &Operation<'_>) -> Result<(), OperationError> {
        self.execute_at(ticket, op, Place::Host)
    }

    /// Executes `op`, whose buffers are memory of the device of `staging`, in its place in the stream
    /// `main`: what is there comes before, and what comes into it after this returns sees the result.
    pub fn execute_staged(
        &self,
        ticket: Ticket,
        op: &Operation<'_>,
        staging: &Staging,
        main: Stream,
    ) -> Result<(), OperationError> {
        self.execute_at(ticket, op, Place::Staged(staging, main))
    }

    /// Like [`Engine::execute_staged`], by an MPI that knows the device. [`Direct::can`] must hold.
    pub fn execute_direct(
        &self,
        ticket: Ticket,
        op: &Operation<'_>,
        direct: &Direct,
        main: Stream,
    ) -> Result<(), OperationError> {
        self.execute_at(ticket, op, Place::Direct(direct, main))
    }

    fn execute_at(
        &self,
        ticket: Ticket,
        op: &Operation<'_>,
        place: Place<'_>,
    ) -> Result<(), OperationError> {
        self.order.wait_turn(ticket);
        let start = self.verbose.then(Instant::now);
        let result = self.run(ticket, op, place);
        if let Some(start) = start {
            self.tell(ticket, op, start.elapsed(), result.is_ok());
        }
        result.inspect_err(|error| self.unread.lock().push(error.clone()))
    }

    fn tell(&self, ticket: Ticket, op: &Operation<'_>, time: Duration, done: bool) {
        let comm = self.communicators.get(op.comm);
        let comm = comm.map_or("an unknown communicator", |comm| comm.name);
        let by = self.shim.map_or("no MPI", |shim| shim.family.name());
        let end = if done { "done" } else { "failed" };
        log::line(&format!(
            "mpi_cuda: rank {}, launch {}: {op} on {comm} {end} by {by} in {:.1} us",
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
        let comm = match self.communicators.get(op.comm) {
            None => self.groups.make(self.collective_context(), op)?,
            known => known,
        };
        let Some(mut comm) = comm else {
            return Err(OperationError {
                operation: op.to_string(),
                rank: -1,
                comm: format!("communicator {}", op.comm),
                size: 0,
                reason: "no communicator has this number in this process; if a compiled program \
                         was loaded from another run, make the communicators that it uses first, \
                         of the same ranks, and pass each to an operation"
                    .into(),
            });
        };
        comm.freed &= !self.is_leaving(op.comm, ticket);
        let failed = |reason: String| OperationError {
            operation: op.to_string(),
            rank: comm.rank,
            comm: comm.name.to_owned(),
            size: comm.size,
            reason,
        };
        match place {
            Place::Host => match op.kind {
                Kind::Wait | Kind::WaitSend => self.wait_for_message(ticket, op, &comm, &mut []),
                Kind::Isend | Kind::Irecv => self.start_message(op, &comm),
                _ => {
                    let _pending = self.pending.enter(op, comm.name);
                    let received = self.perform(op, &comm);
                    received.and_then(|received| check_received(op, &received))
                }
            },
            Place::Direct(direct, main) => {
                check::prepare(op, &comm).map_err(failed)?;
                let _pending = self.pending.enter(op, comm.name);
                let mut perform = |op: &Operation<'_>| {
                    let shim_op = check::prepare(op, &comm)?;
                    self.call(op, &comm, &shim_op).map(done)
                };
                direct.execute(op, &comm, main, &mut perform).map(drop)
            }
            Place::Staged(staging, main) => {
                // The engine knows more of a message in two halves, and says it.
                let waits = matches!(op.kind, Kind::Wait | Kind::WaitSend);
                let pending = (!waits).then(|| self.pending.enter(op, comm.name));
                if pending.is_some() {
                    // As a whole, so that nothing begins that cannot end.
                    check::prepare(op, &comm).map_err(failed)?;
                }
                let mut calls = Calls {
                    engine: self,
                    ticket,
                    number: op.comm,
                    comm: &comm,
                };
                let done = staging.execute(op, &comm, main, &mut calls);
                done.and_then(|done| self.say_received(op, done))
            }
        }
        .map_err(failed)
    }

    /// Executes what is a whole to MPI.
    fn perform(&self, op: &Operation<'_>, comm: &Communicator) -> Result<ShimReceived, String> {
        let shim_op = check::prepare(op, comm)?;
        if self.shim.is_none() {
            return single_rank::execute(op).map(|()| ShimReceived::default());
        }
        let marks = result_canary::place(op, comm);
        let received = self.call(op, comm, &shim_op)?;
        if check::returns_input(op, comm) {
            single_rank::copy_through(op);
        }
        if op.kind == Kind::Exscan && comm.rank == 0 {
            single_rank::nothing_before(op);
        }
        if let Some(marks) = marks {
            marks.check(op)?;
        }
        Ok(received)
    }

    /// MPI has filled the status of the last part of a message.
    fn say_received(&self, op: &Operation<'_>, done: Done) -> Result<(), String> {
        match &self.shim {
            Some(shim) if op.status != 0 && receives(op) => {
                // SAFETY: the user's status lives as long as programs that name it.
                let said = unsafe { shim.set_received(op.status, done.bytes) };
                said.map_err(|error| error.0)
            }
            _ => Ok(()),
        }
    }

    /// Calls MPI. Nothing here touches the arrays.
    fn call(
        &self,
        op: &Operation<'_>,
        comm: &Communicator,
        shim_op: &ShimOp,
    ) -> Result<ShimReceived, String> {
        let shim = self.shim.as_ref().ok_or(NO_MESSAGES)?;
        let received = match &self.nonblocking {
            // SAFETY: `check::prepare` made `shim_op` from buffers that outlive this call.
            Some(nonblocking) if receives(op) && nonblocking.are_first() => unsafe {
                nonblocking.receive_after(shim_op)
            },
            _ => shim.execute(shim_op),
        };
        let received = received.map_err(|error| error.0)?;
        if let Some(history) = self.history(op.comm) {
            history.add(op, comm.rank, &received);
        }
        Ok(received)
    }

    /// Starts a message, whose number is the operation's result.
    fn start_message(&self, op: &Operation<'_>, comm: &Communicator) -> Result<(), String> {
        let shim_op = check::prepare(op, comm)?;
        if op.recv.elements() != 1 || op.recv.bytes() != size_of::<u32>() {
            return Err("the result must be one number of 32 bits".into());
        }
        let peer = if op.kind == Kind::Isend {
            op.dest
        } else {
            op.source
        };
        let number = match &self.nonblocking {
            _ if peer == PROC_NULL => TO_NOBODY,
            Some(nonblocking) => nonblocking.start(op, &shim_op)?,
            None => return Err(NO_MESSAGES.into()),
        };
        if let Some(history) = self.history(op.comm) {
            history.add(op, comm.rank, &ShimReceived::default());
        }
        // SAFETY: the result is a number of 32 bits, as whoever made the operation promises.
        unsafe { op.recv.data.cast::<u32>().write(number) };
        Ok(())
    }

    /// Waits for the message whose number is the operand; `beginning` gets that of what has come.
    fn wait_for_message(
        &self,
        ticket: Ticket,
        op: &Operation<'_>,
        comm: &Communicator,
        beginning: &mut [u8],
    ) -> Result<(), String> {
        if op.send.elements() != 1 || op.send.bytes() != size_of::<u32>() {
            return Err("the request must be one number of 32 bits".into());
        }
        // SAFETY: the operand is a number of 32 bits.
        let number = unsafe { op.send.data.cast::<u32>().read() };
        if number == TO_NOBODY {
            let nobody = Operation {
                kind: Kind::Recv,
                send: Buffer::NONE,
                source: PROC_NULL,
                recv_tag: ANY,
                ..*op
            };
            return match op.kind {
                Kind::Wait => self.run(ticket, &nobody, Place::Host).map_err(|e| e.reason),
                _ => Ok(()),
            };
        }
        let (Some(nonblocking), Some(shim)) = (&self.nonblocking, &self.shim) else {
            return Err(NO_MESSAGES.into());
        };
        let (mut started, shape) = nonblocking.find(number)?;
        started.send.shape = &shape;
        let _pending = self.pending.enter(&started, comm.name);
        let about = |reason: String| format!("{started}: {reason}");
        if (op.kind == Kind::WaitSend) != (started.kind == Kind::Isend) {
            return Err(about(
                "wait belongs to irecv, and wait_send to isend".into(),
            ));
        }
        let ended = nonblocking.wait(number).map_err(about)?;
        if op.kind == Kind::WaitSend {
            return Ok(());
        }
        ended.begin(beginning);
        ended.write(&op.recv, shim, op.status);
        let receive = Operation {
            kind: Kind::Recv,
            send: Buffer::NONE,
            recv: op.recv,
            status: op.status,
            ..ended.operation
        };
        if let Some(history) = self.history(receive.comm) {
            history.add(&receive, comm.rank, &ended.received);
        }
        check_received(&receive, &ended.received).map_err(about)
    }

    /// Ends all messages that were started, and says which of them nobody has waited for. Last, when
    /// everything else has ended.
    pub fn finish_messages(&self) {
        let Some(nonblocking) = &self.nonblocking else {
            return;
        };
        let unfinished = nonblocking.unfinished();
        let _pending: Vec<_> = unfinished
            .iter()
            .map(|(operation, shape)| {
                let mut operation: Operation<'_> = *operation;
                operation.send.shape = shape;
                let comm = self.communicators.get(operation.comm);
                let name = comm.map_or("a communicator", |comm| comm.name);
                self.pending.enter(&operation, name)
            })
            .collect();
        for lost in nonblocking.finish() {
            log::line(&format!("mpi_cuda: rank {}: {lost}", self.rank));
        }
    }

    /// Takes the ticket of what a host callback launches, if its own program has none: that program
    /// runs now, so it comes before everything that has not begun.
    pub fn issue_ticket_now(&self) -> Ticket {
        self.order.issue_first()
    }

    /// Takes the ticket of a new launch.
    pub fn issue_ticket(&self) -> Ticket {
        self.order.issue()
    }

    /// Ends a launch; without this, later launches wait forever.
    pub fn retire(&self, ticket: Ticket) {
        self.order.retire(ticket);
        if self.leaving_count.load(Ordering::Acquire) > 0 {
            self.let_go(ticket);
        }
    }

    /// Frees the communicators that only this launch still used.
    fn let_go(&self, ticket: Ticket) {
        let gone: Vec<Leaving> = {
            let mut leaving = self.leaving.lock();
            for row in leaving.iter_mut() {
                row.launches.retain(|launch| *launch != ticket);
            }
            let gone = leaving
                .extract_if(.., |row| row.launches.is_empty())
                .collect();
            self.leaving_count.store(leaving.len(), Ordering::Release);
            gone
        };
        for row in gone {
            if let Some(nonblocking) = &self.nonblocking {
                nonblocking.free(row.handle);
            }
            if let Some(shim) = &self.shim
                && let Err(error) = shim.comm_free(row.handle)
            {
                log::line(&format!(
                    "mpi_cuda: rank {}: cannot free communicator {}: {}",
                    self.rank, row.number, error.0
                ));
            }
        }
    }

    fn is_leaving(&self, number: i64, ticket: Ticket) -> bool {
        self.leaving_count.load(Ordering::Acquire) > 0
            && self
                .leaving
                .lock()
                .iter()
                .any(|row| row.number == number && row.launches.contains(&ticket))
    }

    /// Waits until the launches dispatched so far have ended.
    pub fn wait_idle(&self) {
        self.order.wait_idle();
    }

    /// Number of launches that have not ended.
    pub fn in_flight(&self) -> usize {
        self.order.in_flight()
    }

    /// The first error nobody has read; forgets all of them.
    pub fn take_unread_error(&self) -> Option<OperationError> {
        let mut unread = self.unread.lock();
        let first = unread.first().cloned();
        unread.clear();
        first
    }

    /// Somebody has read an error with this text.
    pub fn mark_read(&self, text: &str) {
        let mut unread = self.unread.lock();
        if !unread.is_empty() {
            unread.retain(|error| !text.contains(&error.to_string()));
        }
    }

    /// The number of the user's communicator `handle`, which is registered at first use.
    /// Nothing collective happens: it is used as it is.
    pub fn register(
        &self,
        handle: u64,
        name: &str,
        deleted: mpi_shim_abi::CommDeleted,
    ) -> Result<i64, String> {
        if let Some(number) = self.communicators.find(handle) {
            return Ok(number);
        }
        let Some(shim) = &self.shim else {
            return Err("communicators need an MPI, and this process runs without one".into());
        };
        let (rank, size, inter) = shim.comm_info(handle).map_err(|error| error.0)?;
        if inter {
            return Err("intercommunicators are not supported; use an intracommunicator".into());
        }
        let members = shim.comm_members(handle, size).map_err(|error| error.0)?;
        let row = Communicator {
            // Few communicators live as long as the process; their names may.
            name: String::leak(name.to_owned()),
            handle,
            user_handle: handle,
            rank,
            size,
            freed: false,
        };
        let number = self.communicators.add_users(&members, row);
        shim.comm_watch(handle, number, deleted)
            .map_err(|error| error.0)?;
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
            self.wait_idle();
        }
        let handle = self.communicators.get(number).map(|comm| comm.handle);
        if !executing && let (Some(nonblocking), Some(handle)) = (&self.nonblocking, handle) {
            nonblocking.free(handle);
        }
        if executing && let Some(handle) = handle {
            let mut leaving = self.leaving.lock();
            // First, so that a launch that ends from now on looks here.
            self.leaving_count
                .store(leaving.len() + 1, Ordering::SeqCst);
            leaving.push(Leaving {
                number,
                handle,
                launches: self.order.not_ended(),
            });
        }
        self.communicators.free(number);
        executing
    }
}

/// The engine's way to MPI, for staging.
struct Calls<'a> {
    engine: &'a Engine,
    ticket: Ticket,
    /// Of the communicator.
    number: i64,
    comm: &'a Communicator,
}

impl Transport for Calls<'_> {
    fn perform(&mut self, op: &Operation<'_>) -> Result<Done, String> {
        let (engine, comm) = (self.engine, self.comm);
        match op.kind {
            Kind::Wait | Kind::WaitSend => self.wait(op, &mut []),
            Kind::Isend | Kind::Irecv => engine.start_message(op, comm).map(|()| Done::default()),
            _ => engine.perform(op, comm).map(done),
        }
    }

    fn wait(&mut self, op: &Operation<'_>, beginning: &mut [u8]) -> Result<Done, String> {
        let waited = self
            .engine
            .wait_for_message(self.ticket, op, self.comm, beginning);
        waited.map(|()| Done::default())
    }

    fn start_send(&mut self, op: &Operation<'_>) -> Result<Request, String> {
        let shim_op = check::prepare(op, self.comm)?;
        let shim = self.engine.shim.as_ref().ok_or(NO_MESSAGES)?;
        // SAFETY: what is sent stays in place, as whoever calls this promises.
        let request = unsafe { shim.start_send(&shim_op) };
        let request = request.map_err(|error| error.0)?;
        if let Some(history) = self.engine.history(op.comm) {
            history.add(op, self.comm.rank, &ShimReceived::default());
        }
        Ok(request)
    }

    fn is_sent(&mut self, request: &mut Request) -> Result<bool, String> {
        let shim = self.engine.shim.as_ref().ok_or(NO_MESSAGES)?;
        let status = shim.test(request);
        status
            .map(|status| status.is_some())
            .map_err(|error| error.0)
    }

    fn try_receive(&mut self, op: &Operation<'_>) -> Result<Option<Done>, String> {
        let shim_op = check::prepare(op, self.comm)?;
        let nonblocking = self.engine.nonblocking.as_ref().ok_or(NO_MESSAGES)?;
        let received = nonblocking.try_receive(&shim_op, shim_op.datatype);
        let Some(received) = received.map_err(|error| error.0)? else {
            return Ok(None);
        };
        if let Some(history) = self.engine.history(op.comm) {
            history.add(op, self.comm.rank, &received);
        }
        Ok(Some(done(received)))
    }

    fn world_rank(&self, rank: i32) -> Result<i32, String> {
        let (Some(shim), comm) = (&self.engine.shim, self.comm) else {
            return Ok(rank);
        };
        if matches!(self.number, WORLD | DEFAULT | COLLECTIVES) {
            return Ok(rank);
        }
        let members = shim.comm_members(comm.handle, comm.size);
        let members = members.map_err(|error| error.0)?;
        let member = members.get(rank as usize).copied();
        member.ok_or_else(|| format!("there is no rank {rank}"))
    }
}

fn done(received: ShimReceived) -> Done {
    Done {
        source: received.source,
        tag: received.tag,
        bytes: usize::try_from(received.bytes).unwrap_or(0),
    }
}

/// The number of a message to or from `PROC_NULL`.
const TO_NOBODY: u32 = 0;
const NO_MESSAGES: &str = "messages need an MPI, and this process runs without one";

fn receives(op: &Operation<'_>) -> bool {
    matches!(op.kind, Kind::Recv | Kind::Sendrecv) && op.source != PROC_NULL
}

/// A message longer than the result was not written to it, and a shorter one would leave part of it
/// unwritten.
fn check_received(op: &Operation<'_>, received: &ShimReceived) -> Result<(), String> {
    if !matches!(op.kind, Kind::Recv | Kind::Sendrecv) {
        return Ok(());
    }
    let arrived = usize::try_from(received.bytes).unwrap_or(0);
    let missing = op.missing(received.source, received.tag, arrived)?;
    if missing > 0 {
        // SAFETY: the result buffer is valid for its bytes; nothing in it stays uninitialised.
        unsafe {
            op.recv
                .data
                .cast::<u8>()
                .add(arrived)
                .write_bytes(0, missing)
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn marks_differ_by_program_communicator_and_position() {
        let mut seen = HashSet::new();
        for sequence in [1, 2, u64::MAX] {
            for comm in [WORLD, DEFAULT] {
                let balance = None;
                for position in 0..1000 {
                    let program = UniformProgram {
                        comm,
                        sequence,
                        balance,
                    };
                    seen.insert(program.mark(position));
                }
            }
        }
        assert_eq!(seen.len(), 6000);
        assert!(!seen.contains(&0));
    }

    #[test]
    fn messages_are_told_apart() {
        let ranks = 0..40;
        let all: HashSet<u64> = ranks
            .clone()
            .flat_map(|source| ranks.clone().map(move |dest| message(source, dest)))
            .collect();
        assert!(all.len() == 1600 && !all.contains(&0));
        let swapped = message(0, 1).wrapping_add(message(1, 0));
        assert_ne!(swapped, message(0, 0).wrapping_add(message(1, 1)));
    }
}
