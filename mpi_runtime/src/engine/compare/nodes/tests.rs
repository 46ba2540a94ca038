//! Ranks as threads, each on a node of its own.

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
