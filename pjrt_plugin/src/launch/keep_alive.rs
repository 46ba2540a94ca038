//! Handles that launches still need after the framework has given them up: destroying them, or
//! deleting their content, is put off until then.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::inner::handles::{BufferHandle, ContextHandle, Destroy, Handle, LoadedHandle};
use crate::inner::side_table;

/// Keeps a handle until dropped.
pub struct Kept<H: Keepable>(H);

impl<H: Keepable> Kept<H> {
    /// Keeps `handle`.
    pub fn new(handle: H) -> Kept<H> {
        H::table().keep(handle.address());
        Kept(handle)
    }

    /// The handle.
    pub fn get(&self) -> H {
        self.0
    }
}

impl<H: Keepable> Drop for Kept<H> {
    fn drop(&mut self) {
        self.0.catch_up(H::table().release(self.0.address()));
    }
}

/// Destroys a handle, or has it destroyed when it is not kept any more.
pub fn give_up<H: Keepable>(handle: H) {
    if !postpone_destroy(handle) {
        handle.destroy();
    }
}

/// Puts off the destruction of a handle, if it is kept.
pub fn postpone_destroy<H: Keepable>(handle: H) -> bool {
    H::table().postpone(handle.address(), |postponed| postponed.destroy = true)
}

/// Puts off that the content of a buffer is deleted, if it is kept.
pub fn postpone_delete(buffer: BufferHandle) -> bool {
    BUFFERS.postpone(buffer.address(), |postponed| postponed.delete = true)
}

/// Notes that a launch which is still to come takes the content of a buffer, which must be kept
/// until that launch has ended.
pub fn donate(buffer: BufferHandle) {
    postpone_delete(buffer);
}

/// Whether the content of a buffer that is kept belongs to launches alone, since the framework has
/// deleted or donated it.
#[inline]
pub fn is_deleted(buffer: BufferHandle) -> bool {
    any_deleted() && BUFFERS.postponed(buffer.address()).delete
}

/// Whether there is any such buffer.
#[inline]
pub fn any_deleted() -> bool {
    BUFFERS.deleted.load(Ordering::Acquire) > 0
}

/// A kind of handles that can be kept.
pub trait Keepable: Destroy {
    /// Those that are kept.
    fn table() -> &'static KeepAlive;

    /// Does what was put off.
    fn catch_up(self, postponed: Postponed);
}

static BUFFERS: KeepAlive = KeepAlive::new();
static CONTEXTS: KeepAlive = KeepAlive::new();
static EXECUTABLES: KeepAlive = KeepAlive::new();

impl Keepable for BufferHandle {
    fn table() -> &'static KeepAlive {
        &BUFFERS
    }

    fn catch_up(self, postponed: Postponed) {
        if postponed.destroy {
            self.destroy();
        } else if postponed.delete {
            // A launch that failed has not taken what was donated to it.
            self.delete();
        }
    }
}

/// The inner plugin's launches refer to their context until they have ended.
impl Keepable for ContextHandle {
    fn table() -> &'static KeepAlive {
        &CONTEXTS
    }

    fn catch_up(self, postponed: Postponed) {
        if postponed.destroy {
            self.destroy();
        }
    }
}

impl Keepable for LoadedHandle {
    fn table() -> &'static KeepAlive {
        &EXECUTABLES
    }

    fn catch_up(self, postponed: Postponed) {
        if postponed.destroy {
            side_table::forget(self.address());
            self.destroy();
        }
    }
}

/// The handles of one kind that are kept, by address.
pub struct KeepAlive {
    /// How many there are; spares the lock where there are none.
    count: AtomicUsize,
    /// How many of them are to be deleted.
    deleted: AtomicUsize,
    kept: Mutex<Option<HashMap<usize, Entry>>>,
}

#[derive(Default)]
struct Entry {
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
    const fn new() -> KeepAlive {
        KeepAlive {
            count: AtomicUsize::new(0),
            deleted: AtomicUsize::new(0),
            kept: Mutex::new(None),
        }
    }

    /// Keeps `handle` once more; whoever does must [`KeepAlive::release`] it.
    fn keep(&self, handle: usize) {
        let mut kept = self.kept.lock();
        let kept = kept.get_or_insert_with(HashMap::new);
        kept.entry(handle).or_default().times += 1;
        self.count.store(kept.len(), Ordering::Release);
    }

    /// Gives `handle` up once; has what is to be done if it is not kept any more.
    fn release(&self, handle: usize) -> Postponed {
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
        if postponed.delete {
            self.deleted.fetch_sub(1, Ordering::AcqRel);
        }
        self.count.store(kept.len(), Ordering::Release);
        postponed
    }

    /// Puts off what `note` marks, if `handle` is kept.
    fn postpone(&self, handle: usize, note: impl FnOnce(&mut Postponed)) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let mut kept = self.kept.lock();
        match kept.as_mut().and_then(|kept| kept.get_mut(&handle)) {
            Some(found) => {
                let before = found.postponed.delete;
                note(&mut found.postponed);
                if found.postponed.delete && !before {
                    self.deleted.fetch_add(1, Ordering::AcqRel);
                }
                true
            }
            None => false,
        }
    }

    /// What has been put off for `handle`.
    fn postponed(&self, handle: usize) -> Postponed {
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
    fn what_is_kept_is_destroyed_after_the_last_release() {
        let table = KeepAlive::new();
        assert!(!table.postpone(1, |postponed| postponed.destroy = true));
        table.keep(1);
        table.keep(1);
        assert!(!table.postpone(2, |postponed| postponed.destroy = true));
        assert!(table.postpone(1, |postponed| postponed.delete = true));
        assert!(table.postponed(1).delete && !table.postponed(2).delete);
        assert!(table.postpone(1, |postponed| postponed.delete = true));
        assert_eq!(table.deleted.load(Ordering::Acquire), 1);
        assert!(table.postpone(1, |postponed| postponed.destroy = true));
        assert_eq!(table.release(1), Postponed::default());
        let both = Postponed {
            delete: true,
            destroy: true,
        };
        assert_eq!(table.release(1), both);
        assert_eq!(table.deleted.load(Ordering::Acquire), 0);
        assert!(!table.postpone(1, |postponed| postponed.destroy = true));
        assert_eq!(table.release(1), Postponed::default());
    }
}
