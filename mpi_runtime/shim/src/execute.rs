//! The operations themselves; the only MPI calls that wait on a peer.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

use mpi::ffi;
use mpi_shim_abi::{ANY, Datatype, Kind, PROC_NULL, ShimOp, ShimReceived};

use crate::handle::comm_from_bits;
use crate::reduction::reduction;
use crate::{SUCCESS, attempt};

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
        if POLITE.load(Ordering::Relaxed) {
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
            Kind::Send => ffi::MPI_Send(send, count, kind, rank(op.dest), op.send_tag, comm),
            Kind::Recv => {
                let mut status = MaybeUninit::zeroed().assume_init();
                let (source, tag) = (rank(op.source), tag(op.recv_tag));
                attempt! {
                    ffi::MPI_Recv(recv, recv_count, kind, source, tag, comm, &mut status);
                    note(op, &status, received);
                }
            }
            Kind::Sendrecv => {
                let mut status = MaybeUninit::zeroed().assume_init();
                let recv_kind = datatype(op.recv_datatype);
                let (dest, source, tag) = (rank(op.dest), rank(op.source), tag(op.recv_tag));
                attempt! {
                    ffi::MPI_Sendrecv(
                        send, count, kind, dest, op.send_tag, recv, recv_count, recv_kind, source,
                        tag, comm, &mut status,
                    );
                    note(op, &status, received);
                }
            }
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
    // The receive is request 0 where there is one, the send the last.
    // SAFETY: as for `blocking`; the buffers outlive the requests, which are waited for.
    unsafe {
        let mut requests = [ffi::RSMPI_REQUEST_NULL; 2];
        let request = &mut requests[0];
        let receives = matches!(op.kind, Kind::Recv | Kind::Sendrecv);
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
            Kind::Send => {
                ffi::MPI_Isend(send, count, kind, rank(op.dest), op.send_tag, comm, request)
            }
            Kind::Recv => {
                let (source, tag) = (rank(op.source), tag(op.recv_tag));
                ffi::MPI_Irecv(recv, recv_count, kind, source, tag, comm, request)
            }
            Kind::Sendrecv => {
                let recv_kind = datatype(op.recv_datatype);
                let (dest, source, tag) = (rank(op.dest), rank(op.source), tag(op.recv_tag));
                let code = ffi::MPI_Irecv(recv, recv_count, recv_kind, source, tag, comm, request);
                if code != SUCCESS {
                    return code;
                }
                let code =
                    ffi::MPI_Isend(send, count, kind, dest, op.send_tag, comm, &mut requests[1]);
                if code != SUCCESS {
                    // The receive must not outlive its buffer.
                    ffi::MPI_Cancel(&mut requests[0]);
                    let mut cancelled = MaybeUninit::zeroed().assume_init();
                    wait(&mut requests[0], &mut cancelled);
                }
                code
            }
        };
        if started != SUCCESS {
            return started;
        }
        // Both are waited for, whatever happens to the first: the buffers belong to MPI until then.
        let (mut status, mut own) = (
            MaybeUninit::zeroed().assume_init(),
            MaybeUninit::zeroed().assume_init(),
        );
        let first = wait(&mut requests[0], &mut status);
        let second = wait(&mut requests[1], &mut own);
        if first != SUCCESS || second != SUCCESS {
            return if first == SUCCESS { second } else { first };
        }
        if receives {
            note(op, &status, received)
        } else {
            SUCCESS
        }
    }
}

/// Tests until the request is complete, giving up the core between tests.
///
/// # Safety
/// The request must be live or null.
unsafe fn wait(request: &mut ffi::MPI_Request, status: &mut ffi::MPI_Status) -> c_int {
    let mut tests = 0;
    loop {
        let mut done = 0;
        // SAFETY: as the caller promises.
        let code = unsafe { ffi::MPI_Test(request, &mut done, status) };
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

/// Reads what was received and hands the status to the user who asked for it.
///
/// # Safety
/// `status` must be filled by a receive; `op.status` null or an `MPI_Status`.
unsafe fn note(op: &ShimOp, status: &ffi::MPI_Status, received: &mut ShimReceived) -> c_int {
    let mut count = 0;
    // Counted in bytes: a partial element would make MPI say nothing at all.
    // SAFETY: as the caller promises.
    unsafe {
        attempt! {
            ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut count);
        };
        if !op.status.is_null() {
            op.status.cast::<ffi::MPI_Status>().write_unaligned(*status);
        }
    }
    let bytes = if count == ffi::MPI_UNDEFINED {
        -1
    } else {
        i64::from(count)
    };
    *received = ShimReceived {
        source: status.MPI_SOURCE,
        tag: status.MPI_TAG,
        bytes,
    };
    if op.source == PROC_NULL {
        received.source = -1;
    }
    SUCCESS
}

fn rank(rank: i32) -> c_int {
    match rank {
        ANY => ffi::MPI_ANY_SOURCE,
        PROC_NULL => ffi::MPI_PROC_NULL,
        rank => rank,
    }
}

fn tag(tag: i32) -> c_int {
    if tag == ANY { ffi::MPI_ANY_TAG } else { tag }
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
            Datatype::U16 => ffi::RSMPI_UINT16_T,
            Datatype::U32 => ffi::RSMPI_UINT32_T,
            Datatype::U64 => ffi::RSMPI_UINT64_T,
            Datatype::F32 => ffi::RSMPI_FLOAT,
            Datatype::F64 => ffi::RSMPI_DOUBLE,
            Datatype::C64 => ffi::RSMPI_FLOAT_COMPLEX,
            Datatype::C128 => ffi::RSMPI_DOUBLE_COMPLEX,
        }
    }
}
