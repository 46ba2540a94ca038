//! Messages whose start and end are separate operations: `isend`, `irecv` and `wait`.
//!
//! The engine keeps their data in memory of its own, since XLA may use an operand's memory for
//! something else as soon as the operation that starts the message returns. It also decides itself
//! which receive gets which message, so that each message's length is known before a byte is written: in
//! the order in which the receives were started (MPI 4.0, section 3.5), of which the first that
//! accepts a message gets it; so a blocking receive looks here too while one of these has no message. A
//! thread moves messages on while the program computes.

use std::ffi::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mpi_shim_abi::{ANY, Datatype, PROC_NULL, ShimOp, ShimReceived, ShimStatus};
use parking_lot::{Condvar, Mutex};

use crate::error::Failure;
use crate::mpi::backoff::pause;
use crate::mpi::shim::{Message, MpiError, Request, Shim};
use crate::operation::{Buffer, Operation};

/// How long the thread sleeps between rounds that change nothing. It never yields instead: a thread
/// that wakes up is let in by one that computes, and a thread that yielded waits for its time slice.
const PAUSE: Duration = Duration::from_micros(50);
/// Messages whose memory is kept, and bytes of the largest.
const SPARES: usize = 8;
const LARGEST_SPARE: usize = 64 << 20;

/// The messages of this process that were started and not waited for.
pub struct NonblockingMessages {
    shared: Arc<Shared>,
}

struct Shared {
    shim: Shim,
    table: Mutex<MessageTable>,
    /// Something was started.
    started: Condvar,
    /// Receives that have no message yet; spares other receives the lock if there are none.
    unmatched: AtomicUsize,
}

#[derive(Default)]
struct MessageTable {
    last: u32,
    rows: Vec<Row>,
    has_thread: bool,
    /// Memory of messages that have ended, for the next ones: mapped afresh, a large message would pay
    /// for page faults.
    spare: Vec<Vec<u128>>,
}

/// A message.
struct Row {
    number: u32,
    /// What started it, without its arrays.
    operation: Operation<'static>,
    shape: Vec<i64>,
    posted: Posted,
    /// What is sent, or arrives; in 16-byte elements, so that it is aligned for all types.
    memory: Vec<u128>,
    state: MessageState,
}

/// As the shim takes it; its pointers are not used, but for what is sent, which is the row's memory.
#[derive(Clone, Copy)]
struct Posted(ShimOp);

// SAFETY: see above; memory of a vector does not move with it.
unsafe impl Send for Posted {}

enum MessageState {
    /// A receive that has no message yet.
    Unmatched,
    Running(Request, ShimReceived),
    Done(ShimStatus, ShimReceived),
    Failed(Failure),
}

/// A message that was waited for.
pub struct Ended<'a> {
    nonblocking: &'a NonblockingMessages,
    /// What started it.
    pub operation: Operation<'static>,
    /// What arrived.
    pub received: ShimReceived,
    status: ShimStatus,
    memory: Vec<u128>,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        self.nonblocking.shared.table.lock().keep(memory);
    }
}

impl Ended<'_> {
    /// Copies the beginning of what arrived.
    pub fn begin(&self, to: &mut [u8]) {
        let arrived = usize::try_from(self.received.bytes).unwrap_or(0);
        let bytes = to.len().min(arrived);
        if bytes > 0 {
            // SAFETY: the memory holds what arrived.
            unsafe {
                let from = self.memory.as_ptr().cast::<u8>();
                from.copy_to_nonoverlapping(to.as_mut_ptr(), bytes);
            }
        }
    }

    /// Copies what arrived to `result`, if it fits, and fills the user's status.
    pub fn write(&self, result: &Buffer<'_>, shim: &Shim, status: usize) {
        let arrived = usize::try_from(self.received.bytes).unwrap_or(0);
        if arrived > 0 && arrived <= result.bytes() {
            // SAFETY: the memory holds what arrived, and the result as many bytes, as whoever made the
            // operation promises.
            unsafe {
                self.memory
                    .as_ptr()
                    .cast::<u8>()
                    .copy_to_nonoverlapping(result.data.cast(), arrived);
            }
        }
        // SAFETY: the user's status lives as long as programs that name it.
        unsafe { shim.write_status(&self.status, status) };
    }
}

impl NonblockingMessages {
    /// None yet.
    pub fn new(shim: Shim) -> NonblockingMessages {
        NonblockingMessages {
            shared: Arc::new(Shared {
                shim,
                table: Mutex::default(),
                started: Condvar::new(),
                unmatched: AtomicUsize::new(0),
            }),
        }
    }

