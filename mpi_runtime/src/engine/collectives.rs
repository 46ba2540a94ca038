//! Collectives of programs for several devices: the groups of ranks they run in, and the start of
//! those programs.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::Ordering;

use mpi_shim_abi::Kind;
use parking_lot::Mutex;

use crate::buffer::Buffer;
use crate::engine::collective_sequence::CollectiveSequence;
use crate::engine::compare::Comparison;
use crate::engine::order::Ticket;
use crate::engine::pending::{Pending, PendingTable};
use crate::engine::post::{Post, Tags};
use crate::error::{Failure, MpiError, OperationError};
use crate::mpi::communicators::{COLLECTIVES, Communicator, Communicators, SELF};
use crate::mpi::shim::Shim;
use crate::operation::{OF_XLA, Operation};
use crate::ranks::Ranks;

/// Tag of messages between the devices of XLA's collectives.
pub const TAG: i32 = 1;
/// Tag of the first run of a program: what a rank is about to run; the verdict has the next one.
const ARRIVAL_TAG: i32 = 2;

/// The groups that this process's rank is in, by number.
pub struct ReplicaGroups {
    /// Of messages of collectives.
    tags: Tags,
    members: Mutex<HashMap<i64, Vec<i32>>>,
    /// The groups of programs that have communicators of their own, by the numbers of these.
    apart: Mutex<HashMap<i64, i64>>,
    /// The channels whose first launch has begun, everywhere.
    begun_apart: Mutex<HashSet<u64>>,
}

/// What the engine lends to collectives.
#[derive(Clone, Copy)]
pub(crate) struct CollectiveContext<'a> {
    pub(crate) shim: Option<&'a Shim>,
    pub(crate) communicators: &'a Communicators,
    pub(crate) pending: &'a PendingTable,
    pub(crate) comparison: &'a Comparison,
    /// Rank in the world.
    pub(crate) rank: i32,
}

impl ReplicaGroups {
    /// None yet; over an MPI, if there is one.
    pub(crate) fn new(shim: Option<&Shim>) -> ReplicaGroups {
        ReplicaGroups {
            tags: shim.map_or(Tags::up_to(0), Tags::of),
            members: Mutex::default(),
            apart: Mutex::default(),
            begun_apart: Mutex::default(),
        }
    }

    /// The tag of messages of a collective at that place of a program.
    pub(crate) fn tag_at(&self, place: u64) -> i32 {
        self.tags.of_place(place)
    }

    /// Says which ranks the group `number` has that this rank is in.
    pub(crate) fn know(&self, number: i64, members: Vec<i32>) {
        self.members.lock().insert(number, members);
    }

    /// Makes the communicator of a group, when `op` is the first to use it; collective over the
    /// group.
    pub(crate) fn make(
        &self,
        on: CollectiveContext<'_>,
        op: &Operation<'_>,
    ) -> Result<Option<Communicator>, Box<OperationError>> {
        let apart = self.apart.lock().get(&op.comm).copied();
        let group = apart.unwrap_or(op.comm);
        let Some(members) = self.members.lock().get(&group).cloned() else {
            return Ok(None);
        };
        let everybody = on.communicators.get(COLLECTIVES);
        let Some(world) = everybody else {
            return Ok(None);
        };
        let name: &'static str = String::leak(format!("the ranks {}", Ranks(&members)));
        let position = members.iter().position(|&rank| rank == on.rank);
        let failed = |reason: Failure| {
            Box::new(OperationError {
                operation: op.to_string(),
                rank: on.rank,
                comm: name.to_owned(),
                size: members.len() as i32,
                reason,
            })
        };
        let position = position.ok_or_else(|| failed("this rank is not in its group".into()))?;
        if let Some(&missing) = members.iter().find(|&&rank| rank >= world.size) {
            let size = world.size;
            let reason = format!(
                "there is no rank {missing}: the world has {size} ranks (MPI_CUDA_PRETEND_SIZE?)"
            );
            return Err(failed(reason.into()));
        }
        let handle = if apart.is_none() && members.iter().copied().eq(0..world.size) {
            world.handle
        } else if members.len() == 1 {
            on.communicators.get(SELF).map_or(0, |row| row.handle)
        } else {
            let Some(shim) = on.shim else {
                return Err(failed("it needs an MPI, and none was found".into()));
            };
            let _pending = on.pending.enter(op, &world);
            make_in_turn(on, shim, world.handle, &members, op.comm)
                .map_err(|error| failed(error.into()))?
        };
        let row = Communicator {
            name,
            handle,
            user_handle: u64::MAX,
            rank: position as i32,
            size: members.len() as i32,
            members: Vec::leak(members),
            largest_tag: 0,
            freed: false,
        };
        on.communicators.add(op.comm, row);
        Ok(Some(row))
    }

