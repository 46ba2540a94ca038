//! How a board lies in shared memory.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::node::bell::Bell;
use crate::node::segment::Atomics;

/// Lanes of a rank.
pub(crate) const LANES: usize = 128;
/// Records that a lane keeps. A rank ends a round only after it has seen the records of all
/// others, and writes four at most in advance. One that looks at its last round may be behind by
/// those four, by the launch and the operation after them, and by four more: none is overwritten
/// before it is read.
pub(super) const RING: u64 = 16;
/// Numbers in a record.
pub(crate) const RECORD: usize = 4;
/// Texts that a rank keeps, and the bytes of one.
pub(super) const TEXTS: usize = 16;
pub(super) const TEXT: usize = 504;

/// A record on a cache line of its own; its number is written last.
#[repr(C, align(64))]
pub(super) struct Slot {
    pub(super) number: AtomicU64,
    pub(super) words: [AtomicU64; RECORD],
}

#[repr(C, align(64))]
pub(super) struct Lane {
    /// The channel that it belongs to; 0 if it is free.
    pub(super) channel: AtomicU64,
    /// Other than 0 once its rank reads nothing more of this channel.
    pub(super) retired: AtomicU64,
    pub(super) slots: [Slot; RING as usize],
}

/// Bytes that a rank may tell of what it does.
pub(super) const ANSWER: usize = 8 << 10;

/// What a rank tells of what it does, to those that ask.
#[repr(C)]
pub(super) struct Answer {
    /// Raised by whoever asks.
    pub(super) question: AtomicU64,
    pub(super) answered: AtomicU64,
    /// How long its operation has waited that has waited longest, in milliseconds.
    pub(super) waiting: AtomicU64,
    pub(super) bytes: [AtomicU64; ANSWER / size_of::<u64>()],
}

/// Ranks of which a board can show that they have gone, of all nodes; no more are told of.
pub(super) const ELSEWHERE: usize = 16 << 10;
/// Numbers below 4 in a word.
pub(super) const IN_WORD: usize = u64::BITS as usize / 2;

/// Words for people; the key says what of, and is written last.
#[repr(C)]
pub(super) struct Text {
    pub(super) key: AtomicU64,
    pub(super) bytes: [AtomicU64; TEXT / size_of::<u64>()],
}

/// Results that the ranks of a node make for each other, at a time.
pub(crate) const RESULTS: usize = 1024;

/// A result that one rank makes for all.
#[repr(C)]
pub(crate) struct SharedResult {
    /// Who makes it, and of what; 0 if this is free.
    pub(crate) claim: AtomicU64,
    /// The descriptor of its file in the process of its rank, and 1; 0 until it is made.
    pub(crate) file: AtomicU64,
    /// The number of that file.
    pub(crate) inode: AtomicU64,
    /// The ranks that need it no more, a bit for each.
    pub(crate) taken: AtomicU64,
}

/// What a rank shows.
#[repr(C)]
pub(super) struct Shown {
    /// Other than 0 once the rank has left, or is about to.
    pub(super) left: AtomicU64,
    /// Its process, by [`Process`](crate::node::process::Process).
    pub(super) process: [AtomicU64; 3],
    /// Rung when there is something new for those that sleep.
    pub(super) bell: Bell,
    /// Rung by whoever sends a message to this rank.
    pub(super) messages: Bell,
    pub(super) answer: Answer,
    /// Which ranks of other nodes have gone and how, as far as this rank has heard.
    pub(super) elsewhere: [AtomicU64; ELSEWHERE / IN_WORD],
    /// Other than 0 while an operation of another node waits, as far as this rank has heard.
    pub(super) waits_elsewhere: AtomicU64,
    /// Other than 0 once this rank wants JAX's coordinator.
    pub(super) wants_coordinator: AtomicU64,
    /// Where the coordinator is, as far as this rank knows: an IPv6 address and a port.
    pub(super) coordinator: [AtomicU64; 3],
    pub(super) texts: [Text; TEXTS],
    /// Those of the lowest rank are the node's.
    pub(super) results: [SharedResult; RESULTS],
    pub(super) lanes: [Lane; LANES],
}

// SAFETY: it has atomics, arrays of them, and structs of them.
unsafe impl Atomics for Shown {}

/// Writes a text, cut off where the place ends.
pub(super) fn store_text(place: &[AtomicU64], text: &str) {
    let mut bytes = text.bytes().chain(std::iter::repeat(0));
    for word in place {
        let next = std::array::from_fn(|_| bytes.next().unwrap_or(0));
        word.store(u64::from_le_bytes(next), Ordering::SeqCst);
    }
}

pub(super) fn load_text(place: &[AtomicU64]) -> String {
    let bytes: Vec<u8> = place
        .iter()
        .flat_map(|word| word.load(Ordering::SeqCst).to_le_bytes())
        .take_while(|&byte| byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
