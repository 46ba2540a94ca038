//! Collectives that the program has refused before it launched anything: the others may be waiting
//! in theirs. Nobody waits here: they are told once what was launched before is over.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

use mpi_shim_abi::Kind;
use parking_lot::Mutex;

use super::Comparison;
use crate::engine::compare::channel::Channel;
use crate::engine::compare::within_node::FIXED;
use crate::engine::order::Ticket;
use crate::node::board::Board;

/// How many of one communicator wait to be told; more are not told.
const MOST: usize = 4;

/// What is to be told once it is its turn.
#[derive(Default)]
pub(super) struct Unlaunched {
    list: Mutex<Vec<One>>,
    /// There are some.
    any: AtomicBool,
}

struct One {
    /// Number of its communicator.
    comm: usize,
    kind: Kind,
    words: String,
    /// Launches of the main thread that it came after, and that were in flight then.
    after: Vec<Ticket>,
}

impl Unlaunched {
    #[inline]
    pub(super) fn are_any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// Tells those whose turn it is, in their order, as far as `tell` can.
    fn tell(&self, is_turn: impl Fn(&One) -> bool, mut tell: impl FnMut(&One) -> bool) {
        let mut list = self.list.lock();
        let mut behind = [false; FIXED];
        list.retain(|one| {
            let told = !behind[one.comm] && is_turn(one) && tell(one);
            behind[one.comm] |= !told;
            !told
        });
        self.any.store(!list.is_empty(), Ordering::Relaxed);
    }
}

impl Comparison {
    /// The main thread has refused a collective on the communicator `comm`, in these words, and
    /// launches nothing for it. Those on communicators of the user are not told.
    pub(crate) fn refuse_unlaunched(&self, comm: i64, kind: Kind, words: &str) {
        let comm = usize::try_from(comm).unwrap_or(FIXED);
        // Those on other nodes would not see it.
        if self.nodes.is_some() || self.fixed.get(comm).is_none_or(Option::is_none) {
            return;
        }
        let launches = self.launches.lock();
        let by_main = launches.iter().filter(|(_, launch)| launch.by_main_thread);
        let one = One {
            comm,
            kind,
            words: words.to_owned(),
            after: by_main.map(|(ticket, _)| *ticket).collect(),
        };
        let mut list = self.unlaunched.list.lock();
        if list.iter().filter(|other| other.comm == comm).count() < MOST {
            list.push(one);
            self.unlaunched.any.store(true, Ordering::Relaxed);
        }
        drop((list, launches));
        self.tell_unlaunched();
    }

    /// Tells those with no launch in flight that was before them.
    pub(super) fn tell_unlaunched(&self) {
        let Some(board) = &self.board else {
            return;
        };
        // Held, so that none of the last launch is left over when that ends at the same time.
        let launches = self.launches.lock();
        let in_flight = |ticket: &Ticket| launches.iter().any(|(known, _)| known == ticket);
        self.unlaunched.tell(
            |one| !one.after.iter().any(in_flight),
            |one| {
                // An operation of another thread may hold the channel; it comes here in the end.
                let within = self.fixed[one.comm].as_ref();
                let channel = within.and_then(|within| within.channel.try_lock());
                let told = channel
                    .map(|mut channel| channel.refuse_unlaunched(board, one.kind, &one.words));
                told.is_some()
            },
        );
    }

    /// Tells those that come before an operation of the launch `ticket` on `comm`, which has that
    /// channel.
    #[cold]
    pub(super) fn tell_unlaunched_before(
        &self,
        ticket: Ticket,
        comm: i64,
        channel: &mut Channel,
        board: &Board,
    ) {
        let by_main_thread = self.is_by_main_thread(ticket);
        self.unlaunched.tell(
            |one| by_main_thread && one.comm as i64 == comm && !one.after.contains(&ticket),
            |one| {
                channel.refuse_unlaunched(board, one.kind, &one.words);
                true
            },
        );
    }
}
