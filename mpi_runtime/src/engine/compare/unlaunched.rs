//! Collectives that this rank does not come to: its program has refused them before it launched
//! anything, or a launch has failed before them. The others may be waiting in theirs. They are told
//! once what was launched before is over.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

use mpi_shim_abi::Kind;
use parking_lot::Mutex;

use super::{Comparison, KnownCollectives, Launch, START};
use crate::engine::compare::channel::Channel;
use crate::engine::compare::within_node::WithinNode;
use crate::engine::order::Ticket;
use crate::mpi::communicators::COLLECTIVES;
use crate::node::board::Board;

/// How many of one communicator wait to be told; more are not told.
const MOST: usize = 4;
/// Characters of an error that the others are told.
const LONGEST: usize = 300;

/// What is to be told once it is its turn.
#[derive(Default)]
pub(super) struct Unlaunched {
    list: Mutex<Vec<One>>,
    /// There are some.
    any: AtomicBool,
}

struct One {
    /// Number of its communicator.
    comm: i64,
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
        let mut behind = Vec::new();
        list.retain(|one| {
            let told = !behind.contains(&one.comm) && is_turn(one) && tell(one);
            if !told {
                behind.push(one.comm);
            }
            !told
        });
        self.any.store(!list.is_empty(), Ordering::Relaxed);
    }
}

impl Comparison {
    /// The main thread has refused a collective on the communicator `comm`, in these words, and
    /// launches nothing for it. On communicators of the user that have had no collective nobody is
    /// told: ranks number those by their first ones, which this might not be on the others.
    pub(crate) fn refuse_unlaunched(&self, comm: i64, kind: Kind, words: &str) {
        // Those on other nodes would not see it.
        if self.nodes.is_some() || self.within(comm, |_| ()).is_none() {
            return;
        }
        let launches = self.launches.lock();
        self.tell_later(comm, kind, words.to_owned(), &launches);
        drop(launches);
        self.tell_unlaunched();
    }

    /// What `look` finds of a communicator, if its ranks of this node are compared.
    fn within<T>(&self, comm: i64, look: impl FnOnce(&WithinNode) -> T) -> Option<T> {
        let fixed = usize::try_from(comm)
            .ok()
            .and_then(|comm| self.fixed.get(comm));
        match fixed {
            Some(fixed) => fixed.as_ref().map(look),
            None => self.users.known(comm)?.within.as_ref().map(look),
        }
    }

    /// The same of a launch, by its main thread, that is refused before it has a ticket.
    pub(crate) fn refuse_launch(&self, launch: &KnownCollectives, error: &str) {
        if let Some(kind) = self.kind_of(launch, 0) {
            self.refuse_unlaunched(launch.comm, kind, &words(launch, kind, error));
        }
    }

    /// The launch `ticket` has failed, maybe before its turn. If the other ranks may wait for its
    /// next collective, they are told, before anything that is launched behind it.
    pub(crate) fn launch_failed(&self, ticket: Ticket, error: &str) {
        let launches = self.launches.lock();
        let place = launches.iter().position(|(known, _)| *known == ticket);
        let (Some(board), Some(place)) = (&self.board, place) else {
            return;
        };
        let launch = launches[place].1;
        let (Some(known), true) = (launch.collectives, launch.by_main_thread) else {
            return;
        };
        let within = usize::try_from(known.comm).ok();
        let within = within.and_then(|comm| self.fixed.get(comm)?.as_ref());
        let Some(within) = within.filter(|_| self.nodes.is_none()) else {
            return;
        };
        let Some(kind) = self.kind_of(&known, within.come_so_far(ticket)) else {
            return;
        };
        let words = words(&known, kind, error);
        if launches[..place]
            .iter()
            .any(|(_, launch)| launch.by_main_thread)
        {
            self.tell_later(known.comm, kind, words, &launches[..place]);
            drop(launches);
            return self.tell_unlaunched();
        }
        drop(launches);
        let mut channel = within.channel.lock();
        if self.unlaunched.are_any() {
            self.tell_unlaunched_before(ticket, known.comm, &mut channel, board);
        }
        channel.refuse_of_launch(board, kind, &words);
    }

    /// Tells once the launches `before` have ended that the main thread has dispatched.
    fn tell_later(&self, comm: i64, kind: Kind, words: String, before: &[(Ticket, Launch)]) {
        let by_main = before.iter().filter(|(_, launch)| launch.by_main_thread);
        let one = One {
            comm,
            kind,
            words,
            after: by_main.map(|(ticket, _)| *ticket).collect(),
        };
        let mut list = self.unlaunched.list.lock();
        if list.iter().filter(|other| other.comm == comm).count() < MOST {
            list.push(one);
            self.unlaunched.any.store(true, Ordering::Relaxed);
        }
    }

    /// The kind of a launch's collective, by its place among them, if that is known.
    fn kind_of(&self, launch: &KnownCollectives, place: u32) -> Option<Kind> {
        if launch.comm == COLLECTIVES {
            return (place == 0).then_some(START);
        }
        let kinds = self.kinds.lock();
        kinds.get(&launch.sequence)?.get(place as usize).copied()
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
                let told = self.within(one.comm, |within| {
                    let channel = within.channel.try_lock();
                    channel
                        .map(|mut channel| channel.refuse_unlaunched(board, one.kind, &one.words))
                        .is_some()
                });
                // The user has freed it.
                told.unwrap_or(true)
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
            |one| by_main_thread && one.comm == comm && !one.after.contains(&ticket),
            |one| {
                channel.refuse_unlaunched(board, one.kind, &one.words);
                true
            },
        );
    }
}

/// What the others read of a launch that has failed; of its error the beginning.
fn words(launch: &KnownCollectives, kind: Kind, error: &str) -> String {
    let what = match launch.comm == COLLECTIVES {
        true => "the start of a program",
        false => kind.name(),
    };
    let first = error.lines().next().unwrap_or_default();
    let first: String = first.chars().take(LONGEST).collect();
    let program = launch.program;
    format!("{what}, before which its launch of {program} failed: {first}")
}
