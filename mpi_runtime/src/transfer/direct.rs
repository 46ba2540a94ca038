//! Operations on device memory by an MPI that reads and writes it by itself.
//!
//! MPI knows nothing of streams: it is called once everything before the operation has happened on
//! the device, and what comes later in the program's stream is launched after MPI has returned.
//! XLA's arrays may lie in memory that MPI cannot pass on (CUDA's virtual memory management), so by
//! default MPI gets copies on the device, in memory that it can.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mpi_shim_abi::{Kind, PROC_NULL, Reduction};
use parking_lot::Mutex;

use crate::buffer::{Buffer, Class};
use crate::device::{self, Address, Copy, Device, DeviceError, Event, Fill, Stream};
use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::operation::Operation;
use crate::transfer::choice::Through;
use crate::transfer::transport::{Done, Perform};

/// Smallest piece of memory for copies, and the largest that is kept.
const SMALLEST: usize = 64 << 10;
const KEPT: usize = 64 << 20;

/// A device whose memory MPI uses.
pub struct Direct {
    device: Arc<dyn Device>,
    /// Whether MPI gets the arrays themselves.
    arrays: AtomicBool,
    /// Memory for copies, each with what still uses it.
    free: Mutex<Vec<(Event, DevicePiece)>>,
}

/// Memory of the device.
#[derive(Clone, Copy, Debug)]
struct DevicePiece {
    data: Address,
    bytes: usize,
}

/// Which of its arrays an operation uses on this rank (MPI 4.0, chapters 3 and 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Uses {
    reads: bool,
    writes: bool,
}

impl Uses {
    fn of(op: &Operation<'_>, comm: &Communicator) -> Uses {
        let is_root = comm.rank == op.root;
        let to_nobody = op.kind.sends() && op.dest == PROC_NULL;
        let reads = op.kind.reads(is_root) && !to_nobody;
        let writes = op.kind.writes(is_root);
        Uses { reads, writes }
    }
}

impl Direct {
    /// For arrays on `device`.
    pub fn new(device: Arc<dyn Device>, through: Through) -> Direct {
        Direct {
            device,
            arrays: AtomicBool::new(through == Through::Arrays),
            free: Mutex::default(),
        }
    }

    /// What MPI gets from now on.
    pub fn switch(&self, through: Through) {
        let arrays = through == Through::Arrays;
        self.arrays.store(arrays, Ordering::Relaxed);
    }

    /// Whether MPI can execute it on device memory, the same on all ranks. It reduces by functions
    /// of ours or the user's only in memory of the host, and so may any MPI reduce what is no
    /// number of C. With more ranks than cores (`oversubscribed`) collectives are nonblocking ones,
    /// which Open MPI does not execute on device memory.
    pub fn can(op: &Operation<'_>, oversubscribed: bool) -> bool {
        let dtype = op.send.dtype();
        let reduces = |reduction| match dtype.class() {
            Class::Integer => reduction != Reduction::User,
            Class::Real => {
                dtype.size() >= 4 && matches!(reduction, Reduction::Sum | Reduction::Prod)
            }
            Class::Complex => matches!(reduction, Reduction::Sum | Reduction::Prod),
            Class::Logical | Class::Opaque => false,
        };
        match op.kind {
            kind if kind.is_message() => true,
            // The engine keeps their data in memory of the host.
            kind if kind.is_start() => false,
            Kind::Exscan => false,
            // Zeros are put where there is no neighbour, in memory of the host.
            kind if kind.has_neighbors() => false,
            kind if kind.is_collective() && !oversubscribed => op.reduction.is_none_or(reduces),
            _ => false,
        }
    }

    /// Executes `op`, whose memory is the device's, in the place of `main` where the program is.
    pub(crate) fn execute(
        &self,
        op: &Operation<'_>,
        comm: &Communicator,
        main: Stream,
        perform: &mut Perform<'_>,
    ) -> Result<Done, Failure> {
        let uses = Uses::of(op, comm);
        let mut copies = [None; 2];
        let done = self.between(op, uses, main, &mut copies, perform);
        for piece in copies.into_iter().flatten() {
            self.give_back(piece, main);
        }
        done
    }

