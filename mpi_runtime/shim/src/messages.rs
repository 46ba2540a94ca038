//! Messages between two ranks. Every receive matches its message first (MPI 4.0, section 3.8.2) and
//! so knows its length before a byte is written: Open MPI 4.1 corrupts memory when a large
//! message is longer than the buffer, and MPI's own error does not say how long it was.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

use mpi::ffi;
use mpi_shim_abi::{ANY, CODE_BITS, Datatype, PROC_NULL, ShimOp, ShimReceived};

use crate::checked::Checked;
use crate::code::{SUCCESS, attempt};
use crate::datatype::{Elements, datatype};
use crate::handle::comm_from_bits;
use crate::matching;
use crate::waiting::{until_given_up, wait, yielding};

/// Executes a send, a receive or both.
pub(crate) fn exchange(op: Checked<'_>, received: &mut ShimReceived) -> c_int {
    let sent = match Elements::new(op.count, op.datatype) {
        Ok(sent) => sent,
        Err(code) => return code,
    };
    let (count, datatype) = (sent.count, sent.datatype);
    let (sends, receives) = (op.kind.sends(), op.kind.receives());
    let (dest, comm) = (rank(op.dest), comm_from_bits(op.comm));
    let tag = with_code(op.send_tag, op.send_code);
    if !receives && !yielding() {
        // SAFETY: the operand of a checked operation holds its elements.
        return unsafe { ffi::MPI_Send(op.send, count, datatype, dest, tag, comm) };
    }
    // SAFETY: a constant of the linked MPI.
    let mut sending = unsafe { ffi::RSMPI_REQUEST_NULL };
    if sends {
        attempt! {
            // SAFETY: as above; the operand outlives the request, which is waited for below.
            unsafe { ffi::MPI_Isend(op.send, count, datatype, dest, tag, comm, &mut sending) };
        };
    }
    let receiving = if receives {
        receive(op, received)
    } else {
        SUCCESS
    };
    // Whatever happened: the buffer is MPI's until the send is complete.
    // SAFETY: an `MPI_Status` is plain numbers; the request is null or was just made.
    let sending = unsafe {
        let mut status = MaybeUninit::zeroed().assume_init();
        wait(&mut sending, &mut status)
    };
    if receiving == SUCCESS {
        sending
    } else {
        receiving
    }
}

/// Receives into the buffer of `op`; a longer message, or one of another element type, is taken out
/// of the way, and only `received` tells of it.
fn receive(op: Checked<'_>, received: &mut ShimReceived) -> c_int {
    let element = if op.kind.sends() {
        op.recv_datatype
    } else {
        op.datatype
    };
    let capacity = op.recv_count * element.size() as i64;
    let expected = match Elements::new(op.recv_count, element) {
        Ok(expected) => expected,
        Err(code) => return code,
    };
    // SAFETY: the result of a checked operation holds its elements, and a longer message gets
    // memory of its own; both outlive the requests, which are waited for. A matched message is
    // received once.
    unsafe {
        let mut status: ffi::MPI_Status = MaybeUninit::zeroed().assume_init();
        let mut message: ffi::MPI_Message = MaybeUninit::zeroed().assume_init();
        attempt! { find(op, &mut message, &mut status); };
        let length = match length(&status) {
            Ok(length) => length,
            Err(code) => return code,
        };
        *received = envelope(&op, &status, length);
        if length > capacity || !op.accepts_code(received.code) {
            // In the largest elements, so that their number fits for whatever was sent.
            let elements = (length as usize).div_ceil(Datatype::C128.size());
            let mut spill = Vec::<[u64; 2]>::new();
            let (Ok(count), Ok(())) =
                (c_int::try_from(elements), spill.try_reserve_exact(elements))
            else {
                return ffi::MPI_ERR_NO_MEM as c_int;
            };
            let mut request = ffi::RSMPI_REQUEST_NULL;
            attempt! {
                ffi::MPI_Imrecv(
                    spill.as_mut_ptr().cast(), count, datatype(Datatype::C128), &mut message,
                    &mut request,
                );
                wait(&mut request, &mut status);
            };
        } else if yielding() {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            attempt! {
                ffi::MPI_Imrecv(
                    op.recv, expected.count, expected.datatype, &mut message, &mut request,
                );
                wait(&mut request, &mut status);
            };
        } else {
            attempt! {
                ffi::MPI_Mrecv(
                    op.recv, expected.count, expected.datatype, &mut message, &mut status,
                );
            };
        }
        status.MPI_TAG = received.tag;
        if !op.status.is_null() {
            op.status.cast::<ffi::MPI_Status>().write_unaligned(status);
        }
        if op.source == PROC_NULL {
            received.source = -1;
        }
    }
    SUCCESS
}

/// What a message of `op` says of itself.
pub(crate) fn envelope(op: &ShimOp, status: &ffi::MPI_Status, bytes: i64) -> ShimReceived {
    let coded = op.recv_code != 0 && status.MPI_SOURCE >= 0;
    let (tag, code) = match coded {
        true => (
            status.MPI_TAG >> CODE_BITS,
            status.MPI_TAG & ((1 << CODE_BITS) - 1),
        ),
        false => (status.MPI_TAG, 0),
    };
    ShimReceived {
        source: status.MPI_SOURCE,
        tag,
        code,
        bytes,
    }
}

/// The tag that MPI sees.
pub(crate) fn with_code(tag: i32, code: i32) -> c_int {
    match code {
        0 => tag,
        code => tag << CODE_BITS | code,
    }
}

/// Bytes of the message that a probe has found.
#[inline]
pub(crate) fn length(status: &ffi::MPI_Status) -> Result<i64, c_int> {
    let mut length: ffi::MPI_Count = 0;
    // SAFETY: a status that MPI filled in.
    let code = unsafe { ffi::MPI_Get_elements_x(status, ffi::RSMPI_UINT8_T, &mut length) };
    // Debian's two MPIs disagree on the C type of a count.
    #[allow(clippy::useless_conversion)]
    let length = i64::from(length);
    if code == SUCCESS {
        Ok(length)
    } else {
        Err(code)
    }
}

/// Waits for a message that matches, and takes it out of the queue.
fn find(op: Checked<'_>, message: &mut ffi::MPI_Message, status: &mut ffi::MPI_Status) -> c_int {
    // SAFETY: the communicator of a checked operation is live.
    until_given_up(&op, |found| unsafe {
        matching::take(&op, found, message, status)
    })
}

pub(crate) fn rank(rank: i32) -> c_int {
    match rank {
        ANY => ffi::MPI_ANY_SOURCE,
        PROC_NULL => ffi::MPI_PROC_NULL,
        rank => rank,
    }
}

/// See [`mpi_shim_abi::ShimApi::set_sender`].
pub unsafe extern "C" fn set_sender(status: *mut c_void, source: c_int, tag: c_int) {
    let place = status.cast::<ffi::MPI_Status>();
    // SAFETY: the engine passes a status, which MPI has filled or which is all zeros.
    unsafe {
        let mut status = place.read_unaligned();
        (status.MPI_SOURCE, status.MPI_TAG) = (source, tag);
        place.write_unaligned(status);
    }
}

/// See [`mpi_shim_abi::ShimApi::set_received`].
pub unsafe extern "C" fn set_received(status: *mut c_void, bytes: i64) -> c_int {
    // SAFETY: as above.
    unsafe {
        ffi::MPI_Status_set_elements_x(status.cast(), ffi::RSMPI_UINT8_T, bytes as ffi::MPI_Count)
    }
}
