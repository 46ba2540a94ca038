//! Messages and collectives whose start and end are separate operations: `isend`, `irecv`,
//! `iallreduce` and so on (`collectives`), and `wait`.
//!
//! The engine keeps their data in memory of its own, since XLA may use an operand's memory for
//! something else as soon as the operation that starts the message returns. It also decides itself
//! which receive gets which message, so that each message's length is known before a byte is
//! written: in the order in which the receives were started (MPI 4.0, section 3.5), of which the
//! first that accepts a message gets it; so a blocking receive looks here too while one of these
//! has no message. Where there are short messages ([`crate::engine::short_messages`]), all messages
//! of their communicators are sent and received here. A thread moves messages on while the program
//! computes (`table`).

mod collectives;
mod memory;
mod table;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mpi_shim_abi::{Datatype, PROC_NULL, ShimOp, ShimReceived, ShimStatus};

use crate::buffer::Buffer;
use crate::engine::idle::MessageWait;
use crate::engine::pending::Waiting;
use crate::engine::recorder::RECORDER;
use crate::engine::short_messages::{Came, ShortMessages};
use crate::error::Failure;
use crate::mpi::backoff::pause;
use crate::mpi::shim::Shim;
use crate::node::mailbox::{Data, MOST_BYTES};
use crate::operation::Operation;
use memory::StartedMemory;
pub(super) use table::NO_MESSAGES;
use table::{Posted, Shared, StartedRow, StartedState, complete, move_on, taker};

/// How often a receive looks for a short message before it has MPI look: both take about as long.
const LOOKS: u32 = 32;
/// What a send has received.
const NOTHING: ShimReceived = ShimReceived {
    source: -1,
    tag: -1,
    code: 0,
    bytes: -1,
};

/// The messages and collectives of this process that were started and not waited for.
#[derive(Clone)]
pub struct Nonblocking {
    shared: Arc<Shared>,
}

/// A message or a collective that was waited for.
pub struct Ended<'a> {
    nonblocking: &'a Nonblocking,
    /// What started it.
    pub operation: Operation<'static>,
    /// What arrived.
    pub received: ShimReceived,
    status: ShimStatus,
    memory: StartedMemory,
    /// What a collective has sent.
    operand: StartedMemory,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut table = self.nonblocking.shared.table.lock();
        table.keep(std::mem::take(&mut self.memory));
        table.keep(std::mem::take(&mut self.operand));
    }
}

impl Ended<'_> {
    /// Copies the beginning of what arrived.
    pub fn begin(&self, to: &mut [u8]) {
        let arrived = self.arrived();
        let length = to.len().min(arrived.len());
        to[..length].copy_from_slice(&arrived[..length]);
    }

    /// Copies what arrived to `result`, if it fits, and fills the user's status.
    pub fn write(&self, result: &Buffer<'_>, status: usize) {
        let arrived = self.arrived();
        if arrived.len() <= result.bytes() {
            result.write(0, arrived);
        }
        if let Some(shim) = &self.nonblocking.shared.shim {
            // SAFETY: the user's status lives as long as programs that name it.
            unsafe { shim.write_status(&self.status, &self.received, status) };
        }
    }

    fn arrived(&self) -> &[u8] {
        let bytes = usize::try_from(self.received.bytes).unwrap_or(0);
        // SAFETY: `receive_into` made room for these bytes, and they have been written.
        unsafe { self.memory.bytes(bytes) }
    }
}

impl Nonblocking {
    /// None yet; messages need a `shim`.
    pub fn new(shim: Option<Shim>) -> Nonblocking {
        Nonblocking {
            shared: Arc::new(Shared::new(shim)),
        }
    }

