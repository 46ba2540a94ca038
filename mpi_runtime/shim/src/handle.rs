//! MPI handles as 64 bits: Open MPI's are pointers, MPICH's are `c_int`.

use std::mem::size_of;

use mpi::ffi;

fn to_bits<T>(handle: T) -> u64 {
    const { assert!(size_of::<T>() <= size_of::<u64>()) };
    let mut bits = 0u64;
    // SAFETY: handles are plain bytes that fit; x86-64 and AArch64 are little-endian, so the low
    // bytes are the handle and the rest stays zero.
    unsafe { std::ptr::from_mut(&mut bits).cast::<T>().write(handle) };
    bits
}

fn from_bits<T: Copy>(bits: u64) -> T {
    const { assert!(size_of::<T>() <= size_of::<u64>()) };
    // SAFETY: the inverse of `to_bits`; the engine passes only bits that came from an MPI.
    unsafe { std::ptr::from_ref(&bits).cast::<T>().read() }
}

pub(crate) fn comm_to_bits(comm: ffi::MPI_Comm) -> u64 {
    to_bits(comm)
}

#[inline]
pub(crate) fn comm_from_bits(bits: u64) -> ffi::MPI_Comm {
    from_bits(bits)
}

pub(crate) fn op_from_bits(bits: u64) -> ffi::MPI_Op {
    from_bits(bits)
}

pub(crate) fn message_to_bits(message: ffi::MPI_Message) -> u64 {
    to_bits(message)
}

pub(crate) fn message_from_bits(bits: u64) -> ffi::MPI_Message {
    from_bits(bits)
}

pub(crate) fn request_to_bits(request: ffi::MPI_Request) -> u64 {
    to_bits(request)
}

pub(crate) fn request_from_bits(bits: u64) -> ffi::MPI_Request {
    from_bits(bits)
}

/// `MPI_COMM_NULL_COPY_FN`: an attribute that duplicates do not inherit (MPI 4.0, 7.7.2).
pub(crate) fn null_copy_fn() -> ffi::MPI_Comm_copy_attr_function {
    Some(copy_nothing)
}

unsafe extern "C" fn copy_nothing(
    _comm: ffi::MPI_Comm,
    _key: std::ffi::c_int,
    _extra: *mut std::ffi::c_void,
    _attribute_in: *mut std::ffi::c_void,
    _attribute_out: *mut std::ffi::c_void,
    flag: *mut std::ffi::c_int,
) -> std::ffi::c_int {
    // SAFETY: MPI passes a writable flag; 0 means the attribute is not copied.
    unsafe { *flag = 0 };
    ffi::MPI_SUCCESS as std::ffi::c_int
}
