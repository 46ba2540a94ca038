//! The table of messages and collectives that were started, and what moves them on: every call that
//! looks at them, and a thread.

use std::cell::Cell;
use std::ffi::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use mpi_shim_abi::{ANY, PROC_NULL, ShimOp, ShimReceived, ShimStatus};
use parking_lot::{Condvar, Mutex};

use crate::engine::idle;
use crate::engine::nonblocking::memory::StartedMemory;
use crate::engine::short_messages::{Came, ShortMessages};
use crate::error::{Failure, MpiError};
use crate::mpi::backoff::pause;
use crate::mpi::shim::{Request, Shim};
use crate::operation::Operation;

/// Why there are no messages in a world without MPI.
pub const NO_MESSAGES: &str = "messages need an MPI, and this process runs without one";

/// Messages whose memory is kept, bytes of the largest, and bytes of all.
const SPARES: usize = 64;
const LARGEST_SPARE: usize = 64 << 20;
const ALL_SPARES: usize = 8 * LARGEST_SPARE;

/// What calls and the thread share.
pub(super) struct Shared {
    /// None in a world without MPI.
    pub(super) shim: Option<Shim>,
    /// What goes through memory that ranks share; nothing if that is not set.
    pub(super) short: OnceLock<ShortMessages>,
    pub(super) table: Mutex<StartedTable>,
    /// Something was started.
    pub(super) started: Condvar,
    /// Receives that have no message yet; spares other receives the lock if there are none.
    pub(super) unmatched: AtomicUsize,
}

#[derive(Default)]
pub(super) struct StartedTable {
    pub(super) last: u32,
    pub(super) rows: Vec<StartedRow>,
    has_thread: bool,
    /// Memory of messages that have ended, for the next ones: mapped afresh, a large message would
    /// pay for page faults.
    spare: Vec<StartedMemory>,
}

/// A message or a collective.
pub(super) struct StartedRow {
    pub(super) number: u32,
    /// What started it, without its arrays.
    pub(super) operation: Operation<'static>,
    /// The ranks of its communicator in the world; none means all, in order.
    pub(super) members: &'static [i32],
    pub(super) shape: Vec<i64>,
    pub(super) posted: Posted,
    /// What is sent, or arrives; of a collective its result.
    pub(super) memory: StartedMemory,
    /// What a collective sends, if it has a result apart from it.
    pub(super) operand: StartedMemory,
    pub(super) state: StartedState,
    /// Of a collective, its place among those of its communicator, from 1; 0 if it is not known.
    pub(super) place: u64,
}

/// As the shim takes it; its pointers are not used, but for those to the row's memory.
#[derive(Clone, Copy)]
pub(super) struct Posted(pub(super) ShimOp);

// SAFETY: its pointers are used by MPI alone, and the row's memory stays where it is when a row
// moves.
unsafe impl Send for Posted {}

pub(super) enum StartedState {
    /// A receive that has no message yet.
    Unmatched,
    Running(Request, ShimReceived),
    Done(ShimStatus, ShimReceived),
    Failed(Failure),
}

impl StartedTable {
    /// Memory for so many bytes.
    pub(super) fn memory(&mut self, bytes: usize) -> Result<StartedMemory, Failure> {
        let fits = |spare: &StartedMemory| {
            let needed = bytes.next_multiple_of(StartedMemory::UNIT);
            (needed..=4 * needed).contains(&spare.room())
        };
        match self.spare.iter().position(fits) {
            Some(index) if bytes > 0 => Ok(self.spare.swap_remove(index)),
            _ => StartedMemory::allocate(bytes),
        }
    }

    /// Keeps the memory of a message that has ended.
    pub(super) fn keep(&mut self, memory: StartedMemory) {
        if (1..=LARGEST_SPARE).contains(&memory.room()) {
            self.spare.push(memory);
            let room =
                |spare: &[StartedMemory]| -> usize { spare.iter().map(StartedMemory::room).sum() };
            while self.spare.len() > SPARES || room(&self.spare) > ALL_SPARES {
                self.spare.remove(0);
            }
        }
    }
}

