//! The operations themselves; the only MPI calls that wait on a peer.

use std::ffi::c_int;
use std::mem::MaybeUninit;

use mpi::ffi;
use mpi_shim_abi::{ANY, Datatype, Kind, PROC_NULL, Reduction, ShimOp, ShimReceived};

use crate::handle::comm_from_bits;
use crate::{SUCCESS, attempt};

/// Executes `op`, whose buffers may be used again on return; returns MPI's code.
///
/// # Safety
/// The buffers of `op` must be valid for its counts and types, its status null or an `MPI_Status`.
pub(crate) unsafe fn execute(op: &ShimOp, received: &mut ShimReceived) -> c_int {
    *received = ShimReceived {
        source: -1,
        tag: -1,
        bytes: -1,
    };
    let comm = comm_from_bits(op.comm);
    let (send, recv) = (op.send, op.recv);
    let (count, recv_count) = (op.count, op.recv_count);
    let kind = datatype(op.datatype);
    let reduce = reduction(op.reduction);
    // SAFETY: the caller upholds the buffers; handles are live for the duration of the call.
    unsafe {
        match op.kind {
            Kind::Allgather => ffi::MPI_Allgather(send, count, kind, recv, recv_count, kind, comm),
            Kind::Allreduce => ffi::MPI_Allreduce(send, recv, count, kind, reduce, comm),
            Kind::Alltoall => ffi::MPI_Alltoall(send, count, kind, recv, recv_count, kind, comm),
            Kind::Barrier => ffi::MPI_Barrier(comm),
            // The root sends from its operand; the others receive into their result.
            Kind::Bcast if recv.is_null() => {
                ffi::MPI_Bcast(send.cast_mut(), count, kind, op.dest, comm)
            }
            Kind::Bcast => ffi::MPI_Bcast(recv, count, kind, op.dest, comm),
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
                attempt! {
                    ffi::MPI_Recv(
                        recv, recv_count, kind, rank(op.source), tag(op.recv_tag), comm,
                        &mut status,
                    );
                    note(op, &status, kind, received);
                }
            }
            Kind::Sendrecv => {
                let mut status = MaybeUninit::zeroed().assume_init();
                let recv_kind = datatype(op.recv_datatype);
                attempt! {
                    ffi::MPI_Sendrecv(
                        send, count, kind, rank(op.dest), op.send_tag,
                        recv, recv_count, recv_kind, rank(op.source), tag(op.recv_tag), comm,
                        &mut status,
                    );
                    note(op, &status, recv_kind, received);
                }
            }
        }
    }
}

/// Reads what was received and hands the status to the user who asked for it.
///
/// # Safety
/// `status` must be filled by a receive of `kind`; `op.status` null or an `MPI_Status`.
unsafe fn note(
    op: &ShimOp,
    status: &ffi::MPI_Status,
    kind: ffi::MPI_Datatype,
    received: &mut ShimReceived,
) -> c_int {
    let (mut count, mut size) = (0, 0);
    // SAFETY: as the caller promises.
    unsafe {
        attempt! {
            ffi::MPI_Get_count(status, kind, &mut count);
            ffi::MPI_Type_size(kind, &mut size);
        };
        if !op.status.is_null() {
            op.status.cast::<ffi::MPI_Status>().write_unaligned(*status);
        }
    }
    let bytes = if count == ffi::MPI_UNDEFINED {
        -1
    } else {
        i64::from(count) * i64::from(size)
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

fn datatype(datatype: Datatype) -> ffi::MPI_Datatype {
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

fn reduction(reduction: Reduction) -> ffi::MPI_Op {
    // SAFETY: constants of the linked MPI.
    unsafe {
        match reduction {
            Reduction::Sum => ffi::RSMPI_SUM,
            Reduction::Prod => ffi::RSMPI_PROD,
            Reduction::Min => ffi::RSMPI_MIN,
            Reduction::Max => ffi::RSMPI_MAX,
            Reduction::Land => ffi::RSMPI_LAND,
            Reduction::Lor => ffi::RSMPI_LOR,
            Reduction::Lxor => ffi::RSMPI_LXOR,
            Reduction::Band => ffi::RSMPI_BAND,
            Reduction::Bor => ffi::RSMPI_BOR,
            Reduction::Bxor => ffi::RSMPI_BXOR,
        }
    }
}
