//! Collectives as single calls of MPI, whose counts fit.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

use mpi::ffi;
use mpi_shim_abi::{Kind, Reduction};

use crate::checked::Checked;
use crate::code::SUCCESS;
use crate::datatype::datatype;
use crate::handle::{comm_from_bits, op_from_bits};
use crate::reduction::reduction;
use crate::topology::closes_at_once;
use crate::waiting::{wait, yielding};

/// Elements as MPI counts them.
#[derive(Clone, Copy)]
pub(crate) struct Counted {
    pub(crate) count: c_int,
    pub(crate) datatype: ffi::MPI_Datatype,
}

/// The arguments of a collective, or of a part of one; its buffers are valid for its counts.
pub(crate) struct Call {
    send: *const c_void,
    recv: *mut c_void,
    sent: Counted,
    received: Counted,
    reduce: ffi::MPI_Op,
    root: c_int,
    comm: ffi::MPI_Comm,
    /// Only MPI's blocking call executes it right.
    only_blocking: bool,
}

impl Call {
    /// The whole operation, whose counts fit, as one call.
    pub(crate) fn of(op: Checked<'_>) -> Call {
        let counted = |count: i64| Counted {
            count: count as c_int,
            datatype: datatype(op.datatype),
        };
        Call {
            send: place(op.send, op.count),
            recv: place(op.recv, op.recv_count).cast_mut(),
            sent: counted(op.count),
            received: counted(op.recv_count),
            reduce: match op.reduction {
                Reduction::User => op_from_bits(op.user_reduction),
                known => reduction(known, op.datatype),
            },
            root: op.root,
            comm: comm_from_bits(op.comm),
            only_blocking: op.kind == Kind::NeighborAlltoall && closes_at_once(op),
        }
    }

    /// What begins `bytes` bytes after the start of its buffers, in elements of other types.
    ///
    /// # Safety
    /// They must lie in the buffers of the operation.
    pub(crate) unsafe fn part(self, bytes: i64, sent: Counted, received: Counted) -> Call {
        Call {
            send: after(self.send, bytes),
            recv: after(self.recv, bytes).cast_mut(),
            sent,
            received,
            ..self
        }
    }

    /// The root sends from its operand (its result pointer is null); the others receive.
    fn bcast_buffer(&self) -> *mut c_void {
        if self.recv.is_null() {
            self.send.cast_mut()
        } else {
            self.recv
        }
    }
}

/// Where `count` elements are. Null for none: where they would be may be any address, and some are
/// no memory to MPI (`MPI_IN_PLACE`, which is 1 in Open MPI, as is Rust's address of no bytes).
pub(crate) fn place(start: *const c_void, count: i64) -> *const c_void {
    match count {
        0 => std::ptr::null(),
        _ => start,
    }
}

/// The address so many bytes on; null stays null.
pub(crate) fn after(start: *const c_void, bytes: i64) -> *const c_void {
    if start.is_null() {
        start
    } else {
        start.wrapping_byte_add(bytes as usize)
    }
}

/// Executes a collective.
pub(crate) fn run(kind: Kind, call: &Call) -> c_int {
    if yielding() && !call.only_blocking {
        nonblocking(kind, call)
    } else {
        blocking(kind, call)
    }
}

