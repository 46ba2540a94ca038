//! The watch over a job: a thread of each rank that sees whether an operation waits for long, and
//! asks the others of its node what they do. One rank says it for all: who waits for whom. A job
//! that can never go on is ended.

#![forbid(unsafe_code)]

pub mod place;
mod report;
mod state;
mod stuck;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::pending::PendingTable;
use crate::engine::recorder::RECORDER;
use crate::log;
use crate::node::board::Board;
use state::{State, Wait};
use stuck::Known;

/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(100);
/// How long ranks may take to tell what they do.
const ANSWER: Duration = Duration::from_millis(1500);
/// An operation that waits so long may do so in vain; asked again after growing times.
const SUSPICIOUS: Duration = Duration::from_secs(2);
/// The longest time between questions.
const SELDOM: Duration = Duration::from_secs(30);
/// Status of a job that was ended since it could never go on, or waited too long: `EDEADLK`.
pub const STATUS: i32 = 35;

/// What the watch needs.
pub struct Watch {
    /// The operations of this rank.
    pub pending: Arc<PendingTable>,
    /// The ranks of this node, if they share memory.
    pub board: Option<Arc<Board>>,
    /// In the world.
    pub rank: i32,
    /// Of the world.
    pub size: i32,
    /// `MPI_CUDA_WARN_AFTER`.
    pub warn_after: Duration,
    /// `MPI_CUDA_ABORT_AFTER`.
    pub abort_after: Option<Duration>,
    /// Whether messages are being sent that no operation waits for.
    pub sends: Box<dyn Fn() -> bool + Send>,
    /// Ends the job with a status.
    pub abort: Box<dyn Fn(i32) + Send>,
}

/// What the thread remembers.
struct Memory {
    /// The question that this rank has answered last.
    answered: u64,
    /// The next report, if an operation waits so long.
    report_after: Duration,
    /// The next question whether the job can go on.
    ask_after: Duration,
    /// What the ranks told last.
    before: Vec<Known>,
}

impl Watch {
    /// Starts the thread.
    pub fn start(self) {
        let mut memory = Memory {
            answered: 0,
            report_after: self.warn_after,
            ask_after: SUSPICIOUS,
            before: Vec::new(),
        };
        // Without a thread nothing is watched, as without this library.
        let _ = std::thread::Builder::new()
            .name("mpi_cuda watch".into())
            .spawn(move || {
                let pause = LOOK.min(self.warn_after / 4).max(Duration::from_millis(20));
                loop {
                    std::thread::sleep(pause);
                    self.look(&mut memory);
                }
            });
    }

    fn look(&self, memory: &mut Memory) {
        let own = self.pending.longest();
        if let Some(board) = &self.board {
            board.show_waiting(own.unwrap_or_default());
            let question = board.question();
            if question != memory.answered {
                memory.answered = question;
                board.answer(question, &self.state().encode());
            }
        }
        let longest = self.longest(own.unwrap_or_default());
        if longest < SUSPICIOUS.min(self.warn_after) {
            memory.report_after = self.warn_after;
            memory.ask_after = SUSPICIOUS;
            memory.before.clear();
            return;
        }
        if self.is_first() {
            self.examine(longest, memory);
        }
    }

    /// Whether this is the rank that asks: the lowest of its node that runs.
    fn is_first(&self) -> bool {
        let lower = 0..self.rank as usize;
        let Some(board) = &self.board else {
            return true;
        };
        lower
            .into_iter()
            .all(|rank| !board.sees(rank) || board.gone(rank).is_some())
    }

    /// How long the operation has waited that has waited longest, of all ranks of the node.
    fn longest(&self, own: Duration) -> Duration {
        let Some(board) = &self.board else { return own };
        let seen = (0..self.size as usize).filter(|&rank| board.sees(rank));
        let running = seen.filter(|&rank| board.gone(rank).is_none());
        running
            .map(|rank| board.waiting(rank))
            .max()
            .unwrap_or_default()
            .max(own)
    }

    fn examine(&self, longest: Duration, memory: &mut Memory) {
        let reports = longest >= memory.report_after;
        if !reports && longest < memory.ask_after {
            return;
        }
        let ranks = self.ask();
        // Twice the same: what was on its way has arrived.
        let verdict = match is_still(&memory.before, &ranks) {
            true => report::verdict(&ranks),
            false => None,
        };
        let too_long = self.abort_after.filter(|&limit| longest >= limit);
        let seconds = longest.as_secs();
        if let Some(verdict) = &verdict {
            let lines = report::lines(&ranks);
            log::line(&format!(
                "this job cannot go on, and ends: {verdict}. What the ranks do:{lines}"
            ));
        } else if let Some(limit) = too_long {
            let lines = report::lines(&ranks);
            let limit = limit.as_secs_f64();
            log::line(&format!(
                "an operation has waited for {seconds} s, and MPI_CUDA_ABORT_AFTER is {limit}: the \
                 job ends. What the ranks do:{lines}"
            ));
        } else if reports {
            let lines = report::lines(&ranks);
            log::line(&format!(
                "an operation has waited for {seconds} s. What the ranks do:{lines}"
            ));
            memory.report_after = (longest * 2).max(memory.report_after * 2);
        }
        if verdict.is_some() || too_long.is_some() {
            let why = verdict.unwrap_or_else(|| "MPI_CUDA_ABORT_AFTER has passed".into());
            RECORDER.why(why.as_bytes());
            (self.abort)(STATUS);
        }
        memory.ask_after = longest + (longest / 2).clamp(Duration::from_secs(1), SELDOM);
        memory.before = ranks;
    }

    /// What this rank does.
    fn state(&self) -> State {
        let (waits, done) = self.pending.waiting();
        State {
            done,
            others: self.pending.threads() > 1 || (self.sends)(),
            waits: waits.into_iter().map(Wait::new).collect(),
            place: place::place(),
        }
    }

    /// What all ranks do, as far as they tell.
    fn ask(&self) -> Vec<Known> {
        let Some(board) = &self.board else {
            let mut ranks = vec![Known::Nothing; self.size as usize];
            ranks[self.rank as usize] = Known::Told(self.state());
            return ranks;
        };
        let question = board.ask();
        let own = self.state();
        let deadline = Instant::now() + ANSWER;
        (0..self.size as usize)
            .map(|rank| match rank == self.rank as usize {
                true => Known::Told(own.clone()),
                false => told(board, rank, question, deadline),
            })
            .collect()
    }
}

fn told(board: &Board, rank: usize, question: u64, deadline: Instant) -> Known {
    if !board.sees(rank) {
        return Known::Nothing;
    }
    loop {
        if let Some(gone) = board.gone(rank) {
            return Known::Ended(gone.to_string());
        }
        if let Some(text) = board.answered(rank, question) {
            return State::decode(&text).map_or(Known::Nothing, Known::Told);
        }
        if Instant::now() > deadline {
            return Known::Nothing;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether no rank has finished an operation, or begun another one, between two answers.
fn is_still(before: &[Known], now: &[Known]) -> bool {
    let same = |(one, other): (&Known, &Known)| match (one, other) {
        (Known::Told(one), Known::Told(other)) => {
            let words = |state: &State| -> Vec<String> {
                state.waits.iter().map(|wait| wait.words.clone()).collect()
            };
            one.done == other.done && words(one) == words(other)
        }
        (one, other) => one == other,
    };
    before.len() == now.len() && before.iter().zip(now).all(same)
}
