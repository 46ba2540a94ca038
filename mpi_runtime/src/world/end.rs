//! A rank that has come to its end waits for what it has launched, but not for ever: a peer that
//! will never answer must not keep the job.

#![forbid(unsafe_code)]

use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

use crate::engine::recorder::RECORDER;
use crate::log;
use crate::world::World;

/// How often it is looked what still waits.
const LOOK: Duration = Duration::from_millis(200);

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
                    waiting.join("; and in "),
                ));
                RECORDER.why(b"MPI_CUDA_EXIT_TIMEOUT has passed");
                self.abort(1);
            }
        }
    }
}