impl StartedRow {
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.state, StartedState::Done(..) | StartedState::Failed(_))
    }

    /// Whether it is a receive whose message is there.
    pub(super) fn has_come(&self) -> bool {
        let came = matches!(
            self.state,
            StartedState::Running(..) | StartedState::Done(..)
        );
        came && self.operation.kind.receives()
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
    pub(super) fn new(shim: Option<Shim>) -> Shared {
        Shared {
            shim,
            short: OnceLock::new(),
            table: Mutex::default(),
            started: Condvar::new(),
            unmatched: AtomicUsize::new(0),
        }
    }

    /// MPI ends: fails what is not complete.
    fn stop(&self) {
        for row in self.table.lock().rows.iter_mut() {
            if !row.has_ended() {
                self.fail(row, "MPI was finalized before it was complete".into());
            }
        }
    }

    /// What messages go through.
    pub(super) fn shim(&self) -> Result<&Shim, Failure> {
        self.shim.as_ref().ok_or_else(|| NO_MESSAGES.into())
    }

    /// Enters what was started, under a new number, which this returns.
    pub(super) fn enter(&self, table: &mut StartedTable, row: StartedRow) -> u32 {
        table.last = table.last.wrapping_add(1).max(1);
        let number = table.last;
        table.rows.push(StartedRow { number, ..row });
        self.progress(table);
        self.started.notify_one();
        number
    }

    pub(super) fn start_thread(self: Arc<Shared>, shim: &Shim) -> Result<(), Failure> {
        let mut table = self.table.lock();
        if !table.has_thread {
            // MPI_Finalize begins with the attributes of COMM_SELF (MPI 4.0, section 11.2.4).
            shim.comm_watch(shim.comm_self(), 0, finalizing)?;
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
        let (mut last, mut since) = (0, Instant::now());
        loop {
            let mut table = self.table.lock();
            while table.rows.iter().all(StartedRow::has_ended) {
                self.started.wait(&mut table);
            }
            let changed = self.progress(&mut table);
            if changed || table.last != last {
                (last, since) = (table.last, Instant::now());
            }
            drop(table);
            if !changed {
                idle::sleep(since.elapsed(), || false);
            }
        }
    }

    /// The short messages, and which of their communicators that is, if it has them.
    #[inline]
    pub(super) fn short(&self, comm: u64) -> Option<(&ShortMessages, usize)> {
        let short = self.short.get()?;
        Some((short, short.comm(comm)?))
    }

    /// Whether a message has come that `op` may receive, and that MPI does not know of.
    pub(super) fn has_news(&self, op: &ShimOp) -> bool {
        let short = self.short(op.comm);
        short.is_some_and(|(short, _)| short.has_news(op))
    }

    /// Takes the message that `op` would receive, if one is there.
    pub(super) fn take(&self, shim: &Shim, op: &ShimOp) -> Result<Option<Came>, MpiError> {
        match self.short(op.comm) {
            Some((short, comm)) => {
                let came = short.take(shim, comm, op);
                if let Ok(Some(Came::Short { .. })) = came {
                    move_on(shim);
                }
                came
            }
            None => Ok(shim.take(op)?.map(Came::Mpi)),
        }
    }

    /// Starts to send what `op` sends; none if it has been sent.
    ///
    /// # Safety
    /// As for [`Shim::start_send`].
    pub(super) unsafe fn start_send(
        &self,
        shim: &Shim,
        op: &ShimOp,
    ) -> Result<Option<Request>, MpiError> {
        let short = match op.dest {
            PROC_NULL => None,
            _ => self.short(op.comm),
        };
        if let Some((short, comm)) = short {
            let bytes = op.count as usize * op.datatype.size();
            let data = match bytes {
                0 => &[],
                // SAFETY: what is sent stays as it is, as this function demands.
                _ => unsafe { std::slice::from_raw_parts(op.send.cast(), bytes) },
            };
            // SAFETY: as this function demands.
            let sent = short.send(comm, op, data, || unsafe { shim.start_send(op) });
            if let Ok(None) = sent {
                move_on(shim);
            }
            return sent;
        }
        // SAFETY: as this function demands.
        unsafe { shim.start_send(op) }.map(Some)
    }

    /// Moves everything on; whether anything changed.
    pub(super) fn progress(&self, table: &mut StartedTable) -> bool {
        let Some(shim) = &self.shim else {
            return false;
        };
        let mut changed = false;
        for index in 0..table.rows.len() {
            let row = &mut table.rows[index];
            match &mut row.state {
                StartedState::Unmatched => {
                    match self.take(shim, &row.posted.0) {
                        Ok(None) => {}
                        Ok(Some(came)) => {
                            let comm = row.posted.0.comm;
                            // At least this row accepts it; an earlier one may, too.
                            if let Some(first) = taker(&table.rows, comm, came.envelope()) {
                                self.receive_into(shim, table, first, came);
                            }
                            changed = true;
                        }
                        Err(error) => self.fail(row, error.into()),
                    }
                }
                StartedState::Running(request, envelope) => {
                    let envelope = *envelope;
                    match shim.test(request) {
                        Ok(None) => {}
                        Ok(Some(status)) => {
                            row.state = StartedState::Done(status, envelope);
                            changed = true;
                        }
                        Err(error) => self.fail(row, error.into()),
                    }
                }
                StartedState::Done(..) | StartedState::Failed(_) => {}
            }
        }
        changed
    }

    /// Starts to receive a message into the row that gets it.
    pub(super) fn receive_into(
        &self,
        shim: &Shim,
        table: &mut StartedTable,
        index: usize,
        came: Came,
    ) {
        let envelope = *came.envelope();
        let memory = table.memory(envelope.bytes as usize);
        let row = &mut table.rows[index];
        match memory {
            Ok(memory) => row.memory = memory,
            Err(reason) => return self.fail(row, reason),
        }
        let (datatype, buffer) = (row.posted.0.datatype, row.memory.start());
        let state = match came {
            // SAFETY: the row keeps the memory until the request is complete.
            Came::Mpi(message) => unsafe { shim.start_receive(message, datatype, buffer) }
                .map(|request| StartedState::Running(request, envelope)),
            Came::Short { data, .. } => {
                row.memory.write(&data);
                let status = shim.make_status(&envelope);
                status.map(|status| StartedState::Done(status, envelope))
            }
        };
        match state {
            Ok(state) => {
                self.unmatched.fetch_sub(1, Ordering::AcqRel);
                row.state = state;
            }
            Err(error) => self.fail(row, error.into()),
        }
    }

    pub(super) fn fail(&self, row: &mut StartedRow, reason: Failure) {
        match row.state {
            StartedState::Unmatched => {
                self.unmatched.fetch_sub(1, Ordering::AcqRel);
            }
            StartedState::Running(..) => {
                // MPI may still read and write them, in MPI_Finalize too: they are never freed.
                std::mem::forget(std::mem::take(&mut row.memory));
                std::mem::forget(std::mem::take(&mut row.operand));
            }
            StartedState::Done(..) | StartedState::Failed(_) => {}
        }
        row.state = StartedState::Failed(reason);
    }
}

/// Has MPI move on now and then, when a message of this thread's has not needed it: what the
/// program has started by mpi4py may need it.
#[inline]
pub(super) fn move_on(shim: &Shim) {
    const EVERY: u32 = 16;
    thread_local! {
        static MESSAGES: Cell<u32> = const { Cell::new(0) };
    }
    let messages = MESSAGES.get().wrapping_add(1);
    MESSAGES.set(messages);
    if messages.is_multiple_of(EVERY) {
        shim.progress();
    }
}

/// The row that gets a message: of those without one that accept it, the first.
pub(super) fn taker(rows: &[StartedRow], comm: u64, envelope: &ShimReceived) -> Option<usize> {
    rows.iter().position(|row| {
        let op = &row.posted.0;
        matches!(row.state, StartedState::Unmatched)
            && op.comm == comm
            && (op.source == ANY || op.source == envelope.source)
            && (op.recv_tag == ANY || op.recv_tag == envelope.tag)
    })
}

/// Waits until a request is complete.
pub(super) fn complete(shim: &Shim, request: &mut Request) -> Result<ShimStatus, MpiError> {
    let mut spins = 0;
    loop {
        if let Some(status) = shim.test(request)? {
            return Ok(status);
        }
        pause(&mut spins);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Buffer;
    use crate::engine::check;
    use crate::mpi::communicators::Communicator;
    use mpi_shim_abi::Kind;

    fn receive(number: u32, comm: u64, source: i32, tag: i32, state: StartedState) -> StartedRow {
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
            members: &[],
            largest_tag: 0,
            freed: false,
        };
        let posted = check::prepare(&operation, &communicator).unwrap();
        StartedRow {
            number,
            operation,
            members: &[],
            shape: Vec::new(),
            posted: Posted(posted),
            memory: StartedMemory::default(),
            operand: StartedMemory::default(),
            state,
            place: 0,
        }
    }

    #[test]
    fn a_message_goes_to_the_first_receive_that_accepts_it() {
        let rows = [
            receive(1, 7, 1, 5, StartedState::Failed("it failed".into())),
            receive(2, 8, ANY, ANY, StartedState::Unmatched),
            receive(3, 7, 1, 5, StartedState::Unmatched),
            receive(4, 7, ANY, 5, StartedState::Unmatched),
            receive(5, 7, ANY, ANY, StartedState::Unmatched),
        ];
        let gets = |comm, source, tag| {
            let envelope = ShimReceived {
                code: 0,
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

    #[test]
    fn memory_that_mpi_may_write_is_not_freed() {
        let shared = Shared::new(None);
        let running = || StartedState::Running(Request(0), ShimReceived::default());
        let done = || StartedState::Done(ShimStatus([0; 64]), ShimReceived::default());
        for (state, is_kept) in [(running(), false), (done(), true)] {
            let mut row = receive(1, 7, 1, 5, state);
            row.memory = StartedMemory::allocate(64).unwrap();
            row.operand = StartedMemory::allocate(64).unwrap();
            shared.fail(&mut row, "it failed".into());
            assert!(row.has_ended());
            for memory in [&row.memory, &row.operand] {
                // What is left is freed with the row.
                assert_eq!(memory.room() > 0, is_kept);
            }
        }
    }
}
