//! Communicators that the user has freed and that launches dispatched before still use.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::engine::order::Ticket;

/// One of them.
pub(super) struct FreedComm {
    pub(super) number: i64,
    pub(super) handle: u64,
    launches: Vec<Ticket>,
}

/// All of them.
#[derive(Default)]
pub(super) struct FreedComms {
    rows: Mutex<Vec<FreedComm>>,
    /// How many there are; spares the lock where there are none.
    count: AtomicUsize,
}

impl FreedComms {
    /// Keeps a communicator for the launches that have not ended.
    pub(super) fn keep(&self, number: i64, handle: u64, not_ended: impl FnOnce() -> Vec<Ticket>) {
        let mut rows = self.rows.lock();
        // First, so that a launch that ends from now on looks here.
        self.count.store(rows.len() + 1, Ordering::SeqCst);
        rows.push(FreedComm {
            number,
            handle,
            launches: not_ended(),
        });
    }

    /// Whether the launch may still use it.
    pub(super) fn are_used_by(&self, number: i64, ticket: Ticket) -> bool {
        let uses = |row: &FreedComm| row.number == number && row.launches.contains(&ticket);
        self.count.load(Ordering::Acquire) > 0 && self.rows.lock().iter().any(uses)
    }

    /// A launch has ended: the communicators that it was the last to use.
    pub(super) fn let_go(&self, ticket: Ticket) -> Vec<FreedComm> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let mut rows = self.rows.lock();
        for row in rows.iter_mut() {
            row.launches.retain(|launch| *launch != ticket);
        }
        let gone = rows.extract_if(.., |row| row.launches.is_empty()).collect();
        self.count.store(rows.len(), Ordering::Release);
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_launch_that_may_use_it_lets_it_go() {
        let freed = FreedComms::default();
        assert!(freed.let_go(Ticket(1)).is_empty());
        freed.keep(7, 70, || vec![Ticket(1), Ticket(2)]);
        assert!(freed.are_used_by(7, Ticket(2)) && !freed.are_used_by(7, Ticket(3)));
        assert!(!freed.are_used_by(8, Ticket(2)));
        assert!(freed.let_go(Ticket(2)).is_empty() && !freed.are_used_by(7, Ticket(2)));
        let gone = freed.let_go(Ticket(1));
        assert_eq!((gone.len(), gone[0].number, gone[0].handle), (1, 7, 70));
    }
}
