//! How a rank waits for another one of its node: it looks without a pause at first, then gives up
//! its core between looks, and at last sleeps until the other one rings.

#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::node::bell::Bell;

/// There are more ranks than cores, so looking without a pause keeps the others from running.
static OVERSUBSCRIBED: AtomicBool = AtomicBool::new(false);

/// Looks between which nothing happens; those take about 20 us.
const SPINS: u32 = 1000;
const SPINS_OVERSUBSCRIBED: u32 = 20;
/// The same where the other one is seldom late: if it is, it may wait for this core.
const SPINS_IN_STEP: u32 = 64;
/// How long a rank looks before it sleeps. Waking up takes tens of microseconds.
const AWAKE: Duration = Duration::from_millis(1);
/// The longest sleep, after which the rank looks whether the other one is still there.
const SLEEP: Duration = Duration::from_millis(50);
/// Sleeps of a rank that has MPI move on between them: in the first [`SOON`], and later.
const SHORT_SLEEP: Duration = Duration::from_millis(1);
const LONG_SLEEP: Duration = Duration::from_millis(5);
const SOON: Duration = Duration::from_secs(1);

/// Has MPI move on.
static PROGRESS: OnceLock<fn()> = OnceLock::new();

/// Says how the ranks of this process wait: whether there are more of them than cores, and what is
/// to be called meanwhile. A message that the program has started by mpi4py may need it, and its
/// receiver be late for that.
pub(crate) fn configure(oversubscribed: bool, progress: fn()) {
    OVERSUBSCRIBED.store(oversubscribed, Ordering::Relaxed);
    // Only the first counts: there is one world.
    let _ = PROGRESS.set(progress);
}

/// Whether there are more ranks than cores on some node.
pub(crate) fn is_oversubscribed() -> bool {
    OVERSUBSCRIBED.load(Ordering::Relaxed)
}

/// One wait.
pub(crate) struct Patience {
    spins: u32,
    since: Option<Instant>,
    /// When it last looked whether the other one is still there.
    examined: Option<Instant>,
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
            examined: None,
        }
    }

    /// One for a rank that does the same as this one, at the same time.
    pub(crate) fn in_step() -> Patience {
        let patience = Patience::new();
        Patience {
            spins: patience.spins.min(SPINS_IN_STEP),
            ..patience
        }
    }

    /// Waits a little for what `is_there` says; whether it has waited so long that it is to be
    /// looked whether the other one is still there.
    pub(crate) fn wait(&mut self, bell: &Bell, mut is_there: impl FnMut() -> bool) -> bool {
        while self.spins > 0 {
            self.spins -= 1;
            if is_there() {
                return false;
            }
            std::hint::spin_loop();
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        let (waited, progress) = (since.elapsed(), PROGRESS.get());
        if let Some(progress) = progress {
            progress();
        }
        if waited < AWAKE {
            std::thread::yield_now();
            return false;
        }
        let sleep = match progress {
            None => SLEEP,
            Some(_) if waited < SOON => SHORT_SLEEP,
            Some(_) => LONG_SLEEP,
        };
        bell.sleep(sleep, is_there);
        let examined = self.examined.get_or_insert(since);
        let examines = examined.elapsed() >= SLEEP;
        if examines {
            *examined = Instant::now();
        }
        examines
    }
}