    /// Begins a launch of `program` in its turn: waits, with backoff, for the other ranks where one
    /// may still be compiling. They must be about to run the same sequence of collectives.
    ///
    /// Where all ranks of the world run the program, those of a node compare every launch in shared
    /// memory. Ranks that do not see each other meet, by messages, at the first launch of a
    /// sequence: that is the same on all of them, since it depends on nothing but the sequences
    /// that they have run together.
    pub(crate) fn begin(
        &self,
        on: CollectiveContext<'_>,
        ticket: Ticket,
        program: &CollectiveSequence,
    ) -> Result<(), Box<OperationError>> {
        if program.everybody {
            let _pending = wait_for_all(on, program);
            let words = || words_or(Some(&program.summary));
            on.comparison
                .launch(ticket, program.sequence, words)
                .map_err(|reason| failed(on, program, reason))?;
        }
        let new = !program.begun.load(Ordering::Relaxed);
        let in_sight = program.everybody && on.comparison.sees_everybody(program.members.len());
        if new && !in_sight {
            meet(on, program, ARRIVAL_TAG)?;
        }
        program.begun.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl ReplicaGroups {
    /// Begins a launch of a program on a `channel` of its own: at the first one the ranks meet, as
    /// they come to it.
    pub(crate) fn begin_apart(
        &self,
        on: CollectiveContext<'_>,
        program: &CollectiveSequence,
        channel: u64,
    ) -> Result<(), Box<OperationError>> {
        if !self.begun_apart.lock().contains(&channel) {
            meet(on, program, self.tags.of_channel(channel))?;
            self.begun_apart.lock().insert(channel);
        }
        Ok(())
    }

    /// A collective of XLA's on a `channel` of its program's own.
    pub(crate) fn apart<'a>(&self, op: &Operation<'a>, channel: u64) -> Operation<'a> {
        let mut op = *op;
        if op.of != Some(OF_XLA) {
            return op;
        }
        if op.comm == COLLECTIVES {
            // Messages between two ranks.
            op.send_tag = match op.place {
                0 => self.tags.of_channel(channel) + 3,
                place => self.tags.of_place(place ^ channel),
            };
            op.recv_tag = op.send_tag;
            return op;
        }
        let group = op.comm;
        op.comm = number_apart(group, channel);
        self.apart.lock().insert(op.comm, group);
        op
    }
}

/// The number of a group's communicator on a channel.
fn number_apart(group: i64, channel: u64) -> i64 {
    let mut hasher = DefaultHasher::new();
    (group, channel).hash(&mut hasher);
    // Not that of a communicator of the user's, nor of one that always exists.
    (hasher.finish() >> 3 | 1 << 60) as i64
}

/// Makes the communicator of a group, which has that number, while other threads may make others.
///
/// Open MPI 4 does not bear that (its issue 2025), so a process makes one at a time. Once all
/// members are there, each keeps its process from making others, from the lowest rank to the
/// highest. In that order whoever waits for a process waits for a higher one than it has, so groups
/// never wait for each other.
fn make_in_turn(
    on: CollectiveContext<'_>,
    shim: &Shim,
    world: u64,
    members: &[i32],
    number: i64,
) -> Result<u64, MpiError> {
    static MAKING: Mutex<()> = Mutex::new(());
    let tag = Tags::of(shim).of_channel(number as u64);
    let post = Post { shim, comm: world };
    let mut ranks = members.to_vec();
    ranks.sort_unstable();
    let (lower, others) = ranks.split_at(ranks.partition_point(|&rank| rank < on.rank));
    let higher = others.get(1..).unwrap_or_default();
    if let ([first, ..], [.., before]) = (lower, lower) {
        post.send(*first, tag, &[])?;
        post.receive(*before, tag + 1)?;
    } else {
        for &rank in higher {
            post.receive(rank, tag)?;
        }
    }
    let making = MAKING.lock();
    if let Some(&next) = higher.first() {
        post.send(next, tag + 1, &[])?;
    }
    let made = shim.comm_create_group(world, members, tag + 2);
    drop(making);
    made
}

