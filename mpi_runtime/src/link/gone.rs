//! Why a rank does nothing any more.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU8, Ordering};

/// How a rank has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    /// Its program is over.
    Left,
    /// Its process ended before that.
    Died,
    /// Nothing is heard of its node any more.
    Lost,
}

impl Gone {
    const ALL: [Gone; 3] = [Gone::Left, Gone::Died, Gone::Lost];

    /// From 1 on.
    pub(super) fn number(self) -> u8 {
        self as u8 + 1
    }

    /// From that number.
    pub(super) fn of(number: u8) -> Option<Gone> {
        Gone::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// What is said of it.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Gone::Left => "has ended its program",
            Gone::Died => "has died",
            Gone::Lost => "cannot be reached any more",
        }
    }
}

/// Which ranks have gone, by rank in the world.
pub(super) struct GoneTable(Vec<AtomicU8>);

impl GoneTable {
    pub(super) fn new(size: usize) -> GoneTable {
        GoneTable((0..size).map(|_| AtomicU8::new(0)).collect())
    }

    pub(super) fn size(&self) -> usize {
        self.0.len()
    }

    pub(super) fn get(&self, rank: usize) -> Option<Gone> {
        Gone::of(self.0.get(rank)?.load(Ordering::SeqCst))
    }

    /// Notes it; whether that is news. What was known first stays.
    pub(super) fn note(&self, rank: usize, gone: Gone) -> bool {
        self.0.get(rank).is_some_and(|place| {
            let noted =
                place.compare_exchange(0, gone.number(), Ordering::SeqCst, Ordering::SeqCst);
            noted.is_ok()
        })
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (usize, Gone)> {
        (0..self.0.len()).filter_map(|rank| Some((rank, self.get(rank)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_known_first_stays() {
        let table = GoneTable::new(2);
        assert_eq!(table.get(1), None);
        assert!(table.note(1, Gone::Died) && !table.note(1, Gone::Left));
        assert!(!table.note(2, Gone::Died));
        assert_eq!(table.all().collect::<Vec<_>>(), [(1, Gone::Died)]);
        for gone in Gone::ALL {
            assert_eq!(Gone::of(gone.number()), Some(gone));
        }
        assert_eq!(Gone::of(0), None);
    }
}
