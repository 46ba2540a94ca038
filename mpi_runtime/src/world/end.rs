//! A rank that has come to its end waits for what it has launched, but not for ever: a peer that
//! will never answer must not keep the job. Nor must a rank that has failed keep its peers, when a
//! thread of it goes on.

#![forbid(unsafe_code)]

use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

use crate::engine::recorder::{RECORDER, file};
use crate::log;
use crate::world::World;

/// How often it is looked what still waits.
const LOOK: Duration = Duration::from_millis(200);
/// How many operations are named.
const NAMED: usize = 8;
/// How long other ranks may wait for a rank whose main thread has failed.
const NEEDED: Duration = Duration::from_secs(5);

impl World {
    /// This rank has come to its end: if an operation of it waits longer than `limit` from now on,
    /// says which, and ends the job. Later calls change nothing.
    pub fn watch_end(&'static self, limit: Option<Duration>) {
        static ONCE: Once = Once::new();
        let Some(limit) = limit else { return };
        ONCE.call_once(|| {
            let end = Instant::now();
            // Without a thread there is no limit.
            let _ = thread::Builder::new()
                .name("mpi_cuda end".into())
                .spawn(move || self.limit_waiting(end, limit));
        });
    }

    /// The main thread of this rank has failed, so the job fails, but other threads of it may be
    /// needed: ends the job once other ranks have waited for 5 seconds. Later calls change
    /// nothing.
    pub fn main_thread_failed(&'static self, code: i32, why: String) {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            let _ = thread::Builder::new()
                .name("mpi_cuda failed".into())
                .spawn(move || self.end_when_awaited(code, &why));
        });
    }

    fn end_when_awaited(&self, code: i32, why: &str) {
        let mut since = None;
        loop {
            thread::sleep(LOOK);
            if !self.engine.is_awaited() {
                since = None;
                continue;
            }
            if since.get_or_insert_with(Instant::now).elapsed() >= NEEDED {
                log::line(&format!(
                    "the main thread of rank {} has failed with {why}, and other ranks have waited \
                     for {} s: the job ends, though other threads of it go on",
                    self.rank,
                    NEEDED.as_secs()
                ));
                file::failed(code, why.as_bytes());
                self.abort(code);
            }
        }
    }

    fn limit_waiting(&self, end: Instant, limit: Duration) {
        loop {
            thread::sleep(LOOK.min(limit));
            if end.elapsed() < limit {
                continue;
            }
            let waiting = self.engine.waiting_longer_than(limit);
            if !waiting.is_empty() {
                log::line(&format!(
                    "rank {} has come to its end and has waited longer than {} s for other ranks, \
                     in {}: the job ends. MPI_CUDA_EXIT_TIMEOUT sets how long a rank waits then \
                     (0: for ever)",
                    self.rank,
                    limit.as_secs_f64(),
                    words(&waiting),
                ));
                RECORDER.why(b"MPI_CUDA_EXIT_TIMEOUT has passed");
                self.abort(1);
            }
        }
    }
}

/// What waits, of which there may be hundreds.
fn words(waiting: &[String]) -> String {
    let named = waiting.len().min(NAMED);
    let mut words = waiting[..named].join("; and in ");
    if named < waiting.len() {
        words += &format!("; and in {} more", waiting.len() - named);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_name_a_few_operations_and_count_the_others() {
        let waiting = |count: usize| -> Vec<String> {
            (0..count).map(|number| format!("send {number}")).collect()
        };
        assert_eq!(words(&waiting(2)), "send 0; and in send 1");
        assert!(words(&waiting(8)).ends_with("; and in send 7"));
        assert!(words(&waiting(10)).ends_with("; and in send 7; and in 2 more"));
    }
}
