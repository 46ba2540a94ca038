//! Collectives that the ranks of a node execute in memory that they share, and not through MPI.
//!
//! Which those are depends on nothing but what all ranks of the communicator know alike: what the
//! collective is, how long it is, and whether they have such memory, on which they agree at the
//! first one. In a world of several nodes there are none: who waits for such memory calls MPI more
//! seldom than MPI itself does, which may still have messages to send to another node.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use mpi_shim_abi::Kind;
use parking_lot::{Mutex, RwLock};

use crate::error::MpiError;
use crate::mpi::communicators::{Communicator, NAMES, is_users};
use crate::mpi::shim::Shim;
use crate::node::board::Board;
use crate::node::combine::Combine;
use crate::node::segment::new_number;
use crate::node::shm_collective::{Collective, MOST_RANKS, ShmCollective, Who};
use crate::operation::Operation;

/// How many communicators have memory of their own; the others use MPI. With 16 ranks one has 17
/// MiB.
const MOST: usize = 16;
/// Bytes up to which each rank reduces the whole array for itself, by the number of ranks from 2
/// on; the last is also that of more ranks (docs/measurements.md, "Collectives on one node").
const WHOLE: [usize; 4] = [64 << 10, 32 << 10, 16 << 10, 4 << 10];

/// The memory of a communicator; none if its ranks have agreed that there is none.
type Memory = Option<Arc<ShmCollective>>;

/// Where a communicator has its memory.
#[derive(Default)]
struct Place {
    memory: OnceLock<Memory>,
    /// A thread makes it: what another one does on this communicator comes later.
    making: Mutex<()>,
}

/// The communicators whose ranks share memory for collectives.
#[derive(Default)]
pub(super) struct OnNode {
    /// None if everything goes through MPI.
    board: Option<Arc<Board>>,
    /// Those that always exist, by number.
    fixed: [Place; NAMES.len()],
    /// Those of replica groups.
    groups: RwLock<BTreeMap<i64, Arc<Place>>>,
    /// How many have memory.
    made: AtomicUsize,
}

impl OnNode {
    /// Over the ranks that this one shares a board with.
    pub(super) fn over(board: Arc<Board>) -> OnNode {
        OnNode {
            board: Some(board),
            ..OnNode::default()
        }
    }

    /// What `op`, which was checked, is in shared memory, if it may go through that.
    #[inline]
    pub(super) fn way(&self, op: &Operation<'_>, comm: &Communicator) -> Option<Collective> {
        let board = self.board.as_ref()?;
        let size = usize::try_from(comm.size).ok()?;
        if is_users(op.comm) || !(2..=MOST_RANKS).contains(&size) {
            return None;
        }
        let what = collective(op, size)?;
        are_all_here(board, comm).then_some(what)
    }

    /// The memory of `comm`, whose number is `number`; at its first use its ranks make it, or agree
    /// that they have none. Collective.
    ///
    /// # Errors
    /// If MPI fails.
    #[inline]
    pub(super) fn memory(
        &self,
        shim: &Shim,
        number: i64,
        comm: &Communicator,
    ) -> Result<Memory, MpiError> {
        match self.fixed(number) {
            Some(place) => self.memory_at(place, shim, comm),
            None => {
                let known = self.groups.read().get(&number).cloned();
                let place =
                    known.unwrap_or_else(|| self.groups.write().entry(number).or_default().clone());
                self.memory_at(&place, shim, comm)
            }
        }
    }

    #[inline]
    fn memory_at(
        &self,
        place: &Place,
        shim: &Shim,
        comm: &Communicator,
    ) -> Result<Memory, MpiError> {
        if let Some(known) = place.memory.get() {
            return Ok(known.clone());
        }
        let _making = place.making.lock();
        if let Some(known) = place.memory.get() {
            return Ok(known.clone());
        }
        let made = self.make(shim, comm)?.map(Arc::new);
        Ok(place.memory.get_or_init(|| made).clone())
    }

    /// Whether `op`, which was executed, has gone through shared memory.
    pub(super) fn serves(&self, op: &Operation<'_>, comm: &Communicator) -> bool {
        let known = match self.fixed(op.comm) {
            Some(place) => place.memory.get().cloned(),
            None => {
                let groups = self.groups.read();
                let place = groups.get(&op.comm);
                place.and_then(|place| place.memory.get().cloned())
            }
        };
        self.way(op, comm).is_some() && known.flatten().is_some()
    }

