//! `MPI_Finalize`, whoever calls it: the rank executes nothing more then, and those that wait for
//! it hear so.

#![forbid(unsafe_code)]

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use crate::engine::pending::PendingTable;
use crate::engine::recorder::RECORDER;
use crate::error::StartError;
use crate::link::Link;
use crate::log;
use crate::mpi::shim::{MpiState, Shim};
use crate::node::board::Board;
use crate::watch;
use crate::world::join::Joined;
use crate::world::options::WorldOptions;

/// Ends the job with a status.
type Abort = fn(Option<Shim>, i32) -> !;

/// Whom a rank tells, and what it looks at.
pub(super) struct Finalizing {
    rank: i32,
    /// Of the world.
    size: i32,
    board: Option<Arc<Board>>,
    link: Option<Arc<Link>>,
    pending: Arc<PendingTable>,
    warn_after: Duration,
    abort_after: Option<Duration>,
    /// We call it, and nobody else.
    owns_mpi: bool,
    shim: Shim,
    abort: Abort,
}

static FINALIZING: OnceLock<Finalizing> = OnceLock::new();
/// When it has begun.
static BEGUN: OnceLock<Instant> = OnceLock::new();
static RETURNED: AtomicBool = AtomicBool::new(false);
/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(200);

impl Finalizing {
    pub(super) fn new(
        joined: &Joined,
        options: &WorldOptions,
        pending: Arc<PendingTable>,
        shim: Shim,
        abort: Abort,
    ) -> Finalizing {
        Finalizing {
            rank: joined.rank,
            size: joined.size,
            board: None,
            link: None,
            pending,
            warn_after: options.warn_after,
            abort_after: options.abort_after,
            owns_mpi: joined.owns_mpi,
            shim,
            abort,
        }
    }

    /// Notices `MPI_Finalize`, which begins with the attributes of `MPI_COMM_SELF` (MPI 4.0,
    /// section 11.2.4).
    pub(super) fn watch(
        mut self,
        board: Option<Arc<Board>>,
        link: Option<Arc<Link>>,
    ) -> Result<(), StartError> {
        (self.board, self.link) = (board, link);
        let shim = self.shim;
        // Only the first counts: there is one world.
        let _ = FINALIZING.set(self);
        let watched = shim.comm_watch(shim.comm_self(), 0, begins);
        watched.map_err(|error| StartError::Mpi {
            call: "MPI_Comm_set_attr",
            error,
        })
    }

    fn tell(&self) {
        for waiting in self.pending.longer_than(Duration::ZERO) {
            log::line(&format!(
                "rank {} has called MPI_Finalize while it waits in {waiting}; wait for the results \
                 of all operations first",
                self.rank
            ));
        }
        if let Some(board) = &self.board {
            board.finalize();
        }
        if let Some(link) = &self.link {
            link.leave();
        }
    }

    /// Whether the program of a rank has ended.
    fn has_ended(&self, rank: usize) -> bool {
        let here = self.board.as_ref().filter(|board| board.sees(rank));
        match (here, &self.link) {
            (Some(board), _) => board.gone(rank).is_some(),
            (None, Some(link)) => link.gone(rank).is_some(),
            (None, None) => false,
        }
    }

    /// Whether it still runs. Open MPI says that it has ended while it waits for others, so of one
    /// that we have called we ask ourselves.
    fn runs(&self) -> bool {
        !RETURNED.load(Ordering::SeqCst)
            && (self.owns_mpi || self.shim.state() == MpiState::Running)
    }

    /// Says once that it does not end, though no other rank does anything any more.
    fn say_when_stuck(&self, since: Instant) {
        let mut said = false;
        let others = || (0..self.size).filter(|&rank| rank != self.rank);
        while self.runs() {
            thread::sleep(LOOK);
            let time = since.elapsed();
            let ends = self.abort_after.is_some_and(|limit| time >= limit);
            if !ends && (said || time < self.warn_after) {
                continue;
            }
            if !others().all(|rank| self.has_ended(rank as usize)) || !self.runs() {
                continue;
            }
            let end = match ends {
                true => ". MPI_CUDA_ABORT_AFTER has passed: the job ends",
                false => "",
            };
            log::line(&format!(
                "rank {} has waited in MPI_Finalize for {} s, though the programs of all ranks \
                 have ended: the MPI waits, or an exit handler of another rank's program{end}",
                self.rank,
                time.as_secs(),
            ));
            if ends {
                RECORDER.why(b"MPI_CUDA_ABORT_AFTER has passed in MPI_Finalize");
                (self.abort)(Some(self.shim), watch::STATUS);
            }
            said = true;
        }
    }
}

/// `MPI_Finalize`, which we have called, has returned.
pub(super) fn has_returned() {
    RETURNED.store(true, Ordering::SeqCst);
}

/// Whether somebody has called `MPI_Finalize`.
pub(super) fn has_begun() -> bool {
    BEGUN.get().is_some()
}

extern "C" fn begins(_: i64) -> c_int {
    let since = *BEGUN.get_or_init(Instant::now);
    if let Some(finalizing) = FINALIZING.get() {
        finalizing.tell();
        // Without a thread nothing is said.
        let _ = thread::Builder::new()
            .name("mpi_cuda finalize".into())
            .spawn(move || finalizing.say_when_stuck(since));
    }
    0
}
