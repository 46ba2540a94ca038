//! The launches of an engine: their tickets, what waits for them, and their end.

#![forbid(unsafe_code)]

use std::time::Duration;

use mpi_shim_abi::Kind;

use super::Engine;
use super::compare::{KnownCollectives, Launch};
use super::order::{LaunchOrder, Ticket};
use crate::buffer::Buffer;
use crate::log;
use crate::mpi::communicators::{COLLECTIVES, Communicator};
use crate::operation::Operation;

impl Engine {
    /// Takes the ticket of what a host callback launches, if its own program has none: that program
    /// runs now, so it comes before everything that has not begun.
    pub fn issue_ticket_now(&self, order: LaunchOrder) -> Ticket {
        self.order.issue_first(order)
    }

    /// Takes the ticket of a new launch.
    pub fn issue_ticket(&self, order: LaunchOrder) -> Ticket {
        self.order.issue(order)
    }

    /// Notes what is known of the launch that has taken `ticket`, before it begins.
    pub fn note_launch(&self, ticket: Ticket, launch: Launch) {
        self.calls.comparison.note(ticket, launch);
    }

    /// Enters that this rank waits for something of its own, in words, until what this returns is
    /// dropped.
    pub fn enter_waiting<'a>(&'a self, words: &str) -> impl Sized + use<'a> {
        let barrier = Operation::new(Kind::Barrier, COLLECTIVES, Buffer::NONE, Buffer::NONE);
        let comm = Communicator {
            name: "the devices of this rank",
            handle: 0,
            user_handle: u64::MAX,
            rank: self.rank,
            size: 1,
            members: &[],
            largest_tag: 0,
            freed: false,
        };
        let pending = self.pending.enter_named(&barrier, &comm, words);
        // What it waits for needs no other rank.
        pending.calls_user();
        pending
    }

    /// The calling thread launches operations: of several such threads one may help another that
    /// waits.
    pub fn note_thread(&self) {
        self.pending.note_thread();
    }

    /// Says in words what the sequence of a [`UniformProgram`](super::UniformProgram) is; `code` is
    /// the same for those that differ only in how often their loops run.
    pub fn describe_sequence(&self, sequence: u64, code: u64, words: &str) {
        self.calls.comparison.describe(sequence, code, words);
    }

    /// The program has refused a collective on that communicator before it launched anything: tells
    /// the other ranks, which may wait in theirs, and waits for nobody. From the main thread.
    pub fn refuse_unlaunched(&self, comm: i64, kind: Kind, words: &str) {
        self.calls.comparison.refuse_unlaunched(comm, kind, words);
    }

    /// Says of which kinds the first collectives of a sequence are, in its order.
    pub fn know_kinds(&self, sequence: u64, kinds: &[Kind]) {
        self.calls.comparison.know_kinds(sequence, kinds);
    }

    /// The main thread's launch was refused before it had a ticket: tells the other ranks, as
    /// [`Engine::refuse_unlaunched`] does.
    pub fn refuse_launch(&self, launch: &KnownCollectives, error: &str) {
        self.calls.comparison.refuse_launch(launch, error);
    }

    /// A launch has failed, and is about to be retired: tells the other ranks, if they may wait for
    /// a collective that it has not come to.
    pub fn launch_failed(&self, ticket: Ticket, error: &str) {
        // It may have arrived, and will not come to what the others wait for.
        self.withdraw();
        self.calls.comparison.launch_failed(ticket, error);
    }

    /// Waits until every earlier launch of other threads that this one is ordered with has ended.
    pub fn wait_for_other_threads(&self, ticket: Ticket) {
        self.order.wait_for_other_threads(ticket);
    }

    /// Waits until it is the launch's turn.
    pub fn wait_turn(&self, ticket: Ticket) {
        self.order.wait_turn(ticket);
    }

    /// Whether a launch of another thread is in flight that one like this would be ordered with.
    pub fn has_other_threads(&self, order: &LaunchOrder) -> bool {
        self.order.has_other_threads(order)
    }

    /// Ends a launch; without this, later launches wait forever.
    pub fn retire(&self, ticket: Ticket) {
        self.calls.comparison.forget(ticket);
        self.order.retire(ticket);
        // Nobody else has used these communicators.
        for comm in self.freed_comms.let_go(ticket) {
            self.calls.comparison.free(comm.number);
            self.calls.nonblocking.free(comm.handle);
            if let Some(shim) = &self.calls.shim
                && shim.comm_is_kept(comm.handle, comm.number)
                && let Err(error) = shim.comm_free(comm.handle)
            {
                log::line(&format!(
                    "cannot free communicator {}: {error}",
                    comm.number
                ));
            }
        }
    }

    /// Waits until the launches dispatched so far have ended.
    pub fn wait_idle(&self) {
        self.order.wait_idle();
    }

    /// The operations that have waited longer than that, in words.
    pub(crate) fn waiting_longer_than(&self, age: Duration) -> Vec<String> {
        self.pending.longer_than(age)
    }

    /// Waits until a launch has ended.
    pub fn wait_launch(&self, ticket: Ticket) {
        self.order.wait_launch(ticket);
    }

    /// Number of launches that have not ended.
    pub fn in_flight(&self) -> usize {
        self.order.in_flight()
    }

    /// The number of the order of the thread that has launched what has this ticket.
    pub fn thread(&self, ticket: Ticket) -> Option<u32> {
        self.order.thread(ticket)
    }
}
