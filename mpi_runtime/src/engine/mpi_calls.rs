//! From a checked operation to calls of MPI, on memory of the host.

use std::sync::Arc;

use mpi_shim_abi::{ANY, Kind, PROC_NULL, Reduction, ShimOp, ShimReceived};

use crate::buffer::{Buffer, ElementType};
use crate::engine::compare::{Comparison, refused};
use crate::engine::idle::MessageWait;
use crate::engine::nonblocking::{NO_MESSAGES, Nonblocking};
use crate::engine::on_node::OnNode;
use crate::engine::order::Ticket;
use crate::engine::pending::{Pending, PendingTable};
use crate::engine::recorder::RECORDER;
use crate::engine::recorder::clock::Ticks;
use crate::engine::uniform::Balances;
use crate::engine::{check, exchange_counts, result_canary, single_rank};
use crate::error::Failure;
use crate::mpi::communicators::{Communicator, Communicators};
use crate::mpi::shim::Shim;
use crate::node::mailbox::MOST_BYTES;
use crate::operation::{OF_XLA, Operation, wrong_dtype};
use crate::transfer::transport::Done;

/// Calls MPI, and keeps what was called.
pub(super) struct MpiCalls {
    /// None in a world without MPI.
    pub(super) shim: Option<Shim>,
    /// Messages and collectives whose start and end are separate.
    pub(super) nonblocking: Nonblocking,
    pub(super) balances: Balances,
    pub(super) comparison: Comparison,
    /// What the ranks of a node execute without MPI.
    pub(super) on_node: OnNode,
    pending: Arc<PendingTable>,
    /// Collectives of more bytes go in parts.
    part_bytes: i64,
}

impl MpiCalls {
    /// Through `shim`, if there is one.
    pub(super) fn new(shim: Option<Shim>, pending: Arc<PendingTable>, part_bytes: i64) -> MpiCalls {
        MpiCalls {
            shim,
            nonblocking: Nonblocking::new(shim),
            balances: Balances::default(),
            comparison: Comparison::default(),
            on_node: OnNode::default(),
            pending,
            part_bytes,
        }
    }

    /// Executes an operation of the launch `ticket`, which has begun at `start`, on memory of the
    /// host.
    pub(super) fn execute(
        &self,
        ticket: Ticket,
        start: Ticks,
        op: &Operation<'_>,
        comm: &Communicator,
    ) -> Result<(), Failure> {
        match op.kind {
            kind if kind.is_end() => self.wait_for_started(op, comm, &mut []),
            kind if kind.is_start() && !kind.is_collective() => self.start_message(op, comm),
            kind if kind.is_collective() => {
                let pending = self.pending.begin_since(start, op, comm);
                let mut shim_op = ShimOp::new(op.kind, comm.handle);
                self.prepare_collective(&mut shim_op, ticket, op, comm, &pending)?;
                if op.reduction == Some(Reduction::User) {
                    pending.calls_user();
                }
                if op.kind.is_start() {
                    // SAFETY: prepared above.
                    return unsafe { self.start_collective(op, comm, &shim_op) };
                }
                // SAFETY: prepared above.
                unsafe { self.perform_prepared(op, comm, &shim_op) }.map(drop)
            }
            _ => self.complete(start, op, comm),
        }
    }

    /// Whether MPI has kept the communicator of that number, which the user has freed.
    pub(super) fn is_kept(&self, comm: &Communicator, number: i64) -> bool {
        let shim = self.shim.as_ref();
        shim.is_some_and(|shim| shim.comm_is_kept(comm.handle, number))
    }

    /// Checks a collective of the launch `ticket`, and compares it with what the other ranks are
    /// about to do. Once for the whole collective, in whatever parts MPI sees it.
    #[inline]
    pub(super) fn prepare_collective(
        &self,
        shim_op: &mut ShimOp,
        ticket: Ticket,
        op: &Operation<'_>,
        comm: &Communicator,
        pending: &Pending<'_>,
    ) -> Result<(), Failure> {
        let mut prepared = check::prepare_in(shim_op, op, comm);
        if op.kind.is_start() && prepared.is_ok() {
            prepared = check::check_start(shim_op, op, comm, self.part_bytes);
        }
        // XLA's ranks have compared the whole program, if its sequence is fixed; and one that is
        // freed is no communicator.
        if comm.freed || op.of == Some(OF_XLA) && op.place == 0 {
            return prepared;
        }
        if let Err(reason) = &prepared {
            // To tell the other nodes may last, and then this is what a report should say.
            pending.rename(refused(op, reason));
        }
        let members = || Some(comm.members.to_vec());
        let comparison = &self.comparison;
        let asked = prepared.as_ref().map(|()| &*shim_op);
        let compared = comparison.operation(ticket, op, comm, asked, members);
        compared.and(prepared)
    }

