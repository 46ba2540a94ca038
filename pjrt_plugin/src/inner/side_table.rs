//! What is known of executables of the inner plugin, beside them: by address. Addresses are reused,
//! so whatever is known of one is forgotten before it is destroyed.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};

/// A table by the address of a handle, in a static.
pub struct SideTable<T> {
    rows: LazyLock<RwLock<HashMap<usize, T>>>,
    /// How many rows there are; spares the lock where there are none.
    count: AtomicUsize,
}

/// A table without its type, so that one call forgets a handle everywhere.
trait Forget: Sync {
    fn forget(&self, address: usize);
}

/// The tables that have had a row.
static TABLES: Mutex<Vec<&'static dyn Forget>> = Mutex::new(Vec::new());

/// Forgets what any table knows of a handle; before it is destroyed.
pub fn forget(address: usize) {
    let tables = TABLES.lock().clone();
    for table in tables {
        table.forget(address);
    }
}

impl<T: Send + Sync + 'static> SideTable<T> {
    /// A table without rows.
    pub const fn new() -> SideTable<T> {
        SideTable {
            rows: LazyLock::new(RwLock::default),
            count: AtomicUsize::new(0),
        }
    }

    /// Notes what is known of a handle.
    pub fn insert(&'static self, address: usize, row: T) {
        self.edit(|rows| rows.insert(address, row));
    }

    /// Looks at what is known of a handle.
    pub fn with<R>(&self, address: usize, look: impl FnOnce(&T) -> R) -> Option<R> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.rows.read().get(&address).map(look)
    }

    /// What is known of a handle.
    pub fn get(&self, address: usize) -> Option<T>
    where
        T: Clone,
    {
        self.with(address, T::clone)
    }

    /// Whether anything is known of a handle.
    pub fn has(&self, address: usize) -> bool {
        self.with(address, |_| ()).is_some()
    }

    /// Forgets all handles; the rows are dropped without a lock.
    pub fn clear(&'static self) {
        drop(self.edit(std::mem::take));
    }

    /// Changes rows.
    pub fn edit<R>(&'static self, change: impl FnOnce(&mut HashMap<usize, T>) -> R) -> R {
        let mut rows = self.rows.write();
        let registered = !rows.is_empty();
        let result = change(&mut rows);
        self.count.store(rows.len(), Ordering::Release);
        if !registered && !rows.is_empty() {
            register(self);
        }
        result
    }
}

/// A table is registered with its first row, and again if it was empty.
fn register<T: Send + Sync + 'static>(table: &'static SideTable<T>) {
    let mut tables = TABLES.lock();
    let address = std::ptr::from_ref(table).cast::<()>();
    let known = |other: &&dyn Forget| std::ptr::from_ref(*other).cast::<()>() == address;
    if !tables.iter().any(known) {
        tables.push(table);
    }
}

impl<T: Send + Sync + 'static> Forget for SideTable<T> {
    fn forget(&self, address: usize) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let row = {
            let mut rows = self.rows.write();
            let row = rows.remove(&address);
            self.count.store(rows.len(), Ordering::Release);
            row
        };
        // Dropping a row may call the inner plugin.
        drop(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_forgets_a_handle_everywhere() {
        static NAMES: SideTable<&str> = SideTable::new();
        static SIZES: SideTable<usize> = SideTable::new();
        NAMES.insert(8, "a");
        NAMES.insert(16, "b");
        SIZES.insert(8, 1);
        forget(8);
        assert!(!NAMES.has(8) && !SIZES.has(8));
        assert_eq!(NAMES.get(16), Some("b"));
        NAMES.clear();
        assert!(!NAMES.has(16));
    }
}
