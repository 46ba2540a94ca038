//! Communicators by numbers of ours: programs never hold an MPI handle.

#![forbid(unsafe_code)]

use parking_lot::RwLock;

/// `COMM_WORLD`, through a private duplicate.
pub const WORLD: i64 = 0;
/// What `comm=None` means: another private duplicate of `COMM_WORLD`.
pub const DEFAULT: i64 = 1;
/// `COMM_SELF`, through a private duplicate.
pub const SELF: i64 = 2;

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
    /// Freed by the user; its number is never used again.
    pub freed: bool,
}

/// All communicators of this process by number.
#[derive(Default)]
pub struct Communicators {
    rows: RwLock<Vec<Communicator>>,
}

impl Communicators {
    /// Adds a communicator and returns its number.
    pub fn add(&self, communicator: Communicator) -> i64 {
        let mut rows = self.rows.write();
        rows.push(communicator);
        rows.len() as i64 - 1
    }

    /// The communicator of that number.
    pub fn get(&self, number: i64) -> Option<Communicator> {
        usize::try_from(number)
            .ok()
            .and_then(|index| self.rows.read().get(index).copied())
    }

    /// The number of the live communicator with that user's handle.
    pub fn find(&self, user_handle: u64) -> Option<i64> {
        let rows = self.rows.read();
        // `comm=None` has COMM_WORLD's handle too; it has its number, and is not found by handle.
        rows.iter()
            .enumerate()
            .position(|(number, row)| {
                number as i64 != DEFAULT && !row.freed && row.user_handle == user_handle
            })
            .map(|index| index as i64)
    }

    /// Marks a communicator as freed.
    pub fn free(&self, number: i64) {
        let mut rows = self.rows.write();
        if let Some(row) = usize::try_from(number)
            .ok()
            .and_then(|index| rows.get_mut(index))
        {
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
            freed: false,
        }
    }

    #[test]
    fn a_handle_reused_after_free_is_another_communicator() {
        let all = Communicators::default();
        all.add(communicator(7));
        all.add(communicator(7));
        let number = all.add(communicator(9));
        assert_eq!(all.find(9), Some(number));
        assert_eq!(all.find(7), Some(WORLD));
        all.free(number);
        assert!(all.get(number).unwrap().freed);
        assert_eq!(all.find(9), None);
        assert_ne!(all.add(communicator(9)), number);
        assert!(all.get(99).is_none() && all.get(-1).is_none());
    }
}
