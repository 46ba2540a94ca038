//! Ranks of several nodes compare what they do, by messages of their own.
//!
//! They do not exchange anything for an operation that they know: one that came after the same
//! operation before. All ranks know the same, as long as they execute the same. What each rank has
//! executed is hashed, and the hashes are compared when an operation comes that is new behind the
//! one before, and again after growing numbers of operations.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::engine::compare::channel::OTHER_NODES;
use crate::engine::compare::exchange::{Exchange, TEXT, from_text, to_text};
use crate::engine::compare::record::Sequence;
use crate::engine::compare::words;
use crate::error::Failure;
use crate::node::board::RECORD;

/// The first numbers of operations without an exchange, and the largest.
const FIRST_PAUSE: u64 = 16;
const LONGEST_PAUSE: u64 = 1 << 16;
/// Pairs of operations that are remembered.
const MOST_KNOWN: usize = 1 << 16;

/// What the ranks of a world on several nodes compare.
pub(super) struct BetweenNodes {
    /// On each of the communicators.
    executed: Vec<Mutex<Executed>>,
    /// In the same order.
    pub(super) progress: Arc<[Progress]>,
    exchange: Box<dyn Exchange>,
    /// `MPI_CUDA_CHECK`: at each operation.
    always: bool,
}

/// How far a rank is in comparing, for the watch.
#[derive(Default)]
pub(crate) struct Progress {
    /// Operations, the one among them that is compared now.
    executed: AtomicU64,
    /// Exchanges that have begun.
    begun: AtomicU64,
    /// An exchange has not ended.
    waits: AtomicBool,
}

impl Progress {
    /// The operations, the exchanges that have begun, and whether one of them has not ended.
    pub(crate) fn read(&self) -> (u64, u64, bool) {
        let waits = self.waits.load(Ordering::SeqCst);
        let executed = self.executed.load(Ordering::SeqCst);
        (executed, self.begun.load(Ordering::SeqCst), waits)
    }
}

/// What ranks tell in words.
#[derive(Clone, Copy)]
pub(super) enum Told {
    Operation,
    Sequence,
}

/// What a rank is about to do.
pub(super) enum Step {
    /// To execute this record.
    Execute([u64; RECORD]),
    /// To refuse an operation that differs on its own node.
    Differ([u64; RECORD], Failure),
    /// To refuse an operation before it communicates.
    Refuse([u64; RECORD], Failure),
}

impl BetweenNodes {
    /// On as many communicators.
    pub(super) fn new(exchange: Box<dyn Exchange>, count: usize, always: bool) -> BetweenNodes {
        BetweenNodes {
            executed: (0..count).map(|_| Mutex::new(Executed::new())).collect(),
            progress: (0..count).map(|_| Progress::default()).collect(),
            exchange,
            always,
        }
    }