    #[inline]
    fn fixed(&self, number: i64) -> Option<&Place> {
        self.fixed.get(usize::try_from(number).ok()?)
    }

    #[cold]
    fn make(&self, shim: &Shim, comm: &Communicator) -> Result<Option<ShmCollective>, MpiError> {
        let (rank, size) = (comm.rank as usize, comm.size as usize);
        let largest = |own: u64| {
            let mut largest = [0];
            shim.largest(comm.handle, &[own], &mut largest)?;
            Ok(largest[0])
        };
        let room = self.made.load(Ordering::Relaxed) < MOST;
        let first = (rank == 0 && room).then(|| {
            let number = new_number();
            (number, ShmCollective::create(number, size).ok())
        });
        let number = match &first {
            Some((number, Some(_))) => *number,
            _ => 0,
        };
        let number = largest(number)?;
        let made = match first {
            Some((_, made)) => made,
            None if number != 0 && room => ShmCollective::open(number, rank, size).ok(),
            None => None,
        };
        let failed = largest(u64::from(made.is_none()))? != 0;
        if let Some(made) = &made {
            made.unlink();
        }
        let made = made.filter(|_| !failed);
        self.made
            .fetch_add(usize::from(made.is_some()), Ordering::Relaxed);
        Ok(made)
    }
}

/// What `op` is, if it can go through shared memory and is not slower there.
#[inline]
fn collective(op: &Operation<'_>, size: usize) -> Option<Collective> {
    use Who::{All, AllBut, One};
    let root = op.root as usize;
    let (send, recv) = (op.send.bytes(), op.recv.bytes());
    let (givers, takers, divided, length) = match op.kind {
        Kind::Allgather => (All, All, false, send),
        Kind::Allreduce => (All, All, false, send),
        Kind::Alltoall => (All, All, true, send / size),
        Kind::Barrier => (All, All, false, 0),
        Kind::Bcast => (One(root), AllBut(root), false, send),
        Kind::Gather | Kind::Reduce => (All, One(root), false, send),
        Kind::ReduceScatter => (All, All, true, recv),
        Kind::Scatter => (One(root), All, true, recv),
        _ => return None,
    };
    if length == 0 && op.kind != Kind::Barrier || !is_faster(op.kind, length, size) {
        return None;
    }
    let combine = match op.kind.reduces() {
        true => Some(Combine::of(op.reduction?, op.send.dtype().datatype()?)?),
        false => None,
    };
    Some(Collective {
        givers,
        takers,
        divided,
        length,
        combine,
        in_slices: combine.is_some() && !divided && length > WHOLE[(size - 2).min(WHOLE.len() - 1)],
    })
}

/// Whether a collective of `size` ranks is no slower through shared memory, where one rank gives
/// another `length` bytes. So it was under Open MPI and MPICH both, to a few percent
/// (docs/measurements.md, "Collectives on one node").
#[inline]
fn is_faster(kind: Kind, length: usize, size: usize) -> bool {
    match kind {
        Kind::Allgather => length <= 8 << 10 || size > 2,
        Kind::Alltoall => length <= 2 << 10,
        // In MPI the root, or who sends to it, goes further ahead with the shortest ones.
        Kind::Bcast | Kind::Gather | Kind::Scatter => (256..=2 << 10).contains(&length),
        Kind::Reduce => length <= 64 << 10,
        _ => true,
    }
}

/// Whether this rank sees all members of the communicator; the same on all of them.
fn are_all_here(board: &Board, comm: &Communicator) -> bool {
    match comm.members {
        [] => board.ranks() == comm.size as usize,
        members => members.iter().all(|&rank| board.sees(rank as usize)),
    }
}

#[cfg(test)]
mod tests {
    use mpi_shim_abi::Reduction;

    use super::*;
    use crate::buffer::{Buffer, ElementType};
    use crate::mpi::communicators::WORLD;

    const WORLD_OF_TWO: Communicator = Communicator {
        name: "test",
        handle: 0,
        user_handle: 0,
        rank: 0,
        size: 2,
        members: &[],
        largest_tag: 0,
        freed: false,
    };

