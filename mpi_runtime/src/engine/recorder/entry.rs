//! An entry of the ring, and how it is written while others may read it.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::Entry;
use super::system;
use crate::engine::order::Ticket;

thread_local! {
    /// What Linux calls this thread.
    static THREAD: Cell<u32> = const { Cell::new(0) };
}

/// What an entry says, before it is written.
pub(super) struct Fields {
    pub(super) ticket: Ticket,
    pub(super) comm: i64,
    pub(super) position: u64,
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) ranks: u64,
    pub(super) tags: u64,
    pub(super) what: u64,
    pub(super) text: u32,
}

impl Entry {
    #[inline]
    pub(super) fn write(&self, fields: &Fields) {
        let launch_thread = u64::from(fields.ticket.0) << 32 | u64::from(thread());
        for (place, value) in [
            (&self.comm, fields.comm as u64),
            (&self.position, fields.position),
            (&self.sent, fields.sent),
            (&self.received, fields.received),
            (&self.launch_thread, launch_thread),
            (&self.ranks, fields.ranks),
            (&self.tags, fields.tags),
            (&self.what, fields.what),
            (&self.text, u64::from(fields.text)),
            (&self.failed, 0),
            (&self.waited, 0),
        ] {
            place.store(value, Ordering::Relaxed);
        }
    }

    /// Becomes the same as `from`; its number last.
    pub(super) fn copy(&self, from: &Entry) {
        for (to, from) in self.words().iter().zip(from.words()).rev() {
            to.store(from.load(Ordering::Relaxed), Ordering::Release);
        }
    }

    fn words(&self) -> [&AtomicU64; 16] {
        [
            &self.number,
            &self.start,
            &self.end,
            &self.waited,
            &self.comm,
            &self.position,
            &self.sent,
            &self.received,
            &self.launch_thread,
            &self.ranks,
            &self.tags,
            &self.what,
            &self.text,
            &self.failed,
            &self.spare,
            &self.number_again,
        ]
    }
}

/// What Linux calls this thread.
#[inline]
fn thread() -> u32 {
    match THREAD.get() {
        0 => ask_thread(),
        known => known,
    }
}

#[cold]
fn ask_thread() -> u32 {
    let number = system::thread();
    THREAD.set(number);
    number
}

/// Two numbers in one.
#[inline]
pub(super) const fn pair(upper: i32, lower: i32) -> u64 {
    (upper as u32 as u64) << 32 | lower as u32 as u64
}
