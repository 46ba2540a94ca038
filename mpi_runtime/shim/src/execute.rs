//! The operations themselves; the only MPI calls that wait on a peer.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

use mpi::ffi;
use mpi_shim_abi::{Datatype, Kind, ShimOp, ShimReceived};

use crate::SUCCESS;
use crate::handle::comm_from_bits;
use crate::messages::exchange;
use crate::reduction::reduction;

/// Whether to give up the core while waiting; see [`mpi_shim_abi::ShimApi::set_polite`].
pub(crate) static POLITE: AtomicBool = AtomicBool::new(false);

/// Tests before the core is given up for the first time.
const SPINS: u32 = 64;

/// Executes `op`, whose buffers may be used again on return; returns MPI's code.
///
/// Blocking calls are the fastest, but some MPIs (MPICH 4.0) never yield in them: with more ranks
/// than cores a waiting rank then keeps its peer from running. Nonblocking calls and a loop of our
/// own do the same politely.
///
/// # Safety
/// The buffers of `op` must be valid for its counts and types, its status null or an `MPI_Status`.
pub(crate) unsafe fn execute(op: &ShimOp, received: &mut ShimReceived) -> c_int {
    *received = ShimReceived {
        source: -1,
        tag: -1,
        bytes: -1,
    };
    // SAFETY: as the caller promises.
    unsafe {
        if polite() {
            politely(op, received)
        } else {
            blocking(op, received)
        }
    }
}

/// # Safety
/// As for [`execute`].
unsafe fn blocking(op: &ShimOp, received: &mut ShimReceived) -> c_int {
    let comm = comm_from_bits(op.comm);
    let (send, recv) = (op.send, op.recv);
    let (count, recv_count) = (op.count, op.recv_count);
    let kind = datatype(op.datatype);
    let reduce = reduction(op.reduction, op.datatype);
    // SAFETY: the caller upholds the buffers; handles are live for the duration of the call.
    unsafe {
        match op.kind {
            Kind::Allgather => ffi::MPI_Allgather(send, count, kind, recv, recv_count, kind, comm),
            Kind::Allreduce => ffi::MPI_Allreduce(send, recv, count, kind, reduce, comm),
            Kind::Alltoall => ffi::MPI_Alltoall(send, count, kind, recv, recv_count, kind, comm),
            Kind::Barrier => ffi::MPI_Barrier(comm),
            Kind::Bcast => ffi::MPI_Bcast(bcast_buffer(op), count, kind, op.dest, comm),
            Kind::Gather => {
                ffi::MPI_Gather(send, count, kind, recv, recv_count, kind, op.dest, comm)
            }
            Kind::Reduce => ffi::MPI_Reduce(send, recv, count, kind, reduce, op.dest, comm),
            Kind::Scan => ffi::MPI_Scan(send, recv, count, kind, reduce, comm),
            Kind::Scatter => {
                ffi::MPI_Scatter(send, count, kind, recv, recv_count, kind, op.dest, comm)
            }
            Kind::Recv | Kind::Send | Kind::Sendrecv => exchange(op, received),
        }
    }
}

/// # Safety
/// As for [`execute`].
unsafe fn politely(op: &ShimOp, received: &mut ShimReceived) -> c_int {
    let comm = comm_from_bits(op.comm);
    let (send, recv) = (op.send, op.recv);
    let (count, recv_count) = (op.count, op.recv_count);
    let kind = datatype(op.datatype);
    let reduce = reduction(op.reduction, op.datatype);
    // SAFETY: as for `blocking`; the buffers outlive the request, which is waited for.
    unsafe {
        let mut own_request = ffi::RSMPI_REQUEST_NULL;
        let request = &mut own_request;
        let started = match op.kind {
            Kind::Allgather => {
                ffi::MPI_Iallgather(send, count, kind, recv, recv_count, kind, comm, request)
            }
            Kind::Allreduce => ffi::MPI_Iallreduce(send, recv, count, kind, reduce, comm, request),
            Kind::Alltoall => {
                ffi::MPI_Ialltoall(send, count, kind, recv, recv_count, kind, comm, request)
            }
            Kind::Barrier => ffi::MPI_Ibarrier(comm, request),
            Kind::Bcast => ffi::MPI_Ibcast(bcast_buffer(op), count, kind, op.dest, comm, request),
            Kind::Gather => {
                let root = op.dest;
                ffi::MPI_Igather(
                    send, count, kind, recv, recv_count, kind, root, comm, request,
                )
            }
            Kind::Reduce => {
                ffi::MPI_Ireduce(send, recv, count, kind, reduce, op.dest, comm, request)
            }
            Kind::Scan => ffi::MPI_Iscan(send, recv, count, kind, reduce, comm, request),
            Kind::Scatter => {
                let root = op.dest;
                ffi::MPI_Iscatter(
                    send, count, kind, recv, recv_count, kind, root, comm, request,
                )
            }
            Kind::Recv | Kind::Send | Kind::Sendrecv => return exchange(op, received),
        };
        if started != SUCCESS {
            return started;
        }
        let mut status = MaybeUninit::zeroed().assume_init();
        wait(request, &mut status)
    }
}

/// Whether to give up the core while waiting.
pub(crate) fn polite() -> bool {
    POLITE.load(Ordering::Relaxed)
}

/// Tests until the request is complete, giving up the core between tests.
///
/// # Safety
/// The request must be live or null.
pub(crate) unsafe fn wait(request: &mut ffi::MPI_Request, status: &mut ffi::MPI_Status) -> c_int {
    if !polite() {
        // SAFETY: as the caller promises.
        return unsafe { ffi::MPI_Wait(request, status) };
    }
    // SAFETY: as the caller promises.
    until(|done| unsafe { ffi::MPI_Test(request, done, status) })
}

/// Calls `test` until it fails or sets its flag, giving up the core between calls.
pub(crate) fn until(mut test: impl FnMut(&mut c_int) -> c_int) -> c_int {
    let mut tests = 0;
    loop {
        let mut done = 0;
        let code = test(&mut done);
        if code != SUCCESS || done != 0 {
            return code;
        }
        if tests < SPINS {
            tests += 1;
        } else {
            std::thread::yield_now();
        }
    }
}

/// The root sends from its operand (its result pointer is null); the others receive.
fn bcast_buffer(op: &ShimOp) -> *mut c_void {
    if op.recv.is_null() {
        op.send.cast_mut()
    } else {
        op.recv
    }
}

pub(crate) fn datatype(datatype: Datatype) -> ffi::MPI_Datatype {
    // SAFETY: constants of the linked MPI.
    unsafe {
        match datatype {
            Datatype::Bool => ffi::RSMPI_C_BOOL,
            Datatype::I8 => ffi::RSMPI_INT8_T,
            Datatype::I16 => ffi::RSMPI_INT16_T,
            Datatype::I32 => ffi::RSMPI_INT32_T,
            Datatype::I64 => ffi::RSMPI_INT64_T,
            Datatype::U8 => ffi::RSMPI_UINT8_T,
            Datatype::U16 | Datatype::F16 | Datatype::BF16 => ffi::RSMPI_UINT16_T,
            Datatype::U32 => ffi::RSMPI_UINT32_T,
            Datatype::U64 => ffi::RSMPI_UINT64_T,
            Datatype::F32 => ffi::RSMPI_FLOAT,
            Datatype::F64 => ffi::RSMPI_DOUBLE,
            Datatype::C64 => ffi::RSMPI_FLOAT_COMPLEX,
            Datatype::C128 => ffi::RSMPI_DOUBLE_COMPLEX,
        }
    }
}
