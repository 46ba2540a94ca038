//! How a rank waits for another one of its node: it looks without a pause at first, then gives up
//! its core between looks, and at last sleeps until the other one rings.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::node::bell::Bell;

/// There are more ranks than cores, so looking without a pause keeps the others from running.
static OVERSUBSCRIBED: AtomicBool = AtomicBool::new(false);

/// Looks between which nothing happens; those take about 20 us.
const SPINS: u32 = 1000;
const SPINS_OVERSUBSCRIBED: u32 = 20;
/// How long a rank looks before it sleeps. Waking up takes tens of microseconds.
const AWAKE: Duration = Duration::from_millis(1);
/// The longest sleep, after which the rank looks whether the other one is still there.
const SLEEP: Duration = Duration::from_millis(50);

/// Says how the ranks of this process wait.
pub(crate) fn configure(oversubscribed: bool) {
    OVERSUBSCRIBED.store(oversubscribed, Ordering::Relaxed);
}

/// One wait.
pub(crate) struct Patience {
    spins: u32,
    since: Option<Instant>,
}

impl Patience {
    pub(crate) fn new() -> Patience {
        let oversubscribed = OVERSUBSCRIBED.load(Ordering::Relaxed);
        Patience {
            spins: if oversubscribed {
                SPINS_OVERSUBSCRIBED
            } else {
                SPINS
            },
            since: None,
        }
    }

    /// Waits a little for what `is_there` says; whether it slept.
    pub(crate) fn wait(&mut self, bell: &Bell, mut is_there: impl FnMut() -> bool) -> bool {
        while self.spins > 0 {
            self.spins -= 1;
            if is_there() {
                return false;
            }
            std::hint::spin_loop();
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() < AWAKE {
            std::thread::yield_now();
            return false;
        }
        bell.sleep(SLEEP, is_there);
        true
    }
}
