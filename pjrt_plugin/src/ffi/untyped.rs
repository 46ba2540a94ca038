//! Custom calls of the interface that XLA had before FFI. A plugin of XLA's finds none of them, so
//! `_jax_patches/untyped_calls.py` makes them typed ones, with attributes that say what they were.
//! Here they become the calls that XLA's own CPU backend makes
//! (`xla/backends/cpu/runtime/custom_call_thunk.cc`, CallUntypedAPI).

use std::ffi::{c_char, c_void};
use std::mem::transmute;
use std::ptr::NonNull;

use super::frame::Frame;
use crate::error::Error;
use crate::inner::call::slice;

/// The attributes of such a call, named as nothing else is.
const CONVENTION: &[u8] = b"mpi_cuda.untyped_convention";
const IS_TUPLE: &[u8] = b"mpi_cuda.untyped_is_tuple";
const OPAQUE: &[u8] = b"mpi_cuda.untyped_opaque";

/// `API_VERSION_ORIGINAL`: result, operands.
type Original = unsafe extern "C" fn(*mut c_void, *const *const c_void);
/// `API_VERSION_STATUS_RETURNING`.
type StatusReturning = unsafe extern "C" fn(*mut c_void, *const *const c_void, *mut Status);
/// `API_VERSION_STATUS_RETURNING_UNIFIED`: result, operands, text and its length, status.
type Unified =
    unsafe extern "C" fn(*mut c_void, *const *const c_void, *const c_char, usize, *mut Status);

/// A custom call of the interface before FFI.
#[derive(Default)]
pub struct Call<'a> {
    /// XLA's number of the function's parameters (`xla/service/hlo.proto`, CustomCallApiVersion).
    convention: i64,
    /// Its result is a tuple, so the function gets a list of results.
    is_tuple: bool,
    /// The text that the program gives it, any bytes.
    opaque: &'a [u8],
}

impl<'a> Call<'a> {
    /// The call that became this one; none if it was typed from the start.
    pub fn of(frame: &Frame<'a>) -> Option<Call<'a>> {
        let mut call = Call::default();
        for (name, value) in frame.attributes().iter() {
            match name {
                CONVENTION => call.convention = value.integer()?,
                IS_TUPLE => call.is_tuple = value.integer()? != 0,
                OPAQUE => call.opaque = value.bytes()?,
                _ => return None,
            }
        }
        (call.convention != 0).then_some(call)
    }

    /// Calls `function`.
    ///
    /// # Errors
    /// What the function says in its status.
    ///
    /// # Safety
    /// `function` must take the parameters of the call's convention.
    pub unsafe fn run(&self, frame: &Frame<'_>, function: NonNull<c_void>) -> Result<(), Error> {
        let operands: Vec<_> = frame.args.iter().map(|arg| arg.data.cast_const()).collect();
        let mut results: Vec<_> = frame.rets.iter().map(|ret| ret.data).collect();
        let result = match (self.is_tuple, &results[..]) {
            (true, _) => results.as_mut_ptr().cast(),
            (false, [only]) => *only,
            (false, several) => {
                let words = format!("{} results without a tuple", several.len());
                return Err(Error::internal(words));
            }
        };
        // XLA's text ends with a NUL that its length does not count.
        let mut opaque = self.opaque.to_vec();
        opaque.push(0);
        let text = opaque.as_ptr().cast();
        let (operands, function) = (operands.as_ptr(), function.as_ptr());
        let mut status = Status::default();
        // SAFETY: the caller's promise. Operands and results are XLA's buffers of this call; the
        // lists, the text and the status outlive it.
        unsafe {
            match self.convention {
                1 => transmute::<*mut c_void, Original>(function)(result, operands),
                2 => transmute::<*mut c_void, StatusReturning>(function)(
                    result,
                    operands,
                    &mut status,
                ),
                3 => transmute::<*mut c_void, Unified>(function)(
                    result,
                    operands,
                    text,
                    self.opaque.len(),
                    &mut status,
                ),
                unknown => {
                    let words = format!("no function has API version {unknown} of custom calls");
                    return Err(Error::unimplemented(words));
                }
            }
            status.take()
        }
    }
}

/// `XlaCustomCallStatus` (`xla/service/custom_call_status_internal.h`), a
/// `std::optional<std::string>` as libstdc++ lays it out, which jaxlib is linked with. A library
/// fills it in with its own copy of `XlaCustomCallStatusSetFailure`: no XLA exports that.
#[repr(C)]
#[derive(Default)]
struct Status {
    text: *mut u8,
    length: usize,
    /// A short text itself, with a NUL; else the capacity of memory at `text`.
    short: [u8; 16],
    has_failed: u8,
    /// What no library of that layout writes.
    _spare: [u64; 3],
}

impl Status {
    /// What the function said, once.
    ///
    /// # Safety
    /// The status must lie where the function got it.
    unsafe fn take(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.has_failed) == 0 {
            return Ok(());
        }
        // SAFETY: a failure has made the string, of `length` bytes at `text`. If that is not in the
        // string itself, it is from `operator new`, which is `malloc` (libsupc++'s new_op.cc).
        unsafe {
            let text = slice(self.text.cast_const(), self.length);
            let said = String::from_utf8_lossy(text).into_owned();
            if self.text != self.short.as_mut_ptr() {
                libc::free(self.text.cast());
            }
            Err(Error::internal(said))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_what_the_function_said() {
        let mut status = Status::default();
        // SAFETY: the status stays where it is, and is what libstdc++ makes of it.
        unsafe {
            assert!(status.take().is_ok());
            status.short[..3].copy_from_slice(b"no\0");
            (status.text, status.length) = (status.short.as_mut_ptr(), 2);
            status.has_failed = 1;
            assert_eq!(status.take().unwrap_err().bare(), "no");
            let long = "a text that is longer than the string itself";
            status.text =
                libc::strdup(c"a text that is longer than the string itself".as_ptr()).cast();
            (status.length, status.has_failed) = (long.len(), 1);
            assert_eq!(status.take().unwrap_err().bare(), long);
            assert!(status.take().is_ok());
        }
        assert_eq!(std::mem::offset_of!(Status, has_failed), 32);
    }
}
