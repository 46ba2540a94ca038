//! Joining a world is collective: a rank that joins waits in MPI for those that have not begun, and
//! MPI says nothing of that. A thread says it, and ends the rank if that was asked for.

#![forbid(unsafe_code)]

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::log;
use crate::mpi::launcher::Launched;
use crate::watch::STATUS;
use crate::world::options::WorldOptions;

/// Says that this rank waits to join; no longer once it is dropped.
pub(super) struct Starting {
    #[expect(dead_code, reason = "held for its drop, which the thread notices")]
    joined: Sender<()>,
}

/// Starts the thread, in a job of several ranks.
pub(super) fn watch(launched: Option<&Launched>, options: &WorldOptions) -> Option<Starting> {
    let launched = launched.filter(|launched| launched.size > 1)?;
    let (ranks, launcher) = (launched.size, launched.launcher);
    let (warn_after, abort_after) = (options.warn_after, options.abort_after);
    let (joined, end) = mpsc::channel();
    // Without a thread nothing is said, as without this library.
    thread::Builder::new()
        .name("mpi_cuda start".into())
        .spawn(move || {
            let (start, mut next) = (Instant::now(), warn_after);
            loop {
                let until = abort_after.map_or(next, |last| last.min(next));
                let left = until.saturating_sub(start.elapsed());
                if end.recv_timeout(left) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let waited = start.elapsed();
                log::line(&waits(waited, ranks, launcher));
                if abort_after.is_some_and(|last| waited >= last) {
                    log::line("MPI_CUDA_ABORT_AFTER has passed: this rank ends");
                    super::leave_while_joining(STATUS);
                }
                next = waited * 2;
            }
        })
        .ok()?;
    Some(Starting { joined })
}

fn waits(waited: Duration, ranks: usize, launcher: &str) -> String {
    format!(
        "this rank has waited for {:.0} s to join the {ranks} ranks that {launcher} started, which \
         all of them do together: a rank joins when it first uses JAX or imports mpi4py. Look \
         whether one has ended before that, or does something else",
        waited.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_is_said_with_the_remedy() {
        let said = waits(Duration::from_secs(60), 4, "mpirun");
        assert!(said.contains("60 s") && said.contains("4 ranks that mpirun started"));
        assert!(said.contains("imports mpi4py"));
    }
}
