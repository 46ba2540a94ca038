//! The world: which MPI, who we are in it, and the engine over it.

mod agree;
mod child;
mod connect;
mod end;
mod environment;
mod finalized;
mod join;
pub mod library;
mod options;
mod output;
mod ping;
mod raw;
mod share;
mod starting;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::engine::recorder::{About, clock, file};
use crate::engine::{Engine, idle};
use crate::error::{MpiError, StartError};
use crate::link::Link;
use crate::log;
use crate::mpi::communicators::{Communicator, DEFAULT, NAMES};
use crate::mpi::family::Family;
use crate::mpi::launcher;
use crate::mpi::shim::{MpiState, Shim};
use crate::node::process;
use crate::node::results::Results;
use crate::node::shm_rings::ShmRings;
use crate::transfer::choice::{Choice, Mode};
use crate::watch::Watch;
use crate::watch::coordinator::Coordinator;
use agree::AllRanks;
use finalized::Finalizing;
use library::MpiLibrary;
pub use options::{DeviceOptions, WorldOptions};

/// This rank leaves its job.
static LEAVING: AtomicBool = AtomicBool::new(false);

/// The process runs what is to be run at its end.
static EXITING: AtomicBool = AtomicBool::new(false);

/// Notes that the process runs what is to be run at its end.
pub fn note_exit() {
    EXITING.store(true, Ordering::SeqCst);
}

/// This process's place among the ranks.
pub struct World {
    /// Rank in `COMM_WORLD`.
    pub rank: i32,
    /// Size of `COMM_WORLD`.
    pub size: i32,
    /// Number of lower ranks on this node.
    pub node_rank: i32,
    /// Number of ranks on this node.
    pub node_size: i32,
    /// Names the job: its start on the rank that came last, in nanoseconds since 1970.
    pub job: u64,
    /// MPI library and version, or "no MPI".
    pub library: String,
    /// MPI's thread level.
    pub thread_level: &'static str,
    /// How data in device memory travel; none where the host has them.
    pub transfer: Option<Choice>,
    /// There are more ranks than cores on some node.
    pub oversubscribed: bool,
    /// Memory shared by the ranks of this node, where they stage.
    pub shm_rings: Option<Arc<ShmRings>>,
    /// What the ranks of this node make for each other, where they share memory.
    pub results: Option<Results>,
    /// The engine.
    pub engine: Engine,
    /// Which file MPI is.
    pub mpi: Option<MpiLibrary>,
    /// Where JAX's coordinator is, and who wants it; none in a world without MPI.
    pub coordinator: Option<Arc<Coordinator>>,
    /// To the other nodes, if there are any.
    link: Option<Arc<Link>>,
    shim: Option<Shim>,
    /// We initialised MPI, so we finalize it.
    owns_mpi: bool,
}

/// Whether this process may join as a rank, as far as its environment says.
///
/// # Errors
/// If it is a child of one, or another process has joined as this rank.
pub fn refuse_children(singleton: bool) -> Result<(), StartError> {
    let launched = launcher::detect(|name| std::env::var(name).ok());
    child::refuse(launched.as_ref(), singleton)
}

impl World {
    /// Finds the MPI, joins its world, and duplicates the communicators we need. Collective.
    pub fn start(options: &WorldOptions) -> Result<World, StartError> {
        let launched = launcher::detect(|name| std::env::var(name).ok());
        let launched = launched.as_ref();
        child::refuse(launched, options.singleton)?;
        let loaded = library::load_shim(&options.library, launched, options.singleton)?;
        let Some((shim, mpi)) = loaded else {
            return Ok(Self::single_rank(options));
        };
        let _starting = starting::watch(launched, options);
        let joined = join::join(&shim, &mpi, options, launched)?;
        log::joined_as(joined.rank);
        let mut engine = Engine::new(Some(shim), joined.rank, options.engine());
        let ranks = AllRanks {
            shim: &shim,
            comm: join::duplicate(&shim, &joined, &engine.communicators)?,
        };
        let agreed = agree::agree(&ranks, options, &joined)?;
        shim.configure(agreed.oversubscribed, options.part_bytes, idle::idle);
        let shared = share::share_memory(&ranks, options, &agreed)?;
        engine.rendezvous = shared.rendezvous;
        let link = connect::connect(&ranks, shared.board.as_ref())?;
        let in_sight = shared.board.as_ref().map_or(1, |board| board.ranks());
        if let Some(board) = shared.board.clone() {
            if let Some(mailboxes) = shared.mailboxes {
                engine.share_messages(mailboxes, board.clone(), joined.size);
            }
            engine.share(board, joined.size, options.shm_collectives);
        }
        if in_sight != joined.size as usize {
            let by = join::duplicates_to_compare(&shim, &joined)?;
            engine.compare_between_nodes(by, options.check);
        }
        let coordinator = Coordinator::new(joined.rank, joined.size, &shared.board, &link);
        Watch {
            pending: engine.pending(),
            board: shared.board.clone(),
            link: link.clone(),
            coordinator: coordinator.clone(),
            rank: joined.rank,
            size: joined.size,
            warn_after: options.warn_after,
            abort_after: options.abort_after,
            progress: engine.progress(),
            background: Box::new(engine.started_in_background()),
            abort: Box::new(move |code| abort(Some(shim), code)),
        }
        .start();
        Finalizing::new(&joined, options, engine.pending(), shim, abort)
            .watch(shared.board.clone(), link.clone())?;
        idle::start(shim, shared.board, link.clone());
        child::mark(launched);
        let about = About {
            rank: joined.rank,
            size: joined.size,
            job: agreed.job,
            library: joined.library.clone(),
        };
        file::start(&about, options.record.as_ref());
        Ok(World {
            rank: joined.rank,
            size: joined.size,
            node_rank: agreed.node_rank,
            node_size: agreed.node_size,
            job: agreed.job,
            library: joined.library,
            thread_level: joined.thread_level,
            transfer: agreed.transfer,
            oversubscribed: agreed.oversubscribed,
            shm_rings: shared.shm_rings,
            results: shared.results,
            engine,
            link,
            coordinator: Some(coordinator),
            shim: Some(shim),
            mpi: Some(mpi),
            owns_mpi: joined.owns_mpi,
        })
    }

