//! Errors of operations that nobody may have read yet: they are raised at the next chance.

#![forbid(unsafe_code)]

use super::Engine;

/// An error that nobody may have read yet.
pub(super) struct UnreadError {
    text: String,
    /// The thread that has launched what failed, by the number of its order.
    thread: Option<u32>,
}

impl Engine {
    /// Notes an error of an operation that a thread has launched, by the number of its order; none
    /// if that is not known. Somebody may still read it.
    pub fn note_unread(&self, error: &str, thread: Option<u32>) {
        let mut unread = self.unread.lock();
        if !unread.iter().any(|known| error.contains(&known.text)) {
            let text = error.to_owned();
            unread.push(UnreadError { text, thread });
        }
    }

    /// The first error that nobody has read, of what the thread with that number has launched, or
    /// of all threads; forgets the others of these. What no thread is known for is the first
    /// thread's.
    pub fn take_unread_error(&self, thread: Option<u32>) -> Option<String> {
        let mut unread = self.unread.lock();
        let concerns = |error: &UnreadError| {
            thread.is_none_or(|thread| error.thread.unwrap_or_default() == thread)
        };
        let first = unread.iter().find(|error| concerns(error));
        let first = first.map(|error| error.text.clone());
        unread.retain(|error| !concerns(error));
        first
    }

    /// Whether there are some.
    pub fn has_unread(&self) -> bool {
        !self.unread.lock().is_empty()
    }

    /// Somebody has read an error with this text.
    pub fn mark_read(&self, text: &str) {
        let mut unread = self.unread.lock();
        if !unread.is_empty() {
            unread.retain(|error| !text.contains(&error.text));
        }
    }
}
