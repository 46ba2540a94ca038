//! What `python -m mpi_cuda doctor`, `bench` and `probe` ask of the ranks.

use std::ffi::{CStr, c_char, c_int, c_void};

use super::answer::{fail, world_of_this_process};
use crate::boundary::quiet;
use crate::error::Error;

/// Writes the bytes of all ranks to `all`, one after the other, of which each passes as many;
/// collective. -1 on error.
///
/// # Safety
/// `own` must hold `bytes` bytes, and `all` have room for so many of each rank.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_gather(own: *const u8, bytes: usize, all: *mut u8) -> c_int {
    quiet(-1, || {
        let Some(world) = world_of_this_process() else {
            return fail(Error::precondition("call mpi_cuda_start first"));
        };
        // SAFETY: the caller's bytes, which nobody changes meanwhile.
        let own = unsafe { std::slice::from_raw_parts(own, bytes) };
        match world.gather(own) {
            Ok(gathered) => {
                // SAFETY: the caller has room for those of all ranks.
                unsafe { all.copy_from_nonoverlapping(gathered.as_ptr(), gathered.len()) };
                0
            }
            Err(error) => fail(error),
        }
    })
}

/// The seconds that a message of so many bytes takes to `peer`, which calls this too: the mean of
/// `rounds` there and back, halved. -1 on error.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_ping(peer: c_int, bytes: usize, rounds: c_int) -> f64 {
    quiet(-1.0, || {
        let Some(world) = world_of_this_process() else {
            return fail(Error::precondition("call mpi_cuda_start first")).into();
        };
        let rounds = u32::try_from(rounds).unwrap_or(0);
        match world.ping(peer, bytes, rounds) {
            Ok(time) => time.as_secs_f64(),
            Err(error) => fail(error).into(),
        }
    })
}

/// The seconds that a call of MPI's takes, which all ranks make: the mean of `rounds`. -1 on error.
///
/// # Safety
/// `operation` and `dtype` must be C strings, and `send` and `recv` have room for what the call
/// reads and writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_raw(
    operation: *const c_char,
    dtype: *const c_char,
    count: i64,
    send: *const c_void,
    recv: *mut c_void,
    rounds: c_int,
) -> f64 {
    quiet(-1.0, || {
        let Some(world) = world_of_this_process() else {
            return fail(Error::precondition("call mpi_cuda_start first")).into();
        };
        // SAFETY: the caller's texts are NUL-terminated.
        let names = [operation, dtype].map(|text| unsafe { CStr::from_ptr(text) });
        let [operation, dtype] = names.map(CStr::to_string_lossy);
        let rounds = u32::try_from(rounds).unwrap_or(0);
        // SAFETY: as this function demands.
        match unsafe { world.raw((&operation, &dtype), count, send, recv, rounds) } {
            Ok(time) => time.as_secs_f64(),
            Err(error) => fail(error).into(),
        }
    })
}

/// Turns the probe of direct transfer to the next way: 0 arrays, 1 copies of them, 2 nothing is
/// left; -1 on error.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_probe_next() -> c_int {
    quiet(-1, || match crate::probe::next() {
        Ok(place) => c_int::try_from(place).unwrap_or(c_int::MAX),
        Err(error) => fail(error),
    })
}

/// What came of it on this rank: null if the data were right. 1 if it works on all ranks, 0 if not;
/// -1 on error.
///
/// # Safety
/// `failure` must be null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_probe_report(failure: *const c_char) -> c_int {
    quiet(-1, || {
        // SAFETY: the caller's text is NUL-terminated, if there is one.
        let text = (!failure.is_null()).then(|| unsafe { CStr::from_ptr(failure) });
        let text = text.map(|text| text.to_string_lossy());
        match crate::probe::report(text.as_deref()) {
            Ok(works) => c_int::from(works),
            Err(error) => fail(error),
        }
    })
}
