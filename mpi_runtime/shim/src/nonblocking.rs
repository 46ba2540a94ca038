//! Messages and collectives whose start and end are separate operations. None of these calls waits:
//! the engine decides which receive gets which message, and tests requests until they are complete.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

use mpi::ffi;
use mpi_shim_abi::{Datatype, ShimOp, ShimReceived, ShimStatus};

use crate::checked::Checked;
use crate::code::{SUCCESS, attempt};
use crate::collective::{self, Call};
use crate::datatype::Elements;
use crate::handle::{
    comm_from_bits, message_from_bits, message_to_bits, request_from_bits, request_to_bits,
};
use crate::matching;
use crate::messages::{self, length, rank, with_code};

pub(crate) unsafe extern "C" fn start_send(op: *const ShimOp, request: *mut u64) -> c_int {
    // SAFETY: the engine passes a checked operation, and keeps its buffer until the request is
    // complete.
    unsafe {
        let op = &*op;
        let sent = match Elements::new(op.count, op.datatype) {
            Ok(sent) => sent,
            Err(code) => return code,
        };
        let mut own = ffi::RSMPI_REQUEST_NULL;
        attempt! {
            ffi::MPI_Isend(
                op.send,
                sent.count,
                sent.datatype,
                rank(op.dest),
                with_code(op.send_tag, op.send_code),
                comm_from_bits(op.comm),
                &mut own,
            );
        };
        *request = request_to_bits(own);
    }
    SUCCESS
}

pub(crate) unsafe extern "C" fn start_collective(op: *const ShimOp, request: *mut u64) -> c_int {
    // SAFETY: the engine passes a checked operation whose counts fit, keeps its buffers until the
    // request is complete, and has a place for it.
    unsafe {
        let op = Checked::new(&*op);
        match collective::start(op.kind, &Call::of(op)) {
            Ok(own) => *request = request_to_bits(own),
            Err(code) => return code,
        }
    }
    SUCCESS
}

pub(crate) unsafe extern "C" fn take(
    op: *const ShimOp,
    found: *mut c_int,
    envelope: *mut ShimReceived,
    message: *mut u64,
) -> c_int {
    // SAFETY: the engine passes a checked operation and writable memory; the communicator is live.
    unsafe {
        let op = &*op;
        let mut status: ffi::MPI_Status = MaybeUninit::zeroed().assume_init();
        let mut own: ffi::MPI_Message = MaybeUninit::zeroed().assume_init();
        attempt! { matching::take(op, &mut *found, &mut own, &mut status); };
        if *found != 0 {
            *message = message_to_bits(own);
            let bytes = match length(&status) {
                Ok(bytes) => bytes,
                Err(code) => return code,
            };
            *envelope = messages::envelope(op, &status, bytes);
        }
    }
    SUCCESS
}

pub(crate) unsafe extern "C" fn start_receive(
    message: u64,
    bytes: i64,
    datatype: Datatype,
    buffer: *mut c_void,
    request: *mut u64,
) -> c_int {
    // A message of another type than expected may end inside an element.
    let whole = bytes % datatype.size() as i64 == 0;
    let element = if whole { datatype } else { Datatype::U8 };
    let expected = match Elements::new(bytes / element.size() as i64, element) {
        Ok(expected) => expected,
        Err(code) => return code,
    };
    // SAFETY: a message that `take` found, received once; the engine keeps the buffer, which holds
    // its bytes, until the request is complete.
    unsafe {
        let mut message = message_from_bits(message);
        let mut own = ffi::RSMPI_REQUEST_NULL;
        attempt! {
            ffi::MPI_Imrecv(buffer, expected.count, expected.datatype, &mut message, &mut own);
        };
        *request = request_to_bits(own);
    }
    SUCCESS
}

pub(crate) unsafe extern "C" fn test(
    request: *mut u64,
    done: *mut c_int,
    status: *mut ShimStatus,
) -> c_int {
    const { assert!(size_of::<ffi::MPI_Status>() <= size_of::<ShimStatus>()) };
    // SAFETY: a live request of the functions above, and writable memory.
    unsafe {
        let mut own = request_from_bits(*request);
        let code = ffi::MPI_Test(&mut own, done, status.cast());
        *request = request_to_bits(own);
        code
    }
}