    /// Starts a message and returns its number.
    pub fn start(&self, op: &Operation<'_>, shim_op: &ShimOp) -> Result<u32, Failure> {
        let shared = &self.shared;
        let sends = op.kind.sends();
        let mut memory = Vec::new();
        let mut posted = *shim_op;
        if sends {
            memory = shared.table.lock().memory(op.send.bytes())?;
            // SAFETY: the operand is valid for its bytes, as whoever made the operation promises, and
            // the memory is as large.
            unsafe {
                op.send
                    .data
                    .cast::<u8>()
                    .copy_to_nonoverlapping(memory.as_mut_ptr().cast(), op.send.bytes());
            }
            posted.send = memory.as_ptr().cast();
        }
        let nothing = ShimReceived::default();
        shared.clone().start_thread()?;
        let mut table = shared.table.lock();
        let state = if sends {
            // SAFETY: the row keeps the memory until the request is complete.
            let request = unsafe { shared.shim.start_send(&posted) };
            MessageState::Running(request?, nothing)
        } else {
            shared.unmatched.fetch_add(1, Ordering::AcqRel);
            MessageState::Unmatched
        };
        table.last = table.last.wrapping_add(1).max(1);
        let number = table.last;
        table.rows.push(Row {
            number,
            operation: op.without_arrays(),
            shape: op.send.shape.to_vec(),
            posted: Posted(posted),
            memory,
            state,
        });
        shared.progress(&mut table);
        shared.started.notify_one();
        Ok(number)
    }

    /// What started the message with that number, and the shape of what it sends.
    pub fn find(&self, number: u32) -> Result<(Operation<'static>, Vec<i64>), Failure> {
        let table = self.shared.table.lock();
        let row = table.rows.iter().find(|row| row.number == number);
        row.map(|row| (row.operation, row.shape.clone()))
            .ok_or_else(|| {
                "no message has this request: it was waited for before, or it is of another run"
                    .into()
            })
    }

