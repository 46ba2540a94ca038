//! MPI's return codes.

use std::ffi::c_int;

use mpi::ffi;

/// MPI's code for success (MPI 4.0, section 9.4).
pub(crate) const SUCCESS: c_int = ffi::MPI_SUCCESS as c_int;

/// Evaluates MPI calls in order and returns the first failure.
macro_rules! attempt {
    ($($call:expr;)+) => {{
        $(
            let code = $call;
            if code != $crate::code::SUCCESS {
                return code;
            }
        )+
        $crate::code::SUCCESS
    }};
}
pub(crate) use attempt;