    /// The largest of the ranks' numbers; collective, and of nothing but memory of the host.
    ///
    /// # Errors
    /// If MPI fails.
    pub fn largest(&self, own: u64) -> Result<u64, MpiError> {
        match (&self.shim, self.engine.communicators.get(DEFAULT)) {
            (Some(shim), Some(comm)) => AllRanks { shim, comm }.largest(own),
            _ => Ok(own),
        }
    }

    /// A world of size 1 without MPI.
    fn single_rank(options: &WorldOptions) -> World {
        log::joined_as(0);
        let engine = Engine::new(None, 0, options.engine());
        let job = clock::first().wall;
        let about = About {
            rank: 0,
            size: 1,
            job,
            library: "no MPI".into(),
        };
        file::start(&about, options.record.as_ref());
        for (name, number) in NAMES {
            engine.communicators.add(
                number,
                Communicator {
                    name,
                    handle: 0,
                    user_handle: 0,
                    rank: 0,
                    size: 1,
                    members: &[],
                    largest_tag: 0,
                    freed: false,
                },
            );
        }
        World {
            rank: 0,
            size: 1,
            node_rank: 0,
            node_size: 1,
            job,
            library: "no MPI".into(),
            thread_level: "none",
            oversubscribed: false,
            shm_rings: None,
            results: None,
            transfer: options.device.as_ref().map(|_| Choice {
                mode: Mode::Staged,
                reason: "there is no MPI".into(),
            }),
            engine,
            link: None,
            coordinator: None,
            shim: None,
            mpi: None,
            owns_mpi: false,
        }
    }

    /// The MPI family in use.
    pub fn family(&self) -> Option<Family> {
        self.shim.map(|shim| shim.family)
    }

    /// Ends the whole job, once the launcher has read what this rank printed.
    pub fn abort(&self, code: i32) -> ! {
        abort(self.shim, code)
    }

    /// Waits for everything dispatched and, if we initialised MPI, finalizes it. Call once, last.
    pub fn shutdown(&self) {
        LEAVING.store(true, Ordering::SeqCst);
        self.finish();
        file::finish();
    }

    /// Whether this rank leaves the job, by [`World::shutdown`] or [`World::abort`].
    pub fn is_leaving(&self) -> bool {
        LEAVING.load(Ordering::SeqCst)
    }

    fn finish(&self) {
        self.engine.wait_idle();
        self.engine.leave();
        if let Some(link) = &self.link {
            link.leave();
        }
        let Some(shim) = &self.shim else { return };
        if shim.state() == MpiState::Running {
            self.engine.finish_started();
        }
        if self.owns_mpi && shim.state() == MpiState::Running {
            let finalized = shim.finalize();
            finalized::has_returned();
            // An error here has no one left to hear it but the user at the terminal.
            if let Err(error) = finalized {
                log::line(&format!("MPI_Finalize failed: {error}"));
            }
        }
    }
}

/// Ends this process while another thread of it joins the world. What is to be run at its end would
/// run beside `MPI_Init`, which may then fail, and end the process with a status of its own.
fn leave_while_joining(code: i32) -> ! {
    file::abort(code);
    output::wait_until_read();
    process::leave_at_once(code)
}

/// See [`World::abort`].
fn abort(shim: Option<Shim>, code: i32) -> ! {
    LEAVING.store(true, Ordering::SeqCst);
    file::abort(code);
    output::wait_until_read();
    // In the middle of MPI_Finalize, MPICH knows no communicator any more. The launcher ends the
    // job of a process that ends with an error.
    if let Some(shim) = shim
        && shim.state() == MpiState::Running
        && !finalized::has_begun()
    {
        shim.abort(code);
    }
    match EXITING.load(Ordering::SeqCst) {
        // The thread that ends the process may wait, and others cannot end it in order meanwhile.
        true => process::leave_at_once(code),
        false => std::process::exit(code),
    }
}
