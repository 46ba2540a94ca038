//! The thread on which XLA:GPU launches everything.

/// Whether this is that thread, so that nothing else is launched before it returns. XLA names it
/// (`py_xla_dispatch`).
pub fn is_current() -> bool {
    let mut name = [0u8; 16];
    // SAFETY: a buffer as long as names are (prctl(2), PR_GET_NAME).
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name.starts_with(b"py_xla_dispatch")
}
