//! A bell in shared memory: who waits for a rank sleeps until that rank rings.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::Duration;

/// A bell; all zero bytes are one that nobody waits for. It has a cache line of its own, since
/// those that wait write to it.
#[derive(Default)]
#[repr(C, align(64))]
pub(crate) struct Bell {
    rung: AtomicU32,
    sleepers: AtomicU32,
}

impl Bell {
    /// Wakes those that sleep, if any do: after what they wait for was stored with
    /// [`Ordering::SeqCst`].
    #[inline]
    pub(crate) fn ring_if_heard(&self) {
        if self.sleepers.load(Ordering::SeqCst) != 0 {
            self.ring();
        }
    }

    /// Wakes those that sleep.
    #[cold]
    pub(crate) fn ring(&self) {
        self.rung.fetch_add(1, Ordering::SeqCst);
        // SAFETY: a futex on a word that lives as long as `self`; shared, so without the private
        // flag (futex(2)).
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.rung.as_ptr(),
                libc::FUTEX_WAKE,
                i32::MAX,
            );
        }
    }

    /// Sleeps until the bell rings, unless `is_there` says that there is no need to, and `longest`
    /// at most.
    pub(crate) fn sleep(&self, longest: Duration, mut is_there: impl FnMut() -> bool) {
        let rung = self.rung.load(Ordering::SeqCst);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // What was stored before the ringer looked for sleepers is seen by now.
        fence(Ordering::SeqCst);
        if !is_there() {
            let longest = libc::timespec {
                tv_sec: longest.as_secs() as libc::time_t,
                tv_nsec: longest.subsec_nanos().into(),
            };
            // SAFETY: as in `ring`; the time outlives the call. It returns at once if the bell has
            // rung since.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.rung.as_ptr(),
                    libc::FUTEX_WAIT,
                    rung,
                    &raw const longest,
                );
            }
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    #[test]
    fn a_sleeper_wakes_when_the_bell_rings() {
        let (bell, there) = (Bell::default(), AtomicBool::new(false));
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !there.load(Ordering::SeqCst) {
                    bell.sleep(Duration::from_secs(60), || there.load(Ordering::SeqCst));
                }
            });
            while bell.sleepers.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            there.store(true, Ordering::SeqCst);
            bell.ring_if_heard();
        });
        assert!(start.elapsed() < Duration::from_secs(30));
        assert_eq!(bell.sleepers.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn nobody_sleeps_longer_than_asked_or_for_what_is_there() {
        let silent = Bell::default();
        silent.sleep(Duration::from_millis(1), || false);
        silent.sleep(Duration::from_secs(60), || true);
    }
}
