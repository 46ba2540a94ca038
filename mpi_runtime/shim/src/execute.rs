//! The operations themselves; the only MPI calls that wait on a peer.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

use mpi::ffi;
use mpi_shim_abi::{Datatype, Kind, Reduction, ShimOp, ShimReceived};

use crate::handle::{comm_from_bits, op_from_bits};
use crate::large;
use crate::messages::exchange;
use crate::reduction::reduction;
use crate::{SUCCESS, attempt};

/// Whether to give up the core while waiting; see [`mpi_shim_abi::ShimApi::configure`].
pub(crate) static YIELDING: AtomicBool = AtomicBool::new(false);

/// Tests before the core is given up for the first time.
const SPINS: u32 = 64;

/// Executes `op`, whose buffers may be used again on return; returns MPI's code.
///
/// Blocking calls are the fastest, but some MPIs (MPICH 4.0) never yield in them: with more ranks
/// than cores a waiting rank then keeps its peer from running. Nonblocking calls and a loop of our
/// own do the same nonblocking.
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
        match op.kind {
            Kind::Recv | Kind::Send | Kind::Sendrecv => exchange(op, received),
            _ if large::is_large(op) => large::in_parts(op),
            _ => run(op.kind, &Call::of(op)),
        }
    }
}

/// Elements as MPI counts them.
#[derive(Clone, Copy)]
pub(crate) struct Counted {
    pub(crate) count: c_int,
    pub(crate) datatype: ffi::MPI_Datatype,
}

/// The arguments of a collective.
pub(crate) struct Call {
    pub(crate) send: *const c_void,
    pub(crate) recv: *mut c_void,
    pub(crate) sent: Counted,
    pub(crate) received: Counted,
    pub(crate) reduce: ffi::MPI_Op,
    pub(crate) root: c_int,
    pub(crate) comm: ffi::MPI_Comm,
}

impl Call {
    /// The whole operation, whose counts fit, as one call.
    pub(crate) fn of(op: &ShimOp) -> Call {
        let counted = |count: i64| Counted {
            count: count as c_int,
            datatype: datatype(op.datatype),
        };
        Call {
            send: op.send,
            recv: op.recv,
            sent: counted(op.count),
            received: counted(op.recv_count),
            reduce: match op.reduction {
                Reduction::User => op_from_bits(op.user_reduction),
                known => reduction(known, op.datatype),
            },
            root: op.dest,
            comm: comm_from_bits(op.comm),
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

/// Executes a collective.
///
/// # Safety
/// As for [`execute`].
pub(crate) unsafe fn run(kind: Kind, call: &Call) -> c_int {
    // SAFETY: as the caller promises.
    unsafe {
        if yielding() {
            nonblocking(kind, call)
        } else {
            blocking(kind, call)
        }
    }
}

/// # Safety
/// As for [`execute`].
#[rustfmt::skip]
unsafe fn blocking(kind: Kind, call: &Call) -> c_int {
    let &Call { send, recv, sent, received, reduce, root, comm } = call;
    let (n, of, m, into) = (sent.count, sent.datatype, received.count, received.datatype);
    // SAFETY: the caller upholds the buffers; handles are live for the duration of the call.
    unsafe {
        match kind {
            Kind::Allgather => ffi::MPI_Allgather(send, n, of, recv, m, into, comm),
            Kind::Allreduce => ffi::MPI_Allreduce(send, recv, n, of, reduce, comm),
            Kind::Alltoall => ffi::MPI_Alltoall(send, n, of, recv, m, into, comm),
            Kind::Barrier => ffi::MPI_Barrier(comm),
            Kind::Bcast => ffi::MPI_Bcast(call.bcast_buffer(), n, of, root, comm),
            Kind::Exscan => ffi::MPI_Exscan(send, recv, n, of, reduce, comm),
            Kind::Gather => ffi::MPI_Gather(send, n, of, recv, m, into, root, comm),
            Kind::Reduce => ffi::MPI_Reduce(send, recv, n, of, reduce, root, comm),
            Kind::ReduceScatter => ffi::MPI_Reduce_scatter_block(send, recv, m, into, reduce, comm),
            Kind::Scan => ffi::MPI_Scan(send, recv, n, of, reduce, comm),
            Kind::Scatter => ffi::MPI_Scatter(send, n, of, recv, m, into, root, comm),
            // Messages are no collectives.
            _ => ffi::MPI_ERR_OTHER as c_int,
        }
    }
}

/// # Safety
/// As for [`execute`].
#[rustfmt::skip]
unsafe fn nonblocking(kind: Kind, call: &Call) -> c_int {
    let &Call { send, recv, sent, received, reduce, root, comm } = call;
    let (n, of, m, into) = (sent.count, sent.datatype, received.count, received.datatype);
    // SAFETY: as for `blocking`; the buffers outlive the request, which is waited for.
    unsafe {
        let mut own = ffi::RSMPI_REQUEST_NULL;
        let request = &mut own;
        attempt! {
            match kind {
                Kind::Allgather => ffi::MPI_Iallgather(send, n, of, recv, m, into, comm, request),
                Kind::Allreduce => ffi::MPI_Iallreduce(send, recv, n, of, reduce, comm, request),
                Kind::Alltoall => ffi::MPI_Ialltoall(send, n, of, recv, m, into, comm, request),
                Kind::Barrier => ffi::MPI_Ibarrier(comm, request),
                Kind::Bcast => ffi::MPI_Ibcast(call.bcast_buffer(), n, of, root, comm, request),
                Kind::Exscan => ffi::MPI_Iexscan(send, recv, n, of, reduce, comm, request),
                Kind::Gather => ffi::MPI_Igather(send, n, of, recv, m, into, root, comm, request),
                Kind::Reduce => ffi::MPI_Ireduce(send, recv, n, of, reduce, root, comm, request),
                Kind::ReduceScatter => {
                    ffi::MPI_Ireduce_scatter_block(send, recv, m, into, reduce, comm, request)
                }
                Kind::Scan => ffi::MPI_Iscan(send, recv, n, of, reduce, comm, request),
                Kind::Scatter => ffi::MPI_Iscatter(send, n, of, recv, m, into, root, comm, request),
                _ => ffi::MPI_ERR_OTHER as c_int,
            };
        };
        let mut status = MaybeUninit::zeroed().assume_init();
        wait(request, &mut status)
    }
}

/// Whether to give up the core while waiting.
pub(crate) fn yielding() -> bool {
    YIELDING.load(Ordering::Relaxed)
}

/// Tests until the request is complete, giving up the core between tests.
///
/// # Safety
/// The request must be live or null.
pub(crate) unsafe fn wait(request: &mut ffi::MPI_Request, status: &mut ffi::MPI_Status) -> c_int {
    if !yielding() {
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
