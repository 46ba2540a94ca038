//! Communicators by numbers of ours: programs never hold an MPI handle.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::OnceLock;

use parking_lot::RwLock;

/// `COMM_WORLD`, through a private duplicate.
pub const WORLD: i64 = 0;
/// What `comm=None` means: another private duplicate of `COMM_WORLD`.
pub const DEFAULT: i64 = 1;
/// `COMM_SELF`, through a private duplicate.
pub const SELF: i64 = 2;

/// What XLA's own collectives use: a third private duplicate of `COMM_WORLD`.
pub const COLLECTIVES: i64 = 3;

/// The communicators that always exist.
pub const NAMES: [(&str, i64); 4] = [
    ("COMM_WORLD", WORLD),
    ("the default communicator", DEFAULT),
    ("COMM_SELF", SELF),
    ("all ranks", COLLECTIVES),
];

/// Numbers of the user's communicators have this bit, which no MPI's handles have.
const USERS: u64 = 1 << 61;

/// Whether a number is that of a communicator of the library's own, which no user's operation may
/// name: that of all ranks, or of a replica group (`hlo_rewrite::DeviceTable::number`).
#[inline]
pub const fn is_internal(number: i64) -> bool {
    number == COLLECTIVES || number as u64 >> 60 == 1
}

/// Whether a number is that of a communicator of the user's, on which mpi4py may communicate too.
pub const fn is_users(number: i64) -> bool {
    number as u64 >= USERS
}

/// A communicator as the engine knows it.
#[derive(Clone, Copy, Debug)]
pub struct Communicator {
    /// What users call it.
    pub name: &'static str,
    /// The handle our operations use.
    pub handle: u64,
    /// The handle users pass; the same but for the private duplicates.
    pub user_handle: u64,
    /// Rank of this process.
    pub rank: i32,
    /// Number of ranks.
    pub size: i32,
    /// The ranks of its members in the world, in order; none means all.
    pub members: &'static [i32],
    /// The largest tag, where messages carry their element type in their tags; else 0.
    pub largest_tag: i32,
    /// Freed by the user; its number is never used again.
    pub freed: bool,
}

/// All communicators of this process by number.
#[derive(Default)]
pub struct Communicators {
    /// Those of [`NAMES`], which are never freed: most operations are on them, and need no lock.
    fixed: [OnceLock<Communicator>; NAMES.len()],
    /// The others.
    rows: RwLock<BTreeMap<i64, Communicator>>,
}

impl Communicators {
    /// Adds a communicator of the library's own under its number; one of [`NAMES`] once.
    pub fn add(&self, number: i64, communicator: Communicator) {
        match self.fixed(number) {
            Some(place) => assert!(place.set(communicator).is_ok(), "{number} is there already"),
            None => drop(self.rows.write().insert(number, communicator)),
        }
    }

    #[inline]
    fn fixed(&self, number: i64) -> Option<&OnceLock<Communicator>> {
        self.fixed.get(usize::try_from(number).ok()?)
    }

    /// Adds a communicator of the user's and returns its number, which tells its members (their
    /// ranks in `MPI_COMM_WORLD`, in order) and which of those with these members it is. A program
    /// that was compiled in another run so finds the communicator that it was compiled for, or
    /// none.
    pub fn add_users(&self, members: &[i32], communicator: Communicator) -> i64 {
        let mut rows = self.rows.write();
        let mut ordinal = 0u64;
        loop {
            let mut hasher = DefaultHasher::new();
            (members, ordinal).hash(&mut hasher);
            let number = (hasher.finish() % USERS + USERS) as i64;
            if let std::collections::btree_map::Entry::Vacant(free) = rows.entry(number) {
                free.insert(communicator);
                return number;
            }
            ordinal += 1;
        }
    }

    /// The communicator of that number.
    #[inline]
    pub fn get(&self, number: i64) -> Option<Communicator> {
        match self.fixed(number) {
            Some(place) => place.get().copied(),
            None => self.rows.read().get(&number).copied(),
        }
    }

    /// The number of the live communicator with that user's handle.
    pub fn find(&self, user_handle: u64) -> Option<i64> {
        let is = |row: &Communicator| !row.freed && row.user_handle == user_handle;
        // Other duplicates of COMM_WORLD have its handle too; they are not found by handle.
        let mut fixed = [WORLD, SELF].into_iter();
        let fixed = fixed.find(|&number| self.get(number).is_some_and(|row| is(&row)));
        let rows = self.rows.read();
        let users = || rows.iter().find(|(_, row)| is(row));
        fixed.or_else(|| users().map(|(&number, _)| number))
    }

    /// Marks a communicator as freed.
    pub fn free(&self, number: i64) {
        if let Some(row) = self.rows.write().get_mut(&number) {
            row.freed = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn communicator(user_handle: u64) -> Communicator {
        Communicator {
            name: "test",
            handle: 0,
            user_handle,
            rank: 0,
            size: 1,
            members: &[],
            largest_tag: 0,
            freed: false,
        }
    }

    #[test]
    fn a_handle_reused_after_free_is_another_communicator() {
        let all = Communicators::default();
        all.add(WORLD, communicator(7));
        all.add(DEFAULT, communicator(7));
        let number = all.add_users(&[0], communicator(9));
        assert_eq!(all.find(9), Some(number));
        assert_eq!(all.find(7), Some(WORLD));
        all.free(number);
        assert!(all.get(number).unwrap().freed);
        assert_eq!(all.find(9), None);
        assert_ne!(all.add_users(&[0], communicator(9)), number);
        assert!(all.get(99).is_none() && all.get(-1).is_none());
    }

    #[test]
    fn another_run_gives_a_communicator_of_the_same_members_the_same_number() {
        let run = |sets: &[&[i32]]| {
            let all = Communicators::default();
            let add = |(handle, members): (usize, &&[i32])| {
                all.add_users(members, communicator(handle as u64))
            };
            sets.iter().enumerate().map(add).collect::<Vec<_>>()
        };
        let first = run(&[&[0, 1], &[1, 0], &[0, 1], &[2]]);
        let second = run(&[&[2], &[0, 1], &[0, 1], &[1, 0]]);
        assert_eq!([first[0], first[2]], [second[1], second[2]]);
        assert_eq!([first[1], first[3]], [second[3], second[0]]);
        assert!(first[0] != first[2] && first.iter().all(|&number| number >= 1 << 61));
    }
}