    /// Executes what is a whole to MPI, and checks what has come.
    #[inline]
    fn complete(
        &self,
        start: Ticks,
        op: &Operation<'_>,
        comm: &Communicator,
    ) -> Result<(), Failure> {
        let _pending = self.pending.begin_since(start, op, comm);
        let mut shim_op = ShimOp::new(op.kind, comm.handle);
        check::prepare_in(&mut shim_op, op, comm)?;
        // SAFETY: prepared above.
        let received = unsafe { self.perform_prepared(op, comm, &shim_op) }?;
        check_received(op, &received)
    }

    /// Executes what is a whole to MPI, and puts right what MPI leaves open.
    ///
    /// # Safety
    /// As for [`MpiCalls::call`].
    #[inline]
    pub(super) unsafe fn perform_prepared(
        &self,
        op: &Operation<'_>,
        comm: &Communicator,
        shim_op: &ShimOp,
    ) -> Result<ShimReceived, Failure> {
        let Some(shim) = &self.shim else {
            return single_rank::execute(op).map(|()| ShimReceived::default());
        };
        if let Some(way) = self.on_node.way(op, comm)
            && let Some(memory) = self.on_node.memory(shim, op.comm, comm)?
        {
            let is_root = comm.rank == op.root;
            // SAFETY: `shim_op` was prepared, so where both are used they do not overlap. They are
            // the host's, as everything here.
            let (send, recv) = unsafe {
                let reads = op.kind.reads(is_root);
                let send: &[u8] = if reads { op.send.as_slice() } else { &[] };
                let writes = op.kind.writes(is_root);
                let recv: &mut [u8] = if writes {
                    op.recv.as_slice_mut()
                } else {
                    &mut []
                };
                (send, recv)
            };
            memory.execute(&way, send, recv);
            if op.kind.returns_operand(is_root) {
                single_rank::copy_through(op);
            }
            return Ok(ShimReceived::default());
        }
        if op.kind.has_neighbors() {
            // MPI writes nothing where there is no neighbour, at the edge of a grid.
            op.recv.clear_from(0);
        }
        let canary = result_canary::place(op, comm);
        // SAFETY: as this function demands.
        let received = unsafe { self.call(op, comm, shim_op) }?;
        if op.kind.returns_operand(comm.rank == op.root) {
            single_rank::copy_through(op);
        }
        if op.kind == Kind::Exscan && comm.rank == 0 {
            single_rank::nothing_before(op);
        }
        if let Some(canary) = canary {
            canary.check(op)?;
        }
        Ok(received)
    }

    /// MPI has filled the status of the last part of a message.
    pub(super) fn say_received(&self, op: &Operation<'_>, done: Done) -> Result<(), Failure> {
        match &self.shim {
            Some(shim) if op.status != 0 && receives(op) => {
                // SAFETY: the user's status lives as long as programs that name it.
                let said = unsafe { shim.set_received(op.status, done.bytes) };
                Ok(said?)
            }
            _ => Ok(()),
        }
    }

    /// Calls MPI. Nothing here touches the arrays.
    ///
    /// # Safety
    /// `shim_op` must be what [`check::prepare`] makes of `op` on `comm`, but for its codes.
    #[inline]
    pub(super) unsafe fn call(
        &self,
        op: &Operation<'_>,
        comm: &Communicator,
        shim_op: &ShimOp,
    ) -> Result<ShimReceived, Failure> {
        let shim = self.shim.as_ref().ok_or(NO_MESSAGES)?;
        let short = op.kind.is_message() && self.nonblocking.has_short(shim_op.comm);
        if short || receives(op) && by_hand(&self.nonblocking) {
            if !short && op.kind.sends() {
                self.wake(op, comm);
            }
            // SAFETY: `check::prepare` took counts and types from the arrays, which outlive this
            // call.
            let received = unsafe { self.nonblocking.exchange(shim_op) }?;
            self.balances.add(op, comm.rank, &received);
            return Ok(received);
        }
        if op.kind.sends() {
            self.wake(op, comm);
        }
        let agreed;
        if op.kind.has_neighbors() && !self.comparison.sees(comm.members) {
            exchange_counts::agree_on_blocks(shim, op, comm, shim_op)?;
        }
        let shim_op = match op.kind {
            Kind::Alltoallv => {
                agreed = ShimOp {
                    in_parts: exchange_counts::agree(shim, op, comm, shim_op, self.part_bytes)?
                        .into(),
                    ..*shim_op
                };
                &agreed
            }
            _ => shim_op,
        };
        // SAFETY: as this function demands; the arrays outlive this call.
        let received = unsafe { shim.execute(shim_op) }?;
        self.balances.add(op, comm.rank, &received);
        Ok(received)
    }