#[rustfmt::skip]
fn blocking(kind: Kind, call: &Call) -> c_int {
    let &Call { send, recv, sent, received, reduce, root, comm, .. } = call;
    let (n, of, m, into) = (sent.count, sent.datatype, received.count, received.datatype);
    // SAFETY: a `Call`'s buffers are valid for its counts and its handles are live; MPI keeps
    // nothing after these return.
    unsafe {
        match kind {
            Kind::Allgather => ffi::MPI_Allgather(send, n, of, recv, m, into, comm),
            Kind::Allreduce => ffi::MPI_Allreduce(send, recv, n, of, reduce, comm),
            Kind::Alltoall => ffi::MPI_Alltoall(send, n, of, recv, m, into, comm),
            Kind::Barrier => ffi::MPI_Barrier(comm),
            Kind::Bcast => ffi::MPI_Bcast(call.bcast_buffer(), n, of, root, comm),
            Kind::Exscan => ffi::MPI_Exscan(send, recv, n, of, reduce, comm),
            Kind::Gather => ffi::MPI_Gather(send, n, of, recv, m, into, root, comm),
            Kind::NeighborAllgather => {
                ffi::MPI_Neighbor_allgather(send, n, of, recv, m, into, comm)
            }
            Kind::NeighborAlltoall => {
                ffi::MPI_Neighbor_alltoall(send, n, of, recv, m, into, comm)
            }
            Kind::Reduce => ffi::MPI_Reduce(send, recv, n, of, reduce, root, comm),
            Kind::ReduceScatter => ffi::MPI_Reduce_scatter_block(send, recv, m, into, reduce, comm),
            Kind::Scan => ffi::MPI_Scan(send, recv, n, of, reduce, comm),
            Kind::Scatter => ffi::MPI_Scatter(send, n, of, recv, m, into, root, comm),
            // Messages are no collectives.
            _ => ffi::MPI_ERR_OTHER as c_int,
        }
    }
}

fn nonblocking(kind: Kind, call: &Call) -> c_int {
    let mut request = match start(kind, call) {
        Ok(request) => request,
        Err(code) => return code,
    };
    // SAFETY: a status is plain data, and the request is live.
    unsafe {
        let mut status = MaybeUninit::zeroed().assume_init();
        wait(&mut request, &mut status)
    }
}

/// Starts a collective. The buffers must outlive the request.
#[rustfmt::skip]
pub(crate) fn start(kind: Kind, call: &Call) -> Result<ffi::MPI_Request, c_int> {
    let &Call { send, recv, sent, received, reduce, root, comm, .. } = call;
    let (n, of, m, into) = (sent.count, sent.datatype, received.count, received.datatype);
    // SAFETY: as in `blocking`; the buffers outlive the request, as this function demands.
    unsafe {
        let mut own = ffi::RSMPI_REQUEST_NULL;
        let request = &mut own;
        let code = match kind {
            Kind::Allgather => ffi::MPI_Iallgather(send, n, of, recv, m, into, comm, request),
            Kind::Allreduce => ffi::MPI_Iallreduce(send, recv, n, of, reduce, comm, request),
            Kind::Alltoall => ffi::MPI_Ialltoall(send, n, of, recv, m, into, comm, request),
            Kind::Barrier => ffi::MPI_Ibarrier(comm, request),
            Kind::Bcast => ffi::MPI_Ibcast(call.bcast_buffer(), n, of, root, comm, request),
            Kind::Exscan => ffi::MPI_Iexscan(send, recv, n, of, reduce, comm, request),
            Kind::Gather => ffi::MPI_Igather(send, n, of, recv, m, into, root, comm, request),
            Kind::NeighborAllgather => {
                ffi::MPI_Ineighbor_allgather(send, n, of, recv, m, into, comm, request)
            }
            Kind::NeighborAlltoall => {
                ffi::MPI_Ineighbor_alltoall(send, n, of, recv, m, into, comm, request)
            }
            Kind::Reduce => ffi::MPI_Ireduce(send, recv, n, of, reduce, root, comm, request),
            Kind::ReduceScatter => {
                ffi::MPI_Ireduce_scatter_block(send, recv, m, into, reduce, comm, request)
            }
            Kind::Scan => ffi::MPI_Iscan(send, recv, n, of, reduce, comm, request),
            Kind::Scatter => ffi::MPI_Iscatter(send, n, of, recv, m, into, root, comm, request),
            _ => ffi::MPI_ERR_OTHER as c_int,
        };
        if code == SUCCESS { Ok(own) } else { Err(code) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_at_no_address_that_means_something_to_mpi() {
        let nothing = std::ptr::NonNull::<u8>::dangling().as_ptr().cast_const();
        assert!(place(nothing.cast(), 0).is_null());
        let number = 5u8;
        let start = (&raw const number).cast();
        assert_eq!(place(start, 1), start);
    }
}
