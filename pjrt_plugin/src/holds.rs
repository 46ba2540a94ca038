//! Handles that we still need after the framework has given them up: destroying them, or deleting
//! their content, is put off until then.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

/// The handles of one kind that are held, by address.
#[derive(Default)]
pub struct Holds {
    /// How many there are; spares the lock where there are none.
    count: AtomicUsize,
    held: Mutex<Option<HashMap<usize, Held>>>,
}

#[derive(Default)]
struct Held {
    times: usize,
    postponed: Postponed,
}

/// What the framework has asked for meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Postponed {
    /// The content is to be deleted.
    pub delete: bool,
    /// The handle is to be destroyed.
    pub destroy: bool,
}

impl Holds {
    /// No handle is held.
    pub const fn new() -> Holds {
        Holds {
            count: AtomicUsize::new(0),
            held: Mutex::new(None),
        }
    }

    /// Holds `handle` once more; whoever does must [`Holds::release`] it.
    pub fn hold(&self, handle: usize) {
        let mut held = self.held.lock();
        let held = held.get_or_insert_with(HashMap::new);
        held.entry(handle).or_default().times += 1;
        self.count.store(held.len(), Ordering::Release);
    }

    /// Gives `handle` up once; has what is to be done if it is not held any more.
    pub fn release(&self, handle: usize) -> Postponed {
        let mut held = self.held.lock();
        let Some(held) = held.as_mut() else {
            return Postponed::default();
        };
        let Some(found) = held.get_mut(&handle) else {
            return Postponed::default();
        };
        found.times -= 1;
        if found.times > 0 {
            return Postponed::default();
        }
        let postponed = found.postponed;
        held.remove(&handle);
        self.count.store(held.len(), Ordering::Release);
        postponed
    }

    /// Puts off what `note` marks, if `handle` is held.
    pub fn postpone(&self, handle: usize, note: impl FnOnce(&mut Postponed)) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let mut held = self.held.lock();
        match held.as_mut().and_then(|held| held.get_mut(&handle)) {
            Some(found) => {
                note(&mut found.postponed);
                true
            }
            None => false,
        }
    }

    /// What has been put off for `handle`.
    pub fn postponed(&self, handle: usize) -> Postponed {
        if self.count.load(Ordering::Acquire) == 0 {
            return Postponed::default();
        }
        let held = self.held.lock();
        held.as_ref()
            .and_then(|held| held.get(&handle))
            .map_or_else(Postponed::default, |found| found.postponed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_destroyed_after_the_last_release() {
        let holds = Holds::new();
        assert!(!holds.postpone(1, |postponed| postponed.destroy = true));
        holds.hold(1);
        holds.hold(1);
        assert!(!holds.postpone(2, |postponed| postponed.destroy = true));
        assert!(holds.postpone(1, |postponed| postponed.delete = true));
        assert!(holds.postponed(1).delete && !holds.postponed(2).delete);
        assert!(holds.postpone(1, |postponed| postponed.destroy = true));
        assert_eq!(holds.release(1), Postponed::default());
        let both = Postponed {
            delete: true,
            destroy: true,
        };
        assert_eq!(holds.release(1), both);
        assert!(!holds.postpone(1, |postponed| postponed.destroy = true));
        assert_eq!(holds.release(1), Postponed::default());
    }
}