    /// Starts a message on a communicator of `members`, and returns its number.
    ///
    /// # Safety
    /// `shim_op` must be what `check::prepare` makes of `op`.
    pub unsafe fn start(
        &self,
        op: &Operation<'_>,
        shim_op: &ShimOp,
        members: &'static [i32],
    ) -> Result<u32, Failure> {
        let shared = &self.shared;
        let sends = op.kind.sends();
        let mut memory = StartedMemory::default();
        let mut posted = *shim_op;
        if sends {
            memory = shared.table.lock().memory(op.send.bytes())?;
            // SAFETY: the memory is new, or nobody's any more, and has that room.
            unsafe { op.send.copy_to(memory.start().cast()) };
            posted.send = memory.start().cast_const();
        }
        let nothing = ShimReceived::default();
        let shim = shared.shim()?;
        shared.clone().start_thread(shim)?;
        let mut table = shared.table.lock();
        let state = if sends {
            // SAFETY: the row keeps the memory until the request is complete.
            match unsafe { shared.start_send(shim, &posted) }? {
                Some(request) => StartedState::Running(request, nothing),
                None => StartedState::Done(ShimStatus::default(), nothing),
            }
        } else {
            shared.unmatched.fetch_add(1, Ordering::AcqRel);
            StartedState::Unmatched
        };
        Ok(shared.enter(
            &mut table,
            StartedRow {
                number: 0,
                operation: op.without_arrays(),
                members,
                shape: op.send.shape().to_vec(),
                posted: Posted(posted),
                memory,
                operand: StartedMemory::default(),
                state,
                place: 0,
            },
        ))
    }

    /// What started the message or collective with that number, the shape of what it sends, and of
    /// a collective its place among those of its communicator.
    pub fn find(&self, number: u32) -> Result<(Operation<'static>, Vec<i64>, u64), Failure> {
        let table = self.shared.table.lock();
        let row = table.rows.iter().find(|row| row.number == number);
        row.map(|row| (row.operation, row.shape.clone(), row.place))
            .ok_or_else(|| {
                "nothing that was started has this request: it was waited for before, or it is of \
                 another run"
                    .into()
            })
    }