    /// Whether a message may go through memory that ranks share: then it depends on what is there.
    pub(super) fn may_be_short(&self, op: &Operation<'_>, comm: &Communicator) -> bool {
        let fits = |buffer: &Buffer<'_>| buffer.bytes() <= MOST_BYTES;
        let sends = op.kind.sends() && op.dest != PROC_NULL && fits(&op.send);
        let receives = op.kind.receives() && op.source != PROC_NULL;
        self.nonblocking.has_short(comm.handle) && (sends || receives && fits(&op.recv))
    }

    /// Wakes the receiver of a message, if it sleeps.
    #[inline]
    pub(super) fn wake(&self, op: &Operation<'_>, comm: &Communicator) {
        if let (Some(board), Ok(dest)) = (self.comparison.board(), usize::try_from(op.dest)) {
            let member = comm.members.get(dest).copied().unwrap_or(op.dest);
            board.wake(member as usize);
        }
    }

    /// Starts a message, whose number is the operation's result.
    pub(super) fn start_message(
        &self,
        op: &Operation<'_>,
        comm: &Communicator,
    ) -> Result<(), Failure> {
        let shim_op = check::prepare(op, comm)?;
        check_request(&op.recv, "result")?;
        let peer = if op.kind.sends() { op.dest } else { op.source };
        if op.kind.sends() && !self.nonblocking.has_short(shim_op.comm) {
            self.wake(op, comm);
        }
        let number = match peer {
            PROC_NULL => TO_NOBODY,
            // SAFETY: prepared above.
            _ => unsafe { self.nonblocking.start(op, &shim_op, comm.members) }?,
        };
        self.balances.add(op, comm.rank, &ShimReceived::default());
        op.recv.write(0, &number.to_ne_bytes());
        Ok(())
    }

    /// Starts a collective, whose number is the operation's result.
    ///
    /// # Safety
    /// `shim_op` must be what [`check::prepare`] makes of `op` on `comm`, and
    /// [`check::check_start`] must have accepted it.
    pub(super) unsafe fn start_collective(
        &self,
        op: &Operation<'_>,
        comm: &Communicator,
        shim_op: &ShimOp,
    ) -> Result<(), Failure> {
        check_request(&op.recv, "result")?;
        let place = self.pending.begun_on(op.comm);
        // SAFETY: as this function demands.
        let number = unsafe { self.nonblocking.start_collective(op, shim_op, comm, place) }?;
        op.recv.write(0, &number.to_ne_bytes());
        Ok(())
    }

    /// Waits for the message or the collective whose number is the operand; `beginning` gets that
    /// of a message that has come.
    pub(super) fn wait_for_started(
        &self,
        op: &Operation<'_>,
        comm: &Communicator,
        beginning: &mut [u8],
    ) -> Result<(), Failure> {
        check_request(&op.send, "request")?;
        let number = u32::from_ne_bytes(op.send.read(0));
        if number == TO_NOBODY {
            let nobody = Operation {
                kind: Kind::Recv,
                send: Buffer::NONE,
                source: PROC_NULL,
                recv_tag: ANY,
                ..*op
            };
            return match op.kind {
                Kind::Wait => self.complete(Ticks::now(), &nobody, comm),
                _ => Ok(()),
            };
        }
        let (mut started, shape, place) = self.nonblocking.find(number)?;
        started.send = Buffer::described(started.send.dtype(), &shape);
        RECORDER.waits_for(&started);
        let pending = self.pending.enter(&started, comm);
        pending.is_started(place);
        let about = |failure: Failure| Failure::from(format!("{started}: {failure}"));
        let has_result = !started.kind.sends() && started.kind != Kind::Ibarrier;
        if (op.kind == Kind::Wait) != has_result {
            return Err(about(
                "wait belongs to irecv and to collectives with a result, and wait_send to isend \
                 and ibarrier"
                    .into(),
            ));
        }
        let (posted, wanted) = (started.send.dtype(), op.recv.dtype());
        if op.kind == Kind::Wait && posted != wanted {
            return Err(about(other_dtype(posted, wanted)));
        }
        check_end(op, &started, comm).map_err(about)?;
        let ended = self.nonblocking.wait(number).map_err(about)?;
        if op.kind == Kind::WaitSend {
            return Ok(());
        }
        if started.kind.starts_collective() {
            ended.finish_collective(op, comm);
            return Ok(());
        }
        ended.begin(beginning);
        ended.write(&op.recv, op.status);
        let receive = Operation {
            kind: Kind::Recv,
            send: Buffer::NONE,
            recv: op.recv,
            status: op.status,
            ..ended.operation
        };
        self.balances.add(&receive, comm.rank, &ended.received);
        check_received(&receive, &ended.received).map_err(about)
    }

