//! A forked child has the parent's memory but none of its threads: it must not communicate.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static CHILD: AtomicBool = AtomicBool::new(false);

/// Whether this process was forked after [`watch`].
pub fn is_child() -> bool {
    CHILD.load(Ordering::Relaxed)
}

/// Notices forks from now on.
pub fn watch() {
    extern "C" fn in_child() {
        CHILD.store(true, Ordering::Relaxed);
    }
    static ONCE: Once = Once::new();
    // SAFETY: the handler only stores to an atomic, which is allowed after fork.
    ONCE.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(in_child));
    });
}