    /// Waits until the message or collective is complete and takes it out of the table.
    pub fn wait(&self, number: u32) -> Result<Ended<'_>, Failure> {
        let mut waiting = MessageWait::default();
        loop {
            let mut table = self.shared.table.lock();
            self.shared.progress(&mut table);
            let index = table.rows.iter().position(|row| row.number == number);
            let Some(index) = index else {
                return Err("another thread has waited for this request".into());
            };
            if table.rows[index].has_come() {
                RECORDER.met();
            }
            if table.rows[index].has_ended() {
                let row = table.rows.remove(index);
                return match row.state {
                    StartedState::Done(status, received) => Ok(Ended {
                        nonblocking: self,
                        operation: row.operation,
                        received,
                        status,
                        memory: row.memory,
                        operand: row.operand,
                    }),
                    StartedState::Failed(reason) => Err(reason),
                    StartedState::Unmatched | StartedState::Running(..) => {
                        unreachable!("it has ended")
                    }
                };
            }
            let row = &mut table.rows[index];
            if matches!(row.state, StartedState::Unmatched)
                && let Some(reason) = waiting.given_up(&row.posted.0)
            {
                self.shared.fail(row, reason.into());
                continue;
            }
            // Only who waits for a message takes what lies in the mailbox, and can sleep then.
            let is_unmatched = matches!(row.state, StartedState::Unmatched);
            let posted = Posted(row.posted.0);
            drop(table);
            waiting.pause(|| is_unmatched && self.shared.has_news(&posted.0));
        }
    }

    /// Whether a receive must look whether its message belongs to one started before.
    pub fn are_first(&self) -> bool {
        self.shared.unmatched.load(Ordering::Acquire) > 0
    }

    /// Messages go through memory that ranks share from now on, where they can.
    pub(crate) fn share(&self, short: ShortMessages) {
        // Only the first counts: there is one world.
        let _ = self.shared.short.set(short);
    }

    /// Whether the messages of this communicator must all be sent and received here.
    #[inline]
    pub fn has_short(&self, comm: u64) -> bool {
        self.shared.short(comm).is_some()
    }

    /// Executes a send, a receive, behind the receives started before, or both.
    ///
    /// # Safety
    /// The buffers of `op` must be valid for its counts and types.
    pub unsafe fn exchange(&self, op: &ShimOp) -> Result<ShimReceived, Failure> {
        let shim = self.shared.shim()?;
        let sends = op.kind.sends();
        let mut sending = if sends && op.dest != PROC_NULL {
            // SAFETY: the operand outlives this call, which waits for the request.
            unsafe { self.shared.start_send(shim, op) }?
        } else {
            None
        };
        let element = if sends { op.recv_datatype } else { op.datatype };
        let received = match op.source {
            _ if !op.kind.receives() => Ok(NOTHING),
            PROC_NULL => {
                let dest = PROC_NULL;
                // SAFETY: as this function demands; it has been sent.
                unsafe { shim.execute(&ShimOp { dest, ..*op }) }.map_err(Failure::from)
            }
            // SAFETY: as this function demands.
            _ => unsafe { self.receive(op, element) },
        };
        // Whatever happened: the operand is MPI's until the send is complete.
        if let Some(sending) = &mut sending {
            complete(shim, sending)?;
        }
        received
    }

    /// Receives the message that `op` receives, and waits for it.
    ///
    /// # Safety
    /// As for [`Nonblocking::try_receive`].
    unsafe fn receive(&self, op: &ShimOp, element: Datatype) -> Result<ShimReceived, Failure> {
        let mut waiting = MessageWait::default();
        loop {
            // SAFETY: as this function demands.
            if let Some(received) = unsafe { self.receive_short(op, element) }? {
                return Ok(received);
            }
            // SAFETY: the same.
            if let Some(received) = unsafe { self.try_receive(op, element) }? {
                return Ok(received);
            }
            waiting.pause(|| self.shared.has_news(op));
            if let Some(reason) = waiting.given_up(op) {
                return Err(reason.into());
            }
        }
    }

    /// Receives the message that `op` receives, if it is a short one and the next to be received.
    ///
    /// # Safety
    /// As for [`Nonblocking::try_receive`].
    #[inline]
    unsafe fn receive_short(
        &self,
        op: &ShimOp,
        element: Datatype,
    ) -> Result<Option<ShimReceived>, Failure> {
        let Some((short, comm)) = self.shared.short(op.comm) else {
            return Ok(None);
        };
        if self.are_first() {
            return Ok(None);
        }
        // A longer one is looked for where it comes.
        let is_short = op.recv_count as usize * element.size() <= MOST_BYTES;
        let looks = if is_short { LOOKS } else { 1 };
        let received = short.take_next(comm, op, looks, |received, data| {
            // SAFETY: as this function demands.
            unsafe { write_short(op, element, &received, data) };
            received
        });
        let Some(received) = received else {
            return Ok(None);
        };
        RECORDER.met();
        move_on(self.shared.shim()?);
        self.fill_status(op, &received)?;
        Ok(Some(received))
    }

    /// Fills the status of a short message, if the user wants it.
    #[inline]
    fn fill_status(&self, op: &ShimOp, received: &ShimReceived) -> Result<(), Failure> {
        if op.status.is_null() {
            return Ok(());
        }
        let shim = self.shared.shim()?;
        let status = shim.make_status(received)?;
        // SAFETY: the user's status lives as long as programs that name it.
        unsafe { shim.write_status(&status, received, op.status as usize) };
        Ok(())
    }

    /// Receives the message that `op` receives, as elements of `element`, if one is there and
    /// belongs to no receive started before.
    ///
    /// # Safety
    /// The result of `op` must be valid for its count of `element`s.
    pub(crate) unsafe fn try_receive(
        &self,
        op: &ShimOp,
        element: Datatype,
    ) -> Result<Option<ShimReceived>, Failure> {
        let (shared, shim) = (&self.shared, self.shared.shim()?);
        let capacity = op.recv_count * element.size() as i64;
        let mut spill = StartedMemory::default();
        let (mut request, envelope) = {
            let mut table = shared.table.lock();
            shared.progress(&mut table);
            loop {
                let Some(came) = shared.take(shim, op)? else {
                    return Ok(None);
                };
                let envelope = *came.envelope();
                if let Some(index) = taker(&table.rows, op.comm, &envelope) {
                    shared.receive_into(shim, &mut table, index, came);
                    continue;
                }
                let message = match came {
                    Came::Mpi(message) => message,
                    Came::Short { data, .. } => {
                        RECORDER.met();
                        // SAFETY: as this function demands.
                        unsafe { write_short(op, element, &envelope, [&data, &[]]) };
                        self.fill_status(op, &envelope)?;
                        return Ok(Some(envelope));
                    }
                };
                let mut buffer = op.recv;
                if envelope.bytes > capacity || !op.accepts_code(envelope.code) {
                    // It is taken out of the way.
                    spill = StartedMemory::allocate(envelope.bytes as usize)?;
                    buffer = spill.start();
                }
                RECORDER.met();
                // SAFETY: the buffer holds the message, and outlives the request, which is waited
                // for.
                let request = unsafe { shim.start_receive(message, element, buffer) }?;
                break (request, envelope);
            }
        };
        let status = complete(shim, &mut request)?;
        drop(spill);
        // SAFETY: the user's status lives as long as programs that name it.
        unsafe { shim.write_status(&status, &envelope, op.status as usize) };
        Ok(Some(envelope))
    }

    /// The communicator with that handle is freed when this returns. Not from within MPI.
    pub fn free(&self, comm: u64) {
        let mut table = self.shared.table.lock();
        for row in &mut table.rows {
            if matches!(row.state, StartedState::Unmatched) && row.posted.0.comm == comm {
                self.shared.fail(
                    row,
                    "the communicator was freed before the message came; wait for it first".into(),
                );
            }
        }
    }

    /// The messages and collectives that have not ended, for the table of pending operations.
    pub fn unfinished(&self) -> Vec<(Operation<'static>, Vec<i64>)> {
        let table = self.shared.table.lock();
        let running = table
            .rows
            .iter()
            .filter(|row| matches!(row.state, StartedState::Running(..)));
        running
            .map(|row| (row.operation, row.shape.clone()))
            .collect()
    }

    /// What has not ended: sends, receives with and without a message, and collectives. They need
    /// no words, since nobody may wait for them.
    pub(crate) fn in_background(&self) -> Vec<Waiting> {
        let table = self.shared.table.lock();
        let rows = table.rows.iter().filter(|row| !row.has_ended());
        rows.map(|row| Waiting {
            operation: row.operation,
            members: row.members,
            words: String::new(),
            time: Duration::ZERO,
            calls_user: false,
            number: row.place,
        })
        .collect()
    }

    /// Ends everything: what is sent is sent; says what is lost.
    pub fn finish(&self) -> Vec<String> {
        let mut lost = Vec::new();
        let mut spins = 0;
        loop {
            let mut table = self.shared.table.lock();
            self.shared.progress(&mut table);
            table.rows.retain_mut(|row| {
                let mut operation: Operation<'_> = row.operation;
                operation.send = Buffer::described(operation.send.dtype(), &row.shape);
                match &row.state {
                    StartedState::Running(..) => return true,
                    StartedState::Failed(reason) => {
                        lost.push(format!("{operation} failed: {reason}"))
                    }
                    StartedState::Unmatched | StartedState::Done(..)
                        if operation.kind.receives() =>
                    {
                        lost.push(format!(
                            "{operation} was never waited for, and its message is lost"
                        ));
                    }
                    StartedState::Done(..) if operation.kind.is_collective() => {
                        lost.push(format!("{operation} was never waited for"))
                    }
                    StartedState::Unmatched | StartedState::Done(..) => {}
                }
                false
            });
            self.shared.unmatched.store(0, Ordering::Release);
            if table.rows.is_empty() {
                return lost;
            }
            drop(table);
            pause(&mut spins);
        }
    }
}

/// Writes a short message to the result of `op`, which has elements of `element`, if it is of that
/// type and fits.
///
/// # Safety
/// The result must be valid for its count of `element`s.
#[inline]
unsafe fn write_short(op: &ShimOp, element: Datatype, received: &ShimReceived, data: Data<'_>) {
    let capacity = op.recv_count as usize * element.size();
    let bytes = data[0].len() + data[1].len();
    if bytes > capacity || !op.accepts_code(received.code) {
        return;
    }
    let mut to: *mut u8 = op.recv.cast();
    for piece in data.into_iter().filter(|piece| !piece.is_empty()) {
        // SAFETY: it has room, as this function demands, and is no memory that ranks share.
        unsafe {
            std::ptr::copy_nonoverlapping(piece.as_ptr(), to, piece.len());
            to = to.add(piece.len());
        }
    }
}
