//! Why a rank does nothing any more.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

/// How a rank has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    /// Its program is over.
    Left,
    /// Its process ended before that.
    Died,
    /// Nothing is heard of its node any more. That may change, unlike the others.
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

/// Which ranks have gone.
pub(super) struct GoneTable {
    /// By rank in the world.
    all: Vec<AtomicU8>,
    /// How many of them have not left.
    missing: AtomicUsize,
}

impl GoneTable {
    pub(super) fn new(size: usize) -> GoneTable {
        GoneTable {
            all: (0..size).map(|_| AtomicU8::new(0)).collect(),
            missing: AtomicUsize::new(0),
        }
    }

    pub(super) fn size(&self) -> usize {
        self.all.len()
    }

    pub(super) fn get(&self, rank: usize) -> Option<Gone> {
        Gone::of(self.all.get(rank)?.load(Ordering::SeqCst))
    }

    /// Notes it; whether that is news. What was known first stays, but for what may change.
    pub(super) fn note(&self, rank: usize, gone: Gone) -> bool {
        self.change(rank, |known| match known {
            None => Some(gone.number()),
            Some(Gone::Lost) if gone != Gone::Lost => Some(gone.number()),
            Some(_) => None,
        })
    }

    /// A rank that was lost is there again; whether it was.
    pub(super) fn found(&self, rank: usize) -> bool {
        self.change(rank, |known| (known == Some(Gone::Lost)).then_some(0))
    }

    fn change(&self, rank: usize, next: impl Fn(Option<Gone>) -> Option<u8>) -> bool {
        let Some(place) = self.all.get(rank) else {
            return false;
        };
        let mut after = 0;
        let changed = place.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |number| {
            after = next(Gone::of(number))?;
            Some(after)
        });
        let Ok(before) = changed else { return false };
        let is_missing = |number| Gone::of(number).is_some_and(|gone| gone != Gone::Left);
        match (is_missing(before), is_missing(after)) {
            (false, true) => self.missing.fetch_add(1, Ordering::SeqCst),
            (true, false) => self.missing.fetch_sub(1, Ordering::SeqCst),
            _ => 0,
        };
        true
    }

    /// How many have ended before their programs did.
    pub(super) fn missing(&self) -> usize {
        self.missing.load(Ordering::SeqCst)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (usize, Gone)> {
        (0..self.all.len()).filter_map(|rank| Some((rank, self.get(rank)?)))
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
        assert_eq!(table.missing(), 1);
        assert_eq!(table.all().collect::<Vec<_>>(), [(1, Gone::Died)]);
        for gone in Gone::ALL {
            assert_eq!(Gone::of(gone.number()), Some(gone));
        }
        assert_eq!(Gone::of(0), None);
    }

    #[test]
    fn who_was_lost_may_be_found() {
        let table = GoneTable::new(3);
        assert!(!table.found(0) && table.note(0, Gone::Lost) && !table.note(0, Gone::Lost));
        assert!(table.found(0) && !table.found(3));
        assert_eq!((table.get(0), table.missing()), (None, 0));
        for (rank, gone, missing) in [(1, Gone::Died, 1), (2, Gone::Left, 1)] {
            assert!(table.note(rank, Gone::Lost) && table.note(rank, gone));
            assert!(!table.note(rank, Gone::Lost) && !table.found(rank));
            assert_eq!((table.get(rank), table.missing()), (Some(gone), missing));
        }
    }
}
