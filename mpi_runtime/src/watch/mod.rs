//! The watch over a job: a thread of each rank that sees whether an operation waits for long, and
//! asks the others what they do. One rank says it for all: who waits for whom. A job
//! that can never go on is ended.

#![forbid(unsafe_code)]

pub mod coordinator;
mod nodes;
pub mod place;
mod report;
mod state;
mod stuck;

use std::sync::Arc;
use std::time::Duration;

use crate::engine::Progress;
use crate::engine::pending::{PendingTable, Waiting};
use crate::engine::recorder::RECORDER;
use crate::link::Link;
use crate::log;
use crate::node::board::Board;
use coordinator::Coordinator;
use nodes::{Nodes, Seen};
use state::{MOST_BACKGROUND, State, Wait};
use stuck::Known;

/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(100);
/// An operation that waits so long may do so in vain; asked again after growing times.
const SUSPICIOUS: Duration = Duration::from_secs(2);
/// The same once the other nodes were told that a rank has died.
const AT_ONCE: Duration = Duration::from_millis(300);
/// The time to the next question then: a receive from that rank fails before it.
const AFTER_ERROR: Duration = Duration::from_millis(1500);
/// The shortest and the longest time between questions.
const SOON: Duration = Duration::from_secs(1);
const SELDOM: Duration = Duration::from_secs(30);
/// Status of a job that was ended since it could never go on, or waited too long: `EDEADLK`.
pub const STATUS: i32 = 35;

/// What the watch needs.
pub struct Watch {
    /// The operations of this rank.
    pub pending: Arc<PendingTable>,
    /// The ranks of this node, if they share memory.
    pub board: Option<Arc<Board>>,
    /// To the other nodes, if there are any.
    pub(crate) link: Option<Arc<Link>>,
    /// Where JAX's coordinator is, and who wants it.
    pub coordinator: Arc<Coordinator>,
    /// In the world.
    pub rank: i32,
    /// Of the world.
    pub size: i32,
    /// `MPI_CUDA_WARN_AFTER`.
    pub warn_after: Duration,
    /// `MPI_CUDA_ABORT_AFTER`.
    pub abort_after: Option<Duration>,
    /// How far this rank is in comparing with other nodes.
    pub(crate) progress: Option<Arc<[Progress]>>,
    /// The messages that were started and have not ended.
    pub background: Box<dyn Fn() -> Vec<Waiting> + Send>,
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
    /// The time from that question to the next one.
    pause: Duration,
    /// How many ranks were known to have died.
    missing: usize,
    /// What the ranks told last.
    before: Vec<Known>,
    /// What was seen of the ranks.
    seen: Seen,
}

impl Watch {
    /// Starts the thread.
    pub fn start(self) {
        let mut memory = Memory {
            answered: 0,
            report_after: self.warn_after,
            ask_after: SUSPICIOUS,
            pause: SOON,
            missing: 0,
            before: Vec::new(),
            seen: Seen::default(),
        };
        let nodes = Nodes::new(
            self.board.clone(),
            self.link.clone(),
            self.rank as usize,
            self.size as usize,
        );
        // Without a thread nothing is watched, as without this library.
        let _ = std::thread::Builder::new()
            .name("mpi_cuda watch".into())
            .spawn(move || {
                let pause = LOOK.min(self.warn_after / 4).max(Duration::from_millis(20));
                loop {
                    std::thread::sleep(pause);
                    self.look(&nodes, &mut memory);
                }
            });
    }

    fn look(&self, nodes: &Nodes, memory: &mut Memory) {
        let own = self.pending.longest().unwrap_or_default();
        if let Some(board) = &self.board {
            board.show_waiting(own);
            let question = board.question();
            if question != memory.answered {
                memory.answered = question;
                board.answer(question, &self.state().encode());
            }
        }
        nodes.speak(own, &mut memory.seen, || self.state());
        self.coordinator.look();
        let longest = match nodes.examines() {
            true => nodes.longest(own),
            false => Duration::ZERO,
        };
        let missing = nodes.missing();
        let (suspicious, pause) = match missing {
            0 => (SUSPICIOUS, SOON),
            _ => (AT_ONCE, AFTER_ERROR),
        };
        let limit = self.abort_after.unwrap_or(self.warn_after);
        if longest < suspicious.min(self.warn_after).min(limit) {
            memory.report_after = self.warn_after;
            memory.ask_after = suspicious;
            memory.pause = pause;
            memory.before.clear();
            return;
        }
        if missing != memory.missing {
            memory.missing = missing;
            memory.ask_after = longest.min(memory.ask_after);
            memory.pause = pause;
        }
        self.examine(nodes, longest, memory);
    }

    fn examine(&self, nodes: &Nodes, longest: Duration, memory: &mut Memory) {
        let reports = longest >= memory.report_after;
        let too_long = self.abort_after.filter(|&limit| longest >= limit);
        if !reports && too_long.is_none() && longest < memory.ask_after {
            return;
        }
        let ranks = nodes.ask(|| self.state());
        // Twice the same: what was on its way has arrived.
        let verdict = match is_still(&memory.before, &ranks) && self.is_where(&ranks) {
            true => report::verdict(&ranks),
            false => None,
        };
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
        memory.ask_after = longest + memory.pause;
        memory.pause = (memory.pause * 2).min(SELDOM);
        memory.before = ranks;
    }

    /// Whether this rank has finished nothing since it has told what it does: others may have
    /// taken long to tell.
    fn is_where(&self, ranks: &[Known]) -> bool {
        match ranks.get(self.rank as usize) {
            Some(Known::Told(state)) => state.done == self.pending.waiting().1,
            _ => true,
        }
    }

    /// What this rank does.
    fn state(&self) -> State {
        // First, since Python may take long to answer, and an operation end meanwhile.
        let (place, may_launch) = place::place();
        let (waits, done) = self.pending.waiting();
        let begun = self.pending.begun();
        let progress = self.progress.iter().flat_map(|progress| progress.iter());
        let background = (self.background)();
        let untold = background.len() > MOST_BACKGROUND;
        State {
            done,
            compared: progress.map(|one| one.read().into()).collect(),
            // A thread of the program's that has launched nothing yet may do so.
            others: self.pending.threads() > 1 || may_launch || untold,
            waits: waits.into_iter().map(Wait::new).collect(),
            background: background.into_iter().map(Wait::new).collect(),
            begun: begun.counts,
            all_begun: begun.all,
            place,
        }
    }
}

/// Whether no rank has finished an operation, or begun another one, between two answers.
fn is_still(before: &[Known], now: &[Known]) -> bool {
    let same = |(one, other): (&Known, &Known)| match (one, other) {
        (Known::Told(one), Known::Told(other)) => {
            let words = |state: &State| -> Vec<String> {
                state.waits.iter().map(|wait| wait.words.clone()).collect()
            };
            one.done == other.done
                && one.compared == other.compared
                && one.background == other.background
                && words(one) == words(other)
        }
        (one, other) => one == other,
    };
    before.len() == now.len() && before.iter().zip(now).all(same)
}
