//! `MPI_Finalize`, whoever calls it: the rank executes nothing more then, and those that wait for
//! it hear so.

#![forbid(unsafe_code)]

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::engine::pending::PendingTable;
use crate::error::StartError;
use crate::link::Link;
use crate::log;
use crate::mpi::shim::Shim;
use crate::node::board::Board;

/// Whom a rank tells.
pub(super) struct Finalizing {
    pub(super) rank: i32,
    pub(super) board: Option<Arc<Board>>,
    pub(super) link: Option<Arc<Link>>,
    pub(super) pending: Arc<PendingTable>,
}

static FINALIZING: OnceLock<Finalizing> = OnceLock::new();
static BEGUN: AtomicBool = AtomicBool::new(false);

impl Finalizing {
    /// Notices `MPI_Finalize`, which begins with the attributes of `MPI_COMM_SELF` (MPI 4.0,
    /// section 11.2.4).
    pub(super) fn watch(self, shim: &Shim) -> Result<(), StartError> {
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
}

/// Whether somebody has called `MPI_Finalize`.
pub(super) fn has_begun() -> bool {
    BEGUN.load(Ordering::SeqCst)
}

extern "C" fn begins(_: i64) -> c_int {
    BEGUN.store(true, Ordering::SeqCst);
    if let Some(finalizing) = FINALIZING.get() {
        finalizing.tell();
    }
    0
}
