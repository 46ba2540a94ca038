//! The entrance to XLA's queue, which all threads share: what is in it behind a launch that waits
//! for a peer waits too. So a launch that must not wait gets in only while none waits, and none
//! that does gets in meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a launch that waits for a peer lets others go ahead. What takes longer is not on its
/// way into the queue: XLA runs a small program on the calling thread, and a function of another
/// package's in it may wait for the very launch.
const PATIENCE: Duration = Duration::from_millis(100);

/// Launches on both sides.
#[derive(Debug, Default)]
struct Entrance {
    /// In flight or deferred, and may wait for a peer.
    behind_peers: AtomicUsize,
    /// On their way into the queue, and must not wait.
    ahead: AtomicUsize,
}

static ENTRANCE: Entrance = Entrance {
    behind_peers: AtomicUsize::new(0),
    ahead: AtomicUsize::new(0),
};

impl Entrance {
    /// Each side says that it is there before it looks for the other (`SeqCst`), so not both miss
    /// each other.
    fn go_ahead(&self) -> bool {
        self.ahead.fetch_add(1, Ordering::SeqCst);
        let free = self.behind_peers.load(Ordering::SeqCst) == 0;
        if !free {
            self.has_entered();
        }
        free
    }

    fn has_entered(&self) {
        self.ahead.fetch_sub(1, Ordering::SeqCst);
    }

    fn go_behind_peers(&self, patience: Duration) {
        self.behind_peers.fetch_add(1, Ordering::SeqCst);
        let mut since = None;
        while self.ahead.load(Ordering::SeqCst) > 0
            && since.get_or_insert_with(Instant::now).elapsed() < patience
        {
            std::thread::yield_now();
        }
    }
}

/// Whether a launch now may find launches before it that wait for peers.
pub fn may_wait() -> bool {
    ENTRANCE.behind_peers.load(Ordering::Acquire) > 0
}

/// Counts a launch that may wait for a peer, until dropped.
#[derive(Debug)]
pub struct BehindPeers(());

impl BehindPeers {
    /// Call before it gets into the queue; waits for those that are on their way.
    pub fn new() -> BehindPeers {
        ENTRANCE.go_behind_peers(PATIENCE);
        BehindPeers(())
    }
}

impl Drop for BehindPeers {
    fn drop(&mut self) {
        ENTRANCE.behind_peers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Keeps launches that may wait for a peer out of the queue until dropped.
#[derive(Debug)]
pub struct Ahead(());

impl Ahead {
    /// None if one is there already. Drop it once the launch is queued, which must have no
    /// callback: that may wait for a launch that is kept out.
    pub fn new() -> Option<Ahead> {
        ENTRANCE.go_ahead().then(|| Ahead(()))
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        ENTRANCE.has_entered();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    #[test]
    fn who_waits_for_peers_gets_in_behind_who_is_on_its_way() {
        let entrance = Entrance::default();
        let inside = AtomicBool::new(false);
        assert!(entrance.go_ahead());
        thread::scope(|scope| {
            scope.spawn(|| {
                entrance.go_behind_peers(Duration::MAX);
                inside.store(true, Ordering::SeqCst);
            });
            thread::sleep(Duration::from_millis(50));
            assert!(!inside.load(Ordering::SeqCst));
            // Already from when it wants to get in.
            assert!(!entrance.go_ahead());
            entrance.has_entered();
        });
        assert!(!entrance.go_ahead());
    }

    #[test]
    fn who_waits_for_peers_waits_for_nobody_for_long() {
        let entrance = Entrance::default();
        assert!(entrance.go_ahead());
        entrance.go_behind_peers(Duration::from_millis(1));
        assert!(!entrance.go_ahead());
    }

    #[test]
    fn none_gets_in_before_the_check_and_after_it() {
        /// So many launches of each kind.
        const MANY: usize = 20_000;
        let entrance = Entrance::default();
        let queued_behind = AtomicUsize::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..MANY {
                    entrance.go_behind_peers(Duration::MAX);
                    queued_behind.fetch_add(1, Ordering::SeqCst);
                    queued_behind.fetch_sub(1, Ordering::SeqCst);
                    entrance.behind_peers.fetch_sub(1, Ordering::SeqCst);
                }
            });
            for _ in 0..MANY {
                if entrance.go_ahead() {
                    let found = queued_behind.load(Ordering::SeqCst);
                    entrance.has_entered();
                    assert_eq!(found, 0);
                }
            }
        });
    }
}
