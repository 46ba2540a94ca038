//! What the exported functions share: the last error, and the world that they may touch.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};

use crate::plugin::world;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Text of the last error of this thread; valid until its next call.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ptr())
}

/// Keeps the text of an error of this thread, and has what says that there is one.
pub fn fail(text: impl ToString) -> c_int {
    let text = CString::new(text.to_string().replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.set(text);
    -1
}

/// The world, unless this process was forked from a rank: it has the rank's memory, and must not
/// touch the rank's MPI.
pub fn world_of_this_process() -> Option<&'static mpi_runtime::World> {
    world().filter(|_| !crate::fork::is_child())
}