    /// Takes a step on the communicator of that index. `sequence` has the fixed sequence of
    /// operations that this one is in, if there is one, and `words` describe the operation, or the
    /// sequence if asked.
    ///
    /// # Errors
    /// If the ranks differ, with what each of them does; or what this rank's step says.
    pub(super) fn step(
        &self,
        index: usize,
        step: Step,
        sequence: impl FnOnce() -> Option<Sequence>,
        words: impl Fn(Told) -> String,
    ) -> Result<(), Failure> {
        let Some(executed) = self.executed.get(index) else {
            return step.result();
        };
        let mut executed = executed.lock();
        let progress = &self.progress[index];
        if executed.closed {
            return Err(
                format!("{OTHER_NODES}; with MPI_CUDA_CHECK=1 all ranks hear of it").into(),
            );
        }
        let (outcome, record) = step.hashes();
        let new = executed.add(outcome, record);
        progress.executed.fetch_add(1, Ordering::SeqCst);
        if !(new || self.always || matches!(step, Step::Refuse(..))) {
            executed.closed = matches!(step, Step::Differ(..));
            return step.result();
        }
        let Sequence { code, hash, .. } = sequence().unwrap_or_default();
        let own = [executed.running, code, hash];
        let [a, b, c] = own;
        progress.begun.fetch_add(1, Ordering::SeqCst);
        progress.waits.store(true, Ordering::SeqCst);
        let largest = self.exchange.largest(index, [a, b, c, !a, !b, !c]);
        progress.waits.store(false, Ordering::SeqCst);
        let [d, e, f, g, h, i] = largest?;
        let same = |own: u64, largest: u64, smallest: u64| largest == own && !smallest == own;
        // The same code, whose loops run another number of times.
        let clash = code != 0 && same(code, e, h) && !same(hash, f, i);
        if same(own[0], d, g) && !clash {
            executed.confirm();
            return step.result();
        }
        let count = executed.count;
        *executed = Executed::new();
        let told = if clash {
            Told::Sequence
        } else {
            Told::Operation
        };
        let texts = self.exchange.texts(index, &to_text(&words(told)))?;
        step.result()?;
        let all: Vec<(i32, String)> = (0..).zip(texts.iter().map(from_text)).collect();
        // Texts that are cut off may differ in what is not there.
        if all[0].1.len() < TEXT && all.iter().all(|one| one.1 == all[0].1) {
            return Err(format!(
                "the ranks have executed different operations among the {count} before this \
                 one; set MPI_CUDA_CHECK=1 to find where"
            )
            .into());
        }
        let what = match told {
            Told::Operation => "the ranks execute different operations",
            Told::Sequence => "the ranks run different programs",
        };
        Err(words::differ(what, all).into())
    }
}

impl Step {
    fn result(self) -> Result<(), Failure> {
        match self {
            Step::Execute(_) => Ok(()),
            Step::Differ(_, failure) | Step::Refuse(_, failure) => Err(failure),
        }
    }

    /// A number for what becomes of it, and one for the record.
    fn hashes(&self) -> (u64, u64) {
        let (outcome, record) = match self {
            Step::Execute(record) => (0, record),
            Step::Differ(record, _) => (1, record),
            Step::Refuse(record, _) => (2, record),
        };
        // Where in its program an operation is may differ.
        let [what, root, count, _] = record;
        let hash = |hash, word: &u64| mix(hash, *word);
        (outcome, [what, root, count].into_iter().fold(0, hash))
    }
}

/// What a rank has executed on one communicator.
struct Executed {
    /// Pairs of operations, one after the other, that all ranks have executed.
    known: HashSet<u64>,
    last: u64,
    /// All operations, hashed.
    running: u64,
    count: u64,
    /// The next exchange is due when so many were executed, and the one after it so many later.
    due: u64,
    pause: u64,
    closed: bool,
}

impl Executed {
    fn new() -> Executed {
        Executed {
            known: HashSet::new(),
            last: 0,
            running: 0,
            count: 0,
            due: FIRST_PAUSE,
            pause: FIRST_PAUSE,
            closed: false,
        }
    }

    /// Adds an operation; whether the ranks must tell each other of it.
    fn add(&mut self, outcome: u64, record: u64) -> bool {
        let pair = mix(self.last, record);
        self.last = record;
        self.running = mix(self.running, mix(record, outcome));
        self.count += 1;
        if self.known.len() >= MOST_KNOWN {
            self.known.clear();
        }
        // It is known once the exchange, which this asks for, has not failed.
        self.known.insert(pair) || self.count >= self.due
    }

    /// All ranks have executed the same so far.
    fn confirm(&mut self) {
        if self.count >= self.due {
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            self.due = self.count + self.pause;
        }
    }
}

/// Of two numbers one that depends on their order: the finalizer of SplitMix64 (Steele, Lea and
/// Flood, 2014).
fn mix(hash: u64, word: u64) -> u64 {
    let mut bits = hash.rotate_left(5) ^ word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests;
