//! Handles that launches still need after the framework has given them up: destroying them, or
//! deleting their content, is put off until then.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::inner::handles::{BufferHandle, ContextHandle, Destroy, Handle, LoadedHandle, Owned};
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
pub fn give_up<H: Keepable>(handle: Owned<H>) {
    drop(postpone_destroy(handle));
}

/// Puts off the destruction of a handle, if it is kept; gives it back if not.
pub fn postpone_destroy<H: Keepable>(handle: Owned<H>) -> Option<Owned<H>> {
    let mut given_up = Some(handle);
    let address = given_up.as_ref().map_or(0, |handle| handle.get().address());
    H::table().postpone(address, |postponed| postponed.given_up = given_up.take());
    given_up
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
    any_deleted() && BUFFERS.is_deleted(buffer.address())
}

/// Whether there is any such buffer.
#[inline]
pub fn any_deleted() -> bool {
    BUFFERS.deleted.load(Ordering::Acquire) > 0
}

/// A kind of handles that can be kept.
pub trait Keepable: Destroy + 'static {
    /// Those that are kept.
    fn table() -> &'static KeepAlive<Owned<Self>>;

    /// Does what was put off.
    fn catch_up(self, postponed: Postponed<Owned<Self>>);
}

static BUFFERS: KeepAlive<Owned<BufferHandle>> = KeepAlive::new();
static CONTEXTS: KeepAlive<Owned<ContextHandle>> = KeepAlive::new();
static EXECUTABLES: KeepAlive<Owned<LoadedHandle>> = KeepAlive::new();

impl Keepable for BufferHandle {
    fn table() -> &'static KeepAlive<Owned<BufferHandle>> {
        &BUFFERS
    }

    fn catch_up(self, postponed: Postponed<Owned<BufferHandle>>) {
        if postponed.given_up.is_none() && postponed.delete {
            // A launch that failed has not taken what was donated to it.
            self.delete();
        }
    }
}

/// The inner plugin's launches refer to their context until they have ended.
impl Keepable for ContextHandle {
    fn table() -> &'static KeepAlive<Owned<ContextHandle>> {
        &CONTEXTS
    }

    fn catch_up(self, postponed: Postponed<Owned<ContextHandle>>) {
        drop(postponed.given_up);
    }
}

impl Keepable for LoadedHandle {
    fn table() -> &'static KeepAlive<Owned<LoadedHandle>> {
        &EXECUTABLES
    }

    fn catch_up(self, postponed: Postponed<Owned<LoadedHandle>>) {
        if let Some(given_up) = postponed.given_up {
            side_table::forget(self.address());
            drop(given_up);
        }
    }
}

/// The handles of one kind that are kept, by address; `T` is one that was given up.
pub struct KeepAlive<T> {
    /// How many there are; spares the lock where there are none.
    count: AtomicUsize,
    /// How many of them are to be deleted.
    deleted: AtomicUsize,
    kept: Mutex<Option<HashMap<usize, Entry<T>>>>,
}

struct Entry<T> {
    times: usize,
    postponed: Postponed<T>,
}

/// What the framework has asked for meanwhile.
#[derive(Debug, PartialEq, Eq)]
pub struct Postponed<T> {
    /// The content is to be deleted.
    pub delete: bool,
    /// The handle, if it is to be destroyed.
    pub given_up: Option<T>,
}

impl<T> Default for Postponed<T> {
    fn default() -> Postponed<T> {
        Postponed {
            delete: false,
            given_up: None,
        }
    }
}

impl<T> Default for Entry<T> {
    fn default() -> Entry<T> {
        Entry {
            times: 0,
            postponed: Postponed::default(),
        }
    }
}

impl<T> KeepAlive<T> {
    /// No handle is kept.
    const fn new() -> KeepAlive<T> {
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
    fn release(&self, handle: usize) -> Postponed<T> {
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
        let postponed = std::mem::take(&mut found.postponed);
        kept.remove(&handle);
        if postponed.delete {
            self.deleted.fetch_sub(1, Ordering::AcqRel);
        }
        self.count.store(kept.len(), Ordering::Release);
        postponed
    }

    /// Puts off what `note` marks, if `handle` is kept.
    fn postpone(&self, handle: usize, note: impl FnOnce(&mut Postponed<T>)) -> bool {
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

    /// Whether the content of `handle` is to be deleted.
    fn is_deleted(&self, handle: usize) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let kept = self.kept.lock();
        let found = kept.as_ref().and_then(|kept| kept.get(&handle));
        found.is_some_and(|found| found.postponed.delete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_destroyed_after_the_last_release() {
        let table = KeepAlive::new();
        let give_up = |handle| table.postpone(handle, |postponed| postponed.given_up = Some("it"));
        assert!(!give_up(1));
        table.keep(1);
        table.keep(1);
        assert!(!give_up(2));
        assert!(table.postpone(1, |postponed| postponed.delete = true));
        assert!(table.is_deleted(1) && !table.is_deleted(2));
        assert!(table.postpone(1, |postponed| postponed.delete = true));
        assert_eq!(table.deleted.load(Ordering::Acquire), 1);
        assert!(give_up(1));
        assert_eq!(table.release(1), Postponed::default());
        let both = Postponed {
            delete: true,
            given_up: Some("it"),
        };
        assert_eq!(table.release(1), both);
        assert_eq!(table.deleted.load(Ordering::Acquire), 0);
        assert!(!give_up(1));
        assert_eq!(table.release(1), Postponed::default());
    }
}