    /// Waits until the message is complete and takes it out of the table.
    pub fn wait(&self, number: u32) -> Result<Ended<'_>, Failure> {
        let mut spins = 0;
        loop {
            let mut table = self.shared.table.lock();
            self.shared.progress(&mut table);
            let index = table.rows.iter().position(|row| row.number == number);
            let Some(index) = index else {
                return Err("another thread has waited for this request".into());
            };
            if table.rows[index].has_ended() {
                let row = table.rows.remove(index);
                return match row.state {
                    MessageState::Done(status, received) => Ok(Ended {
                        nonblocking: self,
                        operation: row.operation,
                        received,
                        status,
                        memory: row.memory,
                    }),
                    MessageState::Failed(reason) => Err(reason),
                    MessageState::Unmatched | MessageState::Running(..) => {
                        unreachable!("it has ended")
                    }
                };
            }
            drop(table);
            pause(&mut spins);
        }
    }

    /// Whether a receive must look whether its message belongs to one started before.
    pub fn are_first(&self) -> bool {
        self.shared.unmatched.load(Ordering::Acquire) > 0
    }

    /// Executes a receive or exchange behind the receives started before.
    ///
    /// # Safety
    /// The buffers of `op` must be valid for its counts and types.
    pub unsafe fn receive_after(&self, op: &ShimOp) -> Result<ShimReceived, Failure> {
        let shim = &self.shared.shim;
        let exchanges = op.kind.sends();
        let mut sending = if exchanges && op.dest != PROC_NULL {
            // SAFETY: the operand outlives this call, which waits for the request.
            Some(unsafe { shim.start_send(op) }?)
        } else {
            None
        };
        let element = if exchanges {
            op.recv_datatype
        } else {
            op.datatype
        };
        let received = self.receive(op, element);
        // Whatever happened: the operand is MPI's until the send is complete.
        if let Some(sending) = &mut sending {
            complete(shim, sending)?;
        }
        received
    }

    fn receive(&self, op: &ShimOp, element: Datatype) -> Result<ShimReceived, Failure> {
        let mut spins = 0;
        loop {
            if let Some(received) = self.try_receive(op, element)? {
                return Ok(received);
            }
            pause(&mut spins);
        }
    }

    /// Receives the message that `op` receives, as elements of `element`, if one is there and belongs to
    /// no receive started before.
    pub(crate) fn try_receive(
        &self,
        op: &ShimOp,
        element: Datatype,
    ) -> Result<Option<ShimReceived>, Failure> {
        let shared = &self.shared;
        let capacity = op.recv_count * element.size() as i64;
        let mut spill = Vec::new();
        let (mut request, envelope) = {
            let mut table = shared.table.lock();
            shared.progress(&mut table);
            loop {
                let Some(message) = shared.shim.take(op)? else {
                    return Ok(None);
                };
                let envelope = message.envelope;
                if let Some(index) = taker(&table.rows, op.comm, &envelope) {
                    shared.receive_into(&mut table, index, message);
                    continue;
                }
                let mut buffer = op.recv;
                if envelope.bytes > capacity {
                    // A longer message is taken out of the way.
                    spill = allocate(envelope.bytes as usize)?;
                    buffer = spill.as_mut_ptr().cast();
                }
                // SAFETY: the buffer holds the message, and outlives the request, which is waited for.
                let request = unsafe { shared.shim.start_receive(message, element, buffer) }?;
                break (request, envelope);
            }
        };
        let status = complete(&shared.shim, &mut request)?;
        drop(spill);
        // SAFETY: the user's status lives as long as programs that name it.
        unsafe { shared.shim.write_status(&status, op.status as usize) };
        Ok(Some(envelope))
    }

    /// The communicator with that handle is freed when this returns. Not from within MPI.
    pub fn free(&self, comm: u64) {
        let mut table = self.shared.table.lock();
        for row in &mut table.rows {
            if matches!(row.state, MessageState::Unmatched) && row.posted.0.comm == comm {
                self.shared.fail(
                    row,
                    "the communicator was freed before the message came; wait for it first".into(),
                );
            }
        }
    }

    /// The messages that have not ended, for the table of pending operations.
    pub fn unfinished(&self) -> Vec<(Operation<'static>, Vec<i64>)> {
        let table = self.shared.table.lock();
        let running = table
            .rows
            .iter()
            .filter(|row| matches!(row.state, MessageState::Running(..)));
        running
            .map(|row| (row.operation, row.shape.clone()))
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
                let operation = &row.operation;
                match &row.state {
                    MessageState::Running(..) => return true,
                    MessageState::Failed(reason) => {
                        lost.push(format!("{operation} failed: {reason}"))
                    }
                    MessageState::Unmatched | MessageState::Done(..)
                        if operation.kind.receives() =>
                    {
                        lost.push(format!(
                            "{operation} was never waited for, and its message is lost"
                        ));
                    }
                    MessageState::Unmatched | MessageState::Done(..) => {}
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

impl MessageTable {
    /// Memory for so many bytes.
    fn memory(&mut self, bytes: usize) -> Result<Vec<u128>, Failure> {
        let elements = bytes.div_ceil(size_of::<u128>());
        let fits = |spare: &Vec<u128>| (elements..=4 * elements).contains(&spare.capacity());
        match self.spare.iter().position(fits) {
            Some(index) if elements > 0 => Ok(self.spare.swap_remove(index)),
            _ => allocate(bytes),
        }
    }

    /// Keeps the memory of a message that has ended.
    fn keep(&mut self, memory: Vec<u128>) {
        let bytes = memory.capacity() * size_of::<u128>();
        if (1..=LARGEST_SPARE).contains(&bytes) {
            if self.spare.len() == SPARES {
                self.spare.remove(0);
            }
            self.spare.push(memory);
        }
    }
}

impl Row {
    fn has_ended(&self) -> bool {
        matches!(self.state, MessageState::Done(..) | MessageState::Failed(_))
    }
}

/// What MPI_Finalize must stop.
static ACTIVE: OnceLock<Arc<Shared>> = OnceLock::new();

extern "C" fn finalizing(_: i64) -> c_int {
    if let Some(shared) = ACTIVE.get() {
        shared.stop();
    }
    0
}

impl Shared {
    /// MPI ends: fails what is not complete.
    fn stop(&self) {
        for row in self.table.lock().rows.iter_mut() {
            if !row.has_ended() {
                self.fail(row, "MPI was finalized before it was complete".into());
            }
        }
    }

    fn start_thread(self: Arc<Shared>) -> Result<(), Failure> {
        let mut table = self.table.lock();
        if !table.has_thread {
            // MPI_Finalize begins with the attributes of COMM_SELF (MPI 4.0, section 11.2.4).
            let of = self.shim.comm_self();
            self.shim.comm_watch(of, 0, finalizing)?;
            ACTIVE.get_or_init(|| self.clone());
            let shared = self.clone();
            std::thread::Builder::new()
                .name("mpi_cuda messages".into())
                .spawn(move || shared.work())
                .map_err(|error| Failure::from(format!("cannot start a thread: {error}")))?;
            table.has_thread = true;
        }
        Ok(())
    }

    /// What the thread does.
    fn work(&self) {
        loop {
            let mut table = self.table.lock();
            while table.rows.iter().all(Row::has_ended) {
                self.started.wait(&mut table);
            }
            let changed = self.progress(&mut table);
            drop(table);
            if !changed {
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// Moves every message on; whether anything changed.
    fn progress(&self, table: &mut MessageTable) -> bool {
        let mut changed = false;
        for index in 0..table.rows.len() {
            let row = &mut table.rows[index];
            match &mut row.state {
                MessageState::Unmatched => {
                    match self.shim.take(&row.posted.0) {
                        Ok(None) => {}
                        Ok(Some(message)) => {
                            let comm = row.posted.0.comm;
                            // At least this row accepts it; an earlier one may, too.
                            if let Some(first) = taker(&table.rows, comm, &message.envelope) {
                                self.receive_into(table, first, message);
                            }
                            changed = true;
                        }
                        Err(error) => self.fail(row, error.into()),
                    }
                }
                MessageState::Running(request, envelope) => {
                    let envelope = *envelope;
                    match self.shim.test(request) {
                        Ok(None) => {}
                        Ok(Some(status)) => {
                            row.state = MessageState::Done(status, envelope);
                            changed = true;
                        }
                        Err(error) => self.fail(row, error.into()),
                    }
                }
                MessageState::Done(..) | MessageState::Failed(_) => {}
            }
        }
        changed
    }

    /// Starts to receive a message into the row that gets it.
    fn receive_into(&self, table: &mut MessageTable, index: usize, message: Message) {
        let envelope = message.envelope;
        let memory = table.memory(envelope.bytes as usize);
        let row = &mut table.rows[index];
        match memory {
            Ok(memory) => row.memory = memory,
            Err(reason) => return self.fail(row, reason),
        }
        let (datatype, buffer) = (row.posted.0.datatype, row.memory.as_mut_ptr());
        // SAFETY: the row keeps the memory until the request is complete.
        let started = unsafe { self.shim.start_receive(message, datatype, buffer.cast()) };
        match started {
            Ok(request) => {
                self.unmatched.fetch_sub(1, Ordering::AcqRel);
                row.state = MessageState::Running(request, envelope);
            }
            Err(error) => self.fail(row, error.into()),
        }
    }

    fn fail(&self, row: &mut Row, reason: Failure) {
        if matches!(row.state, MessageState::Unmatched) {
            self.unmatched.fetch_sub(1, Ordering::AcqRel);
        }
        row.state = MessageState::Failed(reason);
    }
}

/// The row that gets a message: of those without one that accept it, the first.
fn taker(rows: &[Row], comm: u64, envelope: &ShimReceived) -> Option<usize> {
    rows.iter().position(|row| {
        let op = &row.posted.0;
        matches!(row.state, MessageState::Unmatched)
            && op.comm == comm
            && (op.source == ANY || op.source == envelope.source)
            && (op.recv_tag == ANY || op.recv_tag == envelope.tag)
    })
}

/// Waits until a request is complete.
fn complete(shim: &Shim, request: &mut Request) -> Result<ShimStatus, MpiError> {
    let mut spins = 0;
    loop {
        if let Some(status) = shim.test(request)? {
            return Ok(status);
        }
        pause(&mut spins);
    }
}

/// Memory for so many bytes.
fn allocate(bytes: usize) -> Result<Vec<u128>, Failure> {
    let mut memory = Vec::new();
    memory
        .try_reserve_exact(bytes.div_ceil(size_of::<u128>()))
        .map_err(|_| Failure::from(format!("no memory for a message of {bytes} bytes")))?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::check;
    use crate::mpi::communicators::Communicator;
    use mpi_shim_abi::Kind;

    fn receive(number: u32, comm: u64, source: i32, tag: i32, state: MessageState) -> Row {
        let operation = Operation {
            source,
            recv_tag: tag,
            ..Operation::new(Kind::Irecv, 0, Buffer::NONE, Buffer::NONE)
        };
        let communicator = Communicator {
            name: "test",
            handle: comm,
            user_handle: comm,
            rank: 0,
            size: 4,
            freed: false,
        };
        let posted = check::prepare(&operation, &communicator).unwrap();
        Row {
            number,
            operation,
            shape: Vec::new(),
            posted: Posted(posted),
            memory: Vec::new(),
            state,
        }
    }

    #[test]
    fn a_message_goes_to_the_first_receive_that_accepts_it() {
        let rows = [
            receive(1, 7, 1, 5, MessageState::Failed("it failed".into())),
            receive(2, 8, ANY, ANY, MessageState::Unmatched),
            receive(3, 7, 1, 5, MessageState::Unmatched),
            receive(4, 7, ANY, 5, MessageState::Unmatched),
            receive(5, 7, ANY, ANY, MessageState::Unmatched),
        ];
        let gets = |comm, source, tag| {
            let envelope = ShimReceived {
                source,
                tag,
                bytes: 0,
            };
            taker(&rows, comm, &envelope).map(|index| rows[index].number)
        };
        assert_eq!(gets(7, 1, 5), Some(3));
        assert_eq!(gets(7, 2, 5), Some(4));
        assert_eq!(gets(7, 1, 6), Some(5));
        assert_eq!(gets(8, 1, 5), Some(2));
        assert_eq!(gets(9, 1, 5), None);
    }
}
