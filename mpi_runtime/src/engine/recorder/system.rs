//! The system calls of the recorder, which a signal handler may make too (signal-safety(7)).

use std::ffi::c_int;
use std::time::Duration;

use super::layout::Record;

/// Writes bytes to the start of an open file; whether all were written.
pub fn write_at_start(file: c_int, bytes: &[u8]) -> bool {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        // SAFETY: the pointer and the length are of a slice.
        let written =
            unsafe { libc::pwrite(file, rest.as_ptr().cast(), rest.len(), done as libc::off_t) };
        match usize::try_from(written) {
            Ok(written) if written > 0 => done += written,
            // SAFETY: every thread has an errno.
            _ if unsafe { *libc::__errno_location() } == libc::EINTR => {}
            _ => return false,
        }
    }
    true
}

/// The bytes of the record as they are now; others may be changing them.
pub fn bytes_of(record: &Record) -> &[u8] {
    let start = std::ptr::from_ref(record).cast();
    // SAFETY: the record is all integers without gaps. Its bytes change under the slice, which is
    // why it is given to nothing but system calls, that copy them.
    unsafe { std::slice::from_raw_parts(start, size_of::<Record>()) }
}

/// Sleeps.
pub fn sleep(time: Duration) {
    // SAFETY: poll(2) of no files only waits, and is async-signal-safe.
    unsafe { libc::poll(std::ptr::null_mut(), 0, time.as_millis() as c_int) };
}

/// This process.
pub fn process() -> u32 {
    // SAFETY: getpid has no preconditions.
    unsafe { libc::getpid() as u32 }
}

/// What Linux calls this thread.
pub fn thread() -> u32 {
    // SAFETY: gettid has no preconditions.
    unsafe { libc::syscall(libc::SYS_gettid) as u32 }
}
