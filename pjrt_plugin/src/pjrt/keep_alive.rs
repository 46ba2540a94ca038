//! Handles that we still need after the framework has given them up: destroying them, or deleting
//! their content, is put off until then.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

/// The handles of one kind that are kept, by address.
#[derive(Default)]
pub struct KeepAlive {
    /// How many there are; spares the lock where there are none.
    count: AtomicUsize,
    kept: Mutex<Option<HashMap<usize, Kept>>>,
}

#[derive(Default)]
struct Kept {
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

impl KeepAlive {
    /// No handle is kept.
    pub const fn new() -> KeepAlive {
        KeepAlive {
            count: AtomicUsize::new(0),
            kept: Mutex::new(None),
        }
    }

    /// KeepAlive `handle` once more; whoever does must [`KeepAlive::release`] it.
    pub fn keep(&self, handle: usize) {
        let mut kept = self.kept.lock();
        let kept = kept.get_or_insert_with(HashMap::new);
        kept.entry(handle).or_default().times += 1;
        self.count.store(kept.len(), Ordering::Release);
    }

    /// Gives `handle` up once; has what is to be done if it is not kept any more.
    pub fn release(&self, handle: usize) -> Postponed {
        let mut kept = self.kept.lock();
        let Some(kept) = kept.as_mut() else {
            return Postponed::default();
        };
        let Some(found) = kept.get_mut(&handle) else {
            return Postponed::default();
        };
        found.times -= 1;
        if found.times > 0 {
            return Postponed::default();
        }
        let postponed = found.postponed;
        kept.remove(&handle);
        self.count.store(kept.len(), Ordering::Release);
        postponed
    }

    /// Puts off what `note` marks, if `handle` is kept.
    pub fn postpone(&self, handle: usize, note: impl FnOnce(&mut Postponed)) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let mut kept = self.kept.lock();
        match kept.as_mut().and_then(|kept| kept.get_mut(&handle)) {
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
        let kept = self.kept.lock();
        kept.as_ref()
            .and_then(|kept| kept.get(&handle))
            .map_or_else(Postponed::default, |found| found.postponed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_destroyed_after_the_last_release() {
        let table = KeepAlive::new();
        assert!(!table.postpone(1, |postponed| postponed.destroy = true));
        table.keep(1);
        table.keep(1);
        assert!(!table.postpone(2, |postponed| postponed.destroy = true));
        assert!(table.postpone(1, |postponed| postponed.delete = true));
        assert!(table.postponed(1).delete && !table.postponed(2).delete);
        assert!(table.postpone(1, |postponed| postponed.destroy = true));
        assert_eq!(table.release(1), Postponed::default());
        let both = Postponed {
            delete: true,
            destroy: true,
        };
        assert_eq!(table.release(1), both);
        assert!(!table.postpone(1, |postponed| postponed.destroy = true));
        assert_eq!(table.release(1), Postponed::default());
    }
}