    fn between(
        &self,
        op: &Operation<'_>,
        uses: Uses,
        main: Stream,
        copies: &mut [Option<DevicePiece>; 2],
        perform: &mut Perform<'_>,
    ) -> Result<Done, Failure> {
        let (operand, result) = (op.send.data() as Address, op.recv.data() as Address);
        let [to_send, to_receive] = copies;
        let send = self.place(&op.send, uses.reads, to_send)?;
        let recv = self.place(&op.recv, uses.writes, to_receive)?;
        if uses.reads {
            self.copy(main, operand, send, op.send.bytes())?;
        }
        let here = self.device.record(main)?;
        device::pass(&*self.device, here)?;
        // SAFETY: each is the operation's own array, or a copy as long as it, which is given back
        // after this; for an MPI that knows the device.
        let (send, recv_placed) = unsafe {
            let (send, recv) = (send as *mut _, recv as *mut _);
            (op.send.placed(send), op.recv.placed(recv))
        };
        let done = perform(&Operation {
            send,
            recv: recv_placed,
            ..*op
        })?;
        let missing = missing(op, done)?;
        if uses.writes {
            let arrived = op.recv.bytes() - missing;
            self.copy(main, recv, result, arrived)?;
            if missing > 0 {
                let zeros = Fill::Zeros(missing);
                // SAFETY: the end of the result, which is valid for what is in the stream.
                unsafe { self.device.fill(main, result + arrived, zeros) }?;
            }
        } else if op.kind.has_result() && result != 0 {
            // This rank's result is its operand.
            self.copy(main, operand, result, op.send.bytes())?;
        }
        Ok(done)
    }

    /// Where MPI finds an array that it uses.
    fn place(
        &self,
        array: &Buffer<'_>,
        used: bool,
        copy: &mut Option<DevicePiece>,
    ) -> Result<Address, Failure> {
        let bytes = array.bytes();
        if !used || bytes == 0 || self.arrays.load(Ordering::Relaxed) {
            return Ok(array.data() as Address);
        }
        let piece = self.take(bytes)?;
        Ok(copy.insert(piece).data)
    }

    fn copy(&self, main: Stream, from: Address, to: Address, bytes: usize) -> Result<(), Failure> {
        if bytes == 0 || from == to {
            return Ok(());
        }
        // SAFETY: operand, result and copies of one operation, which do not overlap, are valid for
        // what is in the stream, and hold that many bytes.
        unsafe { self.device.copy(main, Copy::Across { to, from }, bytes) }?;
        Ok(())
    }

    /// Memory for a copy of `bytes`.
    fn take(&self, bytes: usize) -> Result<DevicePiece, DeviceError> {
        let bytes = match bytes {
            0..=KEPT => bytes.next_power_of_two().max(SMALLEST),
            _ => bytes,
        };
        let mut free = self.free.lock();
        for place in 0..free.len() {
            let (event, piece) = &free[place];
            if piece.bytes == bytes && self.device.has_passed(event)? {
                let (event, piece) = free.swap_remove(place);
                self.device.forget(event);
                return Ok(piece);
            }
        }
        let data = self.device.memory(bytes)?;
        Ok(DevicePiece { data, bytes })
    }

    /// The piece is free once everything in `main` has happened. If the device has failed it is
    /// lost.
    fn give_back(&self, piece: DevicePiece, main: Stream) {
        let Ok(behind) = self.device.record(main) else {
            return;
        };
        if piece.bytes <= KEPT {
            self.free.lock().push((behind, piece));
        } else if device::pass(&*self.device, behind).is_ok() {
            self.device.free_memory(piece.data);
        }
    }
}

/// Bytes of the result that a message leaves unwritten, if it may.
fn missing(op: &Operation<'_>, done: Done) -> Result<usize, Failure> {
    if !op.kind.is_receive() {
        return Ok(0);
    }
    op.missing(done.source, done.tag, done.bytes)
}