    fn board() -> Arc<Board> {
        let number = new_number();
        let mut both = [0, 1].map(|rank| Board::make(number, rank, 2).unwrap());
        both.iter_mut().for_each(Board::open);
        let [first, _] = both;
        Arc::new(first)
    }

    fn allreduce(dtype: ElementType, shape: &[i64]) -> Operation<'_> {
        let x = Buffer::described(dtype, shape);
        Operation {
            reduction: Some(Reduction::Sum),
            ..Operation::new(Kind::Allreduce, WORLD, x, x)
        }
    }

    #[test]
    fn what_goes_through_shared_memory() {
        let on_node = OnNode::over(board());
        let short = allreduce(ElementType::F32, &[100]);
        let long = allreduce(ElementType::F64, &[1 << 20]);
        let way = |op: &Operation<'_>| on_node.way(op, &WORLD_OF_TWO);
        assert!(way(&short).is_some_and(|way| !way.in_slices));
        assert!(way(&long).is_some_and(|way| way.in_slices));
        let through_mpi = [
            allreduce(ElementType::F32, &[0]),
            allreduce(ElementType::C64, &[100]),
            Operation {
                reduction: Some(Reduction::User),
                ..short
            },
            Operation {
                kind: Kind::Scan,
                ..short
            },
            // A communicator of the user's.
            Operation {
                comm: (1 << 61) + 5,
                ..short
            },
        ];
        assert!(through_mpi.iter().all(|op| way(op).is_none()));
        assert!(!on_node.serves(&short, &WORLD_OF_TWO));
    }

    #[test]
    fn each_collective_has_the_lengths_at_which_it_is_faster() {
        let on_node = OnNode::over(board());
        let way = |kind: Kind, sent: &[i64], received: &[i64]| {
            let [send, recv] =
                [sent, received].map(|shape| Buffer::described(ElementType::U8, shape));
            let op = Operation::new(kind, WORLD, send, recv);
            on_node.way(&op, &WORLD_OF_TWO)
        };
        let length = |kind: Kind, sent: i64, received: i64| {
            way(kind, &[sent], &[received]).map(|way| way.length)
        };
        assert_eq!(length(Kind::Barrier, 0, 0), Some(0));
        assert_eq!(length(Kind::Allgather, 5, 10), Some(5));
        assert_eq!(length(Kind::Allgather, 5 << 20, 10 << 20), None);
        assert_eq!(length(Kind::Bcast, 7, 7), None);
        assert_eq!(length(Kind::Bcast, 700, 700), Some(700));
        assert_eq!(length(Kind::Bcast, 1 << 16, 1 << 16), None);
        assert_eq!(length(Kind::Alltoall, 12, 12), Some(6));
        assert_eq!(length(Kind::Alltoall, 1 << 14, 1 << 14), None);
        // The root's operand, or its result, has a part for each rank.
        assert_eq!(length(Kind::Scatter, 1200, 600), Some(600));
        assert_eq!(length(Kind::Gather, 600, 1200), Some(600));
        assert_eq!(length(Kind::Scatter, 0, 0), None);
        // Bytes are moved, and not reduced.
        assert_eq!(length(Kind::Reduce, 8, 8), None);
        assert_eq!(length(Kind::Scan, 8, 8), None);
    }

    #[test]
    fn ranks_that_are_not_on_this_node_use_mpi() {
        let on_node = OnNode::over(board());
        let short = allreduce(ElementType::F32, &[100]);
        let of = |size: i32, members: &'static [i32]| Communicator {
            size,
            members,
            ..WORLD_OF_TWO
        };
        assert!(on_node.way(&short, &of(2, &[1, 0])).is_some());
        assert!(on_node.way(&short, &of(2, &[0, 2])).is_none());
        assert!(on_node.way(&short, &of(3, &[])).is_none());
        assert!(on_node.way(&short, &of(1, &[0])).is_none());
        let none = OnNode::default();
        assert!(none.way(&short, &WORLD_OF_TWO).is_none());
    }

    #[test]
    fn no_short_array_is_longer_than_a_block() {
        use crate::node::shm_collective::BLOCK;
        assert!(WHOLE.iter().all(|&most| most <= BLOCK));
    }
}
