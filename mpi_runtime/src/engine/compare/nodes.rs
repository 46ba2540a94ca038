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

/// What the ranks of a world on several nodes compare.
pub(super) struct BetweenNodes {
    rows: Vec<Mutex<Executed>>,
    /// Of each row.
    pub(super) progress: Arc<[Progress]>,
    exchange: Box<dyn Exchange>,
    /// `MPI_CUDA_CHECK`: at each operation.
    always: bool,
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
    pub(super) fn new(exchange: Box<dyn Exchange>, places: usize, always: bool) -> BetweenNodes {
        BetweenNodes {
            rows: (0..places).map(|_| Mutex::new(Executed::new())).collect(),
            progress: (0..places).map(|_| Progress::default()).collect(),
            exchange,
            always,
        }
    }

    /// Takes a step on a communicator. `sequence` has the fixed sequence of operations that this
    /// one is in, if there is one, and `words` describe the operation, or the sequence if asked.
    ///
    /// # Errors
    /// If the ranks differ, with what each of them does; or what this rank's step says.
    pub(super) fn step(
        &self,
        place: usize,
        step: Step,
        sequence: impl FnOnce() -> Option<Sequence>,
        words: impl Fn(Told) -> String,
    ) -> Result<(), Failure> {
        let Some(row) = self.rows.get(place) else {
            return step.result();
        };
        let mut row = row.lock();
        let progress = &self.progress[place];
        if row.closed {
            return Err(
                format!("{OTHER_NODES}; with MPI_CUDA_CHECK=1 all ranks hear of it").into(),
            );
        }
        let (outcome, record) = step.hashes();
        let new = row.add(outcome, record);
        progress.executed.fetch_add(1, Ordering::SeqCst);
        if !(new || self.always || matches!(step, Step::Refuse(..))) {
            row.closed = matches!(step, Step::Differ(..));
            return step.result();
        }
        let Sequence { code, hash, .. } = sequence().unwrap_or_default();
        let own = [row.running, code, hash];
        let [a, b, c] = own;
        progress.begun.fetch_add(1, Ordering::SeqCst);
        progress.waits.store(true, Ordering::SeqCst);
        let largest = self.exchange.largest(place, [a, b, c, !a, !b, !c]);
        progress.waits.store(false, Ordering::SeqCst);
        let [d, e, f, g, h, i] = largest?;
        let same = |own: u64, largest: u64, smallest: u64| largest == own && !smallest == own;
        // The same code, whose loops run another number of times.
        let clash = code != 0 && same(code, e, h) && !same(hash, f, i);
        if same(own[0], d, g) && !clash {
            row.confirm();
            return step.result();
        }
        let executed = row.executed;
        *row = Executed::new();
        let told = if clash {
            Told::Sequence
        } else {
            Told::Operation
        };
        let texts = self.exchange.texts(place, &to_text(&words(told)))?;
        step.result()?;
        let all: Vec<(i32, String)> = (0..).zip(texts.iter().map(from_text)).collect();
        // Texts that are cut off may differ in what is not there.
        if all[0].1.len() < TEXT && all.iter().all(|one| one.1 == all[0].1) {
            return Err(format!(
                "the ranks have executed different operations among the {executed} before this \
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
    executed: u64,
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
            executed: 0,
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
        self.executed += 1;
        if self.known.len() >= MOST_KNOWN {
            self.known.clear();
        }
        // It is known once the exchange, which this asks for, has not failed.
        self.known.insert(pair) || self.executed >= self.due
    }

    /// All ranks have executed the same so far.
    fn confirm(&mut self) {
        if self.executed >= self.due {
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            self.due = self.executed + self.pause;
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
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::engine::compare::exchange::{Numbers, Text};
    use crate::error::MpiError;

    const RANKS: usize = 3;

    /// Ranks that are threads: what each has said last, and how often they exchanged.
    struct Threads {
        barrier: Barrier,
        numbers: Mutex<Numbers>,
        texts: Mutex<Vec<Text>>,
        exchanges: Mutex<usize>,
    }

    struct OfRank(Arc<Threads>, usize);

    impl Exchange for OfRank {
        fn largest(&self, _: usize, own: Numbers) -> Result<Numbers, MpiError> {
            let threads = &self.0;
            if threads.barrier.wait().is_leader() {
                *threads.numbers.lock() = Numbers::default();
                *threads.exchanges.lock() += 1;
            }
            threads.barrier.wait();
            let mut numbers = threads.numbers.lock();
            for (number, own) in numbers.iter_mut().zip(own) {
                *number = own.max(*number);
            }
            drop(numbers);
            threads.barrier.wait();
            let numbers = *threads.numbers.lock();
            threads.barrier.wait();
            Ok(numbers)
        }

        fn texts(&self, _: usize, own: &Text) -> Result<Vec<Text>, MpiError> {
            self.0.texts.lock()[self.1] = *own;
            self.0.barrier.wait();
            let texts = self.0.texts.lock().clone();
            self.0.barrier.wait();
            Ok(texts)
        }
    }

    /// What each of the ranks hears that take these steps, and how often they exchanged.
    fn run(
        always: bool,
        steps: impl Fn(usize) -> Vec<(Step, String)> + Sync,
    ) -> (Vec<Vec<Result<(), String>>>, usize) {
        let threads = threads();
        let heard = each_rank(|rank| {
            let nodes = BetweenNodes::new(Box::new(OfRank(threads.clone(), rank)), 2, always);
            let taken = steps(rank).into_iter().map(|(step, words)| {
                let result = nodes.step(1, step, || None, |_| words.clone());
                result.map_err(|failure| failure.to_string())
            });
            taken.collect()
        });
        (heard, *threads.exchanges.lock())
    }

    fn threads() -> Arc<Threads> {
        Arc::new(Threads {
            barrier: Barrier::new(RANKS),
            numbers: Mutex::default(),
            texts: Mutex::new(vec![[0; TEXT]; RANKS]),
            exchanges: Mutex::default(),
        })
    }

    fn each_rank<T: Send>(run: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let run = &run;
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..RANKS)
                .map(|rank| scope.spawn(move || run(rank)))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn execute(what: u64) -> (Step, String) {
        (Step::Execute([what, 0, 0, 0]), format!("operation {what}"))
    }

    #[test]
    fn what_is_known_is_not_exchanged() {
        let loops = |_| (0..2000).map(|round| execute(round % 3)).collect();
        let (heard, exchanges) = run(false, loops);
        assert!(heard.iter().flatten().all(Result::is_ok));
        // The first, three pairs, and after 16, 48, 112, ... operations.
        assert_eq!(exchanges, 4 + 6);
        assert_eq!(run(true, loops).1, 2000);
    }

    #[test]
    fn all_hear_who_differs_and_may_go_on() {
        for always in [false, true] {
            let steps = |rank| [1, 2 + (rank == 1) as u64, 1, 1].map(execute).into();
            for heard in run(always, steps).0 {
                let [Ok(()), Err(text), Ok(()), Ok(())] = &heard[..] else {
                    panic!("{heard:?}");
                };
                let words = "Ranks 0,2: operation 2. Rank 1: operation 3.";
                assert!(text.contains(words), "{text}");
            }
        }
    }

    #[test]
    fn what_differed_long_ago_is_found() {
        // All pairs are known when the third rank takes another order.
        let order = |rank| match rank {
            2 => [1, 1, 2, 1, 1, 1, 2, 1],
            _ => [1, 1, 2, 1, 1, 2, 1, 1],
        };
        let steps = |rank| {
            let rest = std::iter::repeat_n(1, 8);
            order(rank).into_iter().chain(rest).map(execute).collect()
        };
        for heard in run(false, steps).0 {
            assert!(heard[..15].iter().all(Result::is_ok), "{heard:?}");
            let text = heard[15].clone().unwrap_err();
            assert!(text.contains("different operations among the 16"), "{text}");
        }
    }

    #[test]
    fn loops_of_other_lengths_are_found_at_their_first_operation() {
        let threads = threads();
        let heard = each_rank(|rank| {
            let nodes = BetweenNodes::new(Box::new(OfRank(threads.clone(), rank)), 1, true);
            let hash = 5 + (rank == 2) as u64;
            let sequence = |code| {
                move || {
                    Some(Sequence {
                        code,
                        hash,
                        first: None,
                    })
                }
            };
            let words = |_| format!("a loop that runs {hash} times");
            // Programs that differ have other codes, or none.
            for code in [rank as u64 + 1, 0] {
                nodes.step(0, execute(1).0, sequence(code), words).unwrap();
            }
            nodes.step(0, execute(1).0, sequence(7), words)
        });
        for text in heard.into_iter().map(|one| one.unwrap_err().to_string()) {
            let words = "Ranks 0-1: a loop that runs 5 times. Rank 2: a loop that runs 6 times";
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn what_all_refuse_is_no_difference() {
        let refuse = || Step::Refuse([7, 0, 0, 0], "too long".into());
        let steps = |_| vec![(refuse(), "bcast".into()), execute(1)];
        for heard in run(false, steps).0 {
            assert_eq!(heard, [Err("too long".to_string()), Ok(())]);
        }
        let steps = |rank| match rank {
            1 => vec![(refuse(), "bcast, which it refused: too long".into())],
            _ => vec![execute(7)],
        };
        let (heard, _) = run(true, steps);
        assert_eq!(heard[1], [Err("too long".to_string())]);
        let text = heard[0][0].clone().unwrap_err();
        assert!(text.contains("Rank 1: bcast, which it refused"), "{text}");
    }

    #[test]
    fn who_cannot_tell_the_others_closes_the_communicator() {
        // All know the operation, so nobody else exchanges anything for it.
        let steps = |rank| {
            let differ = (Step::Differ([1, 0, 0, 0], "differs".into()), String::new());
            let third = if rank == 1 { differ } else { execute(1) };
            vec![execute(1), execute(1), third, execute(1)]
        };
        let (heard, _) = run(false, steps);
        assert_eq!(heard[0], [Ok(()), Ok(()), Ok(()), Ok(())]);
        assert_eq!(heard[1][2], Err("differs".to_string()));
        let text = heard[1][3].clone().unwrap_err();
        assert!(text.contains("cannot be used"), "{text}");
    }
}
