//! Where this process is when no operation of it waits: in a compilation, or in Python.

#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Says where the program's threads are.
pub type Where = fn() -> Option<Threads>;

/// What the program says of its threads.
#[derive(Clone, Debug, PartialEq)]
pub struct Threads {
    /// Where they are, in words.
    pub words: String,
    /// How many there are beside the main one.
    pub others: usize,
}

static WHERE: Mutex<Option<Where>> = Mutex::new(None);
static ACTIVITIES: Mutex<Vec<(u64, String, Instant)>> = Mutex::new(Vec::new());

/// How long the program may take to answer.
const LIMIT: Duration = Duration::from_secs(1);

/// Says how to ask the program where it is.
pub fn set_where(function: Option<Where>) {
    *WHERE.lock().unwrap_or_else(|locked| locked.into_inner()) = function;
}

/// Something long that this process does, until it is dropped.
pub struct Activity(u64);

/// Notes that this process is in something that may take long, in words.
pub fn enter(words: String) -> Activity {
    let mut all = ACTIVITIES
        .lock()
        .unwrap_or_else(|locked| locked.into_inner());
    let number = all.last().map_or(1, |last| last.0 + 1);
    all.push((number, words, Instant::now()));
    Activity(number)
}

impl Drop for Activity {
    fn drop(&mut self) {
        let mut all = ACTIVITIES
            .lock()
            .unwrap_or_else(|locked| locked.into_inner());
        all.retain(|row| row.0 != self.0);
    }
}

/// Where this process is, in words, and whether a thread of the program's other than the main one
/// may launch something.
pub(super) fn place() -> (String, bool) {
    let mut words = Vec::new();
    for (_, what, since) in &*ACTIVITIES
        .lock()
        .unwrap_or_else(|locked| locked.into_inner())
    {
        words.push(format!(
            "in {what} for {:.0} s",
            since.elapsed().as_secs_f64()
        ));
    }
    let function = *WHERE.lock().unwrap_or_else(|locked| locked.into_inner());
    let mut others = false;
    if let Some(function) = function {
        let (place, may_launch) = threads(ask(function));
        words.push(place);
        others = may_launch;
    }
    (words.join("; "), others)
}

/// What an answer of the program's means.
fn threads(answer: Option<Threads>) -> (String, bool) {
    match answer {
        Some(Threads { words, others }) => (format!("in Python: {words}"), others > 0),
        // Who holds Python's lock is a thread that waits in no operation.
        None => {
            let words = "in Python, which does not answer: native code holds its lock";
            (words.into(), true)
        }
    }
}

/// Asks on a thread of its own, since Python may be busy for long.
fn ask(function: Where) -> Option<Threads> {
    let (answer, answered) = mpsc::channel();
    let asking = std::thread::Builder::new().name("mpi_cuda where".into());
    asking.spawn(move || answer.send(function())).ok()?;
    answered.recv_timeout(LIMIT).ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_does_is_told_until_it_ends() {
        let activity = enter("a compilation of step".into());
        assert!(place().0.contains("in a compilation of step for 0 s"));
        let said = |others| {
            let words = "train.py:3".into();
            Some(Threads { words, others })
        };
        for (others, may_launch) in [(0, false), (2, true)] {
            let (words, others) = threads(said(others));
            assert_eq!(
                (words.as_str(), others),
                ("in Python: train.py:3", may_launch)
            );
        }
        assert!(threads(None).1);
        drop(activity);
        assert_eq!(place(), (String::new(), false));
    }
}