fn failed(
    on: CollectiveContext<'_>,
    program: &CollectiveSequence,
    reason: Failure,
) -> Box<OperationError> {
    Box::new(OperationError {
        operation: "the start of a program".into(),
        rank: on.rank,
        comm: format!("the ranks {}", Ranks(program.members)),
        size: program.members.len() as i32,
        reason,
    })
}

/// The first of the members collects what each is about to run, and tells them whether it is the
/// same.
fn meet(
    on: CollectiveContext<'_>,
    program: &CollectiveSequence,
    first_tag: i32,
) -> Result<(), Box<OperationError>> {
    let (arrival_tag, verdict_tag) = (first_tag, first_tag + 1);
    // The same one in every program with the same members, in whatever order.
    let mut members = program.members.to_vec();
    members.sort_unstable();
    let (Some(shim), [first, others @ ..]) = (on.shim, &members[..]) else {
        return Ok(());
    };
    if others.is_empty() {
        return Ok(());
    }
    let failed = |reason: Failure| self::failed(on, program, reason);
    let comm = on
        .communicators
        .get(COLLECTIVES)
        .map_or(0, |row| row.handle);
    let post = Post { shim, comm };
    let _pending = wait_for_all(on, program);
    let own = arrival(program);
    let verdict = if *first == on.rank {
        let mut verdict = String::new();
        for &rank in others {
            let theirs = post
                .receive(rank, arrival_tag)
                .map_err(|e| failed(e.into()))?;
            if theirs != own && verdict.is_empty() {
                verdict = self::verdict(&[(*first, described(&own)), (rank, described(&theirs))]);
            }
        }
        for &rank in others {
            post.send(rank, verdict_tag, verdict.as_bytes())
                .map_err(|e| failed(e.into()))?;
        }
        verdict
    } else {
        post.send(*first, arrival_tag, &own)
            .map_err(|e| failed(e.into()))?;
        let verdict = post.receive(*first, verdict_tag);
        String::from_utf8_lossy(&verdict.map_err(|e| failed(e.into()))?).into_owned()
    };
    if verdict.is_empty() {
        Ok(())
    } else {
        Err(failed(verdict.into()))
    }
}

/// What two ranks that differ hear.
fn verdict(both: &[(i32, String); 2]) -> String {
    let [(first, one), (second, other)] = both;
    format!(
        "the ranks run different programs. Rank {first}: {one}. Rank {second}: {other}. All ranks \
         must run the same program in the same order; look for what depends on the rank"
    )
}

fn words_or(words: Option<&str>) -> String {
    match words {
        Some("") => "no collectives".into(),
        Some(words) => words.into(),
        None => "a program that this rank has not run".into(),
    }
}

/// Enters that this rank waits for all ranks of a program to begin it.
fn wait_for_all<'a>(on: CollectiveContext<'a>, program: &CollectiveSequence) -> Pending<'a> {
    let barrier = Operation::new(Kind::Barrier, COLLECTIVES, Buffer::NONE, Buffer::NONE);
    let members = program.members;
    let comm = Communicator {
        name: "all ranks",
        handle: 0,
        user_handle: u64::MAX,
        rank: on.rank,
        size: members.len() as i32,
        members,
        largest_tag: 0,
        freed: false,
    };
    let name = format!(
        "the start of a program ({}) that ranks {} must begin",
        words_or(Some(&program.summary)),
        Ranks(members)
    );
    on.pending.enter_named(&barrier, &comm, &name)
}

/// What a rank says of the program that it is about to run: the hash, then words.
fn arrival(program: &CollectiveSequence) -> Vec<u8> {
    let mut bytes = program.sequence.to_le_bytes().to_vec();
    bytes.extend_from_slice(program.summary.as_bytes());
    bytes
}

fn described(arrival: &[u8]) -> String {
    let text = arrival.get(size_of::<u64>()..).unwrap_or_default();
    words_or(Some(&String::from_utf8_lossy(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arrival_names_its_program() {
        let program = CollectiveSequence::new(7, "all-reduce f32[4] SUM".into(), vec![0, 1], 2);
        assert!(program.everybody);
        let bytes = arrival(&program);
        assert_eq!(described(&bytes), "all-reduce f32[4] SUM");
        assert_eq!(
            described(&arrival(&CollectiveSequence::new(
                0,
                String::new(),
                vec![0],
                2
            ))),
            "no collectives"
        );
        assert_eq!(described(&[1, 2]), "no collectives");
    }
}