    /// Waits until no collective that was started moves on a communicator.
    pub(super) fn wait_for_collectives(&self, handle: u64, comm: &Communicator) {
        let running = self.nonblocking.running_collectives(handle);
        let _pending: Vec<_> = running
            .iter()
            .map(|(operation, shape)| {
                let send = Buffer::described(operation.send.dtype(), shape);
                self.pending.enter(&Operation { send, ..*operation }, comm)
            })
            .collect();
        let mut waiting = MessageWait::default();
        while !self.nonblocking.running_collectives(handle).is_empty() {
            waiting.pause(|| false);
        }
    }

    /// Ends all messages and collectives that were started, and says what is lost with those that
    /// nobody has waited for. Last, when everything else has ended.
    pub(super) fn finish_started(&self, communicators: &Communicators) -> Vec<String> {
        let unfinished = self.nonblocking.unfinished();
        let _pending: Vec<_> = unfinished
            .iter()
            .map(|(operation, shape)| {
                let mut operation: Operation<'_> = *operation;
                operation.send = Buffer::described(operation.send.dtype(), shape);
                let comm = communicators.get(operation.comm);
                self.pending.enter(&operation, &comm.unwrap_or(UNKNOWN))
            })
            .collect();
        self.nonblocking.finish()
    }
}

/// The number of what was started must be a `u32`.
fn check_request(number: &Buffer<'_>, what: &str) -> Result<(), Failure> {
    if number.elements() == 1 && number.bytes() == size_of::<u32>() {
        return Ok(());
    }
    Err(format!("the {what} must be one number of 32 bits").into())
}

/// Whether the wait `op` fits what it ends, on its communicator; if not, that can still be waited
/// for.
fn check_end(
    op: &Operation<'_>,
    started: &Operation<'_>,
    comm: &Communicator,
) -> Result<(), Failure> {
    if op.comm != started.comm {
        return Err(format!(
            "it was started on communicator number {}, and wait names number {} ({}); pass wait \
             the communicator of the start",
            started.comm, op.comm, comm.name
        )
        .into());
    }
    if op.kind == Kind::WaitSend || !started.kind.starts_collective() {
        return Ok(());
    }
    if op.status != 0 {
        return Err("a collective has no status to fill; pass wait none".into());
    }
    let has = check::result_elements(started, comm) as usize * started.send.dtype().size();
    let wanted = op.recv.bytes();
    if has == wanted {
        return Ok(());
    }
    Err(format!(
        "its result has {has} bytes, and that of wait {wanted}; pass wait the shape that belongs \
         to the start"
    )
    .into())
}

/// What is wrong with a `wait` for another dtype than was posted; the message can still be waited
/// for.
fn other_dtype(posted: ElementType, wanted: ElementType) -> Failure {
    format!(
        "it was posted for {}, and the result of wait is {}; pass wait the dtype that irecv had",
        posted.name(),
        wanted.name()
    )
    .into()
}

/// Stands for a communicator that is not known any more.
const UNKNOWN: Communicator = Communicator {
    name: "a communicator",
    handle: 0,
    user_handle: u64::MAX,
    rank: -1,
    size: 0,
    members: &[],
    largest_tag: 0,
    freed: true,
};

/// The number of a message to or from `PROC_NULL`.
const TO_NOBODY: u32 = 0;

/// Whether the engine itself looks for the message of a receive: for those that were started
/// before, and for a profile, which has when it came. It also looks where there are short ones.
#[inline]
fn by_hand(nonblocking: &Nonblocking) -> bool {
    nonblocking.are_first() || RECORDER.is_profiled()
}

fn receives(op: &Operation<'_>) -> bool {
    op.kind.is_receive() && op.source != PROC_NULL
}

/// A message of another dtype than the result's was not written to it.
#[inline]
pub(super) fn check_dtype(op: &Operation<'_>, received: &ShimReceived) -> Result<(), Failure> {
    if received.code == 0 || received.code == check::code(op.recv.dtype()) {
        return Ok(());
    }
    Err(wrong_dtype(
        received.source,
        received.tag,
        usize::try_from(received.bytes).unwrap_or(0),
        check::dtype_of(received.code),
        op.recv.dtype(),
    ))
}

/// A message longer than the result was not written to it, and a shorter one would leave part of it
/// unwritten.
fn check_received(op: &Operation<'_>, received: &ShimReceived) -> Result<(), Failure> {
    if !op.kind.is_receive() {
        return Ok(());
    }
    check_dtype(op, received)?;
    let arrived = usize::try_from(received.bytes).unwrap_or(0);
    let missing = op.missing(received.source, received.tag, arrived)?;
    op.recv.clear_from(op.recv.bytes() - missing);
    Ok(())
}
