//! Which thread this is: the one on which XLA:GPU launches everything, or the process's main one.

/// Whether this is that thread, so that nothing else is launched before it returns. XLA names it
/// (`py_xla_dispatch`).
pub fn is_current() -> bool {
    let mut name = [0u8; 16];
    // SAFETY: a buffer as long as names are (prctl(2), PR_GET_NAME).
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name.starts_with(b"py_xla_dispatch")
}

/// Whether this is the process's main thread.
pub fn is_main() -> bool {
    // SAFETY: both only ask (gettid(2)); the main thread has the number of the process.
    unsafe { libc::gettid() == libc::getpid() }
}
