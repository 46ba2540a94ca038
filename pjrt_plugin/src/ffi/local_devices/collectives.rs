//! How each collective is executed for all parts of a launch. Between ranks it is a collective of
//! their communicator, in which each rank has a block for each of its devices; ranks with fewer
//! devices in a group than others have blocks of zeros in place of the missing ones.

#![forbid(unsafe_code)]

use hlo_rewrite::DeviceTable;
use mpi_runtime::engine::collectives::TAG;
use mpi_runtime::mpi::communicators::COLLECTIVES;
use mpi_runtime::node::local_reduce::reduce;
use mpi_runtime::operation::REDUCTIONS;
use mpi_runtime::{
    Buffer, ElementType, Kind, LentArray, Operation, PROC_NULL, Place, Reduction, World,
};

use super::groups::{Group, groups};
use super::ticket_of;
use crate::error::Error;
use crate::ffi::collective::operation;
use crate::ffi::contracts;
use crate::launch::meeting::Several;
use crate::launch::meeting_call::Call;
use crate::plugin::config;

/// A collective of all parts, which lie in this process and stay there until it has been executed.
struct Meeting<'a> {
    world: &'a World,
    several: &'a Several,
    calls: &'a [Call],
    of_rank: i64,
}

/// Executes a collective for all parts.
pub fn execute(
    world: &World,
    several: &Several,
    target: &str,
    table: &DeviceTable,
    calls: &[Call],
) -> Result<(), Error> {
    let of_rank = i64::from(config().local_devices);
    let meeting = Meeting {
        world,
        several,
        calls,
        of_rank,
    };
    type Body<'a> = fn(&Meeting<'a>, &Group) -> Result<(), Error>;
    let body: Body<'_> = match target {
        target if target == contracts::ALL_REDUCE.call.target => Meeting::all_reduce,
        target if target == contracts::ALL_GATHER.call.target => Meeting::all_gather,
        target if target == contracts::REDUCE_SCATTER.call.target => Meeting::reduce_scatter,
        target if target == contracts::ALL_TO_ALL.call.target => Meeting::all_to_all,
        target if target == contracts::ALL_TO_ALL_ARRAY.call.target => Meeting::all_to_all_array,
        target if target == contracts::COLLECTIVE_BROADCAST.call.target => Meeting::broadcast,
        target if target == contracts::COLLECTIVE_PERMUTE.call.target => {
            return meeting.permute(table);
        }
        _ => {
            return Err(Error::unimplemented(format!(
                "{target} on several devices of a rank"
            )));
        }
    };
    let groups = groups(table, several.devices(), of_rank);
    let broadcasts = target == contracts::COLLECTIVE_BROADCAST.call.target;
    meeting.check_members(&groups, broadcasts)?;
    groups.iter().try_for_each(|group| body(&meeting, group))
}

impl Meeting<'_> {
    /// Every part is in a group. Of a broadcast it need not be: who is in none has zeros.
    fn check_members(&self, groups: &[Group], broadcasts: bool) -> Result<(), Error> {
        for (part, device) in self.several.devices().iter().enumerate() {
            if groups
                .iter()
                .flat_map(Group::own)
                .any(|(_, own)| own == part)
            {
                continue;
            }
            if !broadcasts {
                let reason = format!("device {device} is in no group of a collective");
                return Err(Error::internal(reason));
            }
            self.calls[part].rets.iter().for_each(LentArray::clear);
        }
        Ok(())
    }

    fn all_reduce(&self, group: &Group) -> Result<(), Error> {
        let own: Vec<&Call> = group.own().map(|(_, part)| &self.calls[part]).collect();
        let Some((&first, others)) = own.split_first() else {
            return Ok(());
        };
        for index in 0..self.arrays() {
            let result = first.result(index)?;
            // Each result has memory for what is on the way to it.
            let mut reduced = result;
            match (others.first(), group.ranks.len()) {
                (None, 1) => result.write(first.operand(index)?.bytes()),
                (None, _) => self.all_reduce_between(group, first.operand(index)?, result)?,
                (Some(second), ranks) => {
                    result.write(first.operand(index)?.bytes());
                    for other in others {
                        let operand = other.operand(index)?;
                        let done = result.reduce(self.reduction()?, operand);
                        done.map_err(Error::unimplemented)?;
                    }
                    if ranks > 1 {
                        reduced = second.result(index)?;
                        self.all_reduce_between(group, result, reduced)?;
                    }
                }
            }
            for call in &own {
                call.result(index)?.copy(reduced);
            }
        }
        Ok(())
    }

    fn all_reduce_between(
        &self,
        group: &Group,
        send: &LentArray,
        recv: &LentArray,
    ) -> Result<(), Error> {
        let (send, recv) = (send.buffer(), recv.buffer());
        self.communicate(&self.of_group(Kind::Allreduce, group, send, recv)?)
    }

    fn all_gather(&self, group: &Group) -> Result<(), Error> {
        for index in 0..self.arrays() {
            let like = self.arg(group, index)?;
            let block = like.bytes();
            let mut own = vec![0; group.most * block];
            for (member, part) in group.own() {
                let place = member.slot * block;
                own[place..place + block].copy_from_slice(self.calls[part].operand(index)?.bytes());
            }
            let mut all = vec![0; group.ranks.len() * own.len()];
            match group.ranks.len() {
                1 => all.copy_from_slice(&own),
                _ => self.between(Kind::Allgather, group, like.dtype(), &mut own, &mut all)?,
            }
            if !group.is_in_order() {
                let places = group
                    .members
                    .iter()
                    .map(|member| group.place(member) * block);
                let blocks: Vec<_> = places.map(|place| &all[place..place + block]).collect();
                all = blocks.concat();
            }
            let gathered = interleaved(all, group.members.len(), self.outer(index));
            for (_, part) in group.own() {
                self.calls[part].result(index)?.write(&gathered);
            }
        }
        Ok(())
    }

    fn reduce_scatter(&self, group: &Group) -> Result<(), Error> {
        let size = group.members.len();
        for index in 0..self.arrays() {
            let like = self.arg(group, index)?;
            let outer = self.outer(index);
            let blocks = |bytes: &[u8]| interleaved(bytes.to_vec(), outer, size);
            let reduced = self.reduced(group, index, blocks)?;
            let block = reduced.len() / size;
            let mut all = vec![0; group.ranks.len() * group.most * block];
            for (member, reduced) in group.members.iter().zip(reduced.chunks(block.max(1))) {
                let place = group.place(member) * block;
                all[place..place + block].copy_from_slice(reduced);
            }
            let mut own = vec![0; group.most * block];
            match group.ranks.len() {
                1 => own.copy_from_slice(&all),
                _ => self.between(Kind::ReduceScatter, group, like.dtype(), &mut all, &mut own)?,
            }
            for (member, part) in group.own() {
                let place = member.slot * block;
                let result = self.calls[part].result(index)?;
                result.write(&own[place..place + block]);
            }
        }
        Ok(())
    }

    /// Blocks are arrays of their own, or parts of one.
    fn all_to_all(&self, group: &Group) -> Result<(), Error> {
        let mut sent = Vec::new();
        for (_, part) in group.own() {
            let call = &self.calls[part];
            let blocks: Vec<_> = call.args.iter().map(LentArray::bytes).collect();
            sent.push(blocks.concat());
        }
        let received = self.exchange(group, &sent)?;
        for ((_, part), received) in group.own().zip(received) {
            let mut rest = &received[..];
            for result in &self.calls[part].rets {
                let (own, after) = rest.split_at(result.buffer().bytes());
                result.write(own);
                rest = after;
            }
        }
        Ok(())
    }

    fn all_to_all_array(&self, group: &Group) -> Result<(), Error> {
        let (size, outer) = (group.members.len(), self.outer(0));
        let mut sent = Vec::new();
        for (_, part) in group.own() {
            sent.push(interleaved(
                self.calls[part].operand(0)?.bytes().to_vec(),
                outer,
                size,
            ));
        }
        let received = self.exchange(group, &sent)?;
        for ((_, part), received) in group.own().zip(received) {
            let result = self.calls[part].result(0)?;
            result.write(&interleaved(received, size, outer));
        }
        Ok(())
    }

    /// What each of this rank's members receives, of blocks in the order of the members: block `i`
    /// of each member goes to member `i`.
    fn exchange(&self, group: &Group, sent: &[Vec<u8>]) -> Result<Vec<Vec<u8>>, Error> {
        let (size, most) = (group.members.len(), group.most);
        let block = sent.first().map_or(0, Vec::len) / size;
        // By rank, then the slot of the sender there, then that of the receiver.
        let place =
            |rank: usize, from: usize, to: usize| ((rank * most + from) * most + to) * block;
        let mut all = vec![0; group.ranks.len() * most * most * block];
        for ((own, _), sent) in group.own().zip(sent) {
            for (member, sent) in group.members.iter().zip(sent.chunks(block.max(1))) {
                let start = place(member.rank, own.slot, member.slot);
                all[start..start + block].copy_from_slice(sent);
            }
        }
        let mut back = vec![0; all.len()];
        match group.ranks.len() {
            1 => back.copy_from_slice(&all),
            _ => {
                // The blocks of a rank may have any type: what is moved is not computed with.
                let dtype = self.arg(group, 0)?.dtype();
                let elements = (all.len() / dtype.size() / group.ranks.len()) as i64;
                let shape = [group.ranks.len() as i64, elements];
                let op = operation(
                    Kind::Alltoall,
                    group.comm,
                    Buffer::over(&mut all, dtype, &shape),
                    Buffer::over(&mut back, dtype, &shape),
                );
                self.communicate(&op)?;
            }
        }
        let received = group.own().map(|(own, _)| {
            let blocks = group.members.iter().map(|member| {
                let start = place(member.rank, member.slot, own.slot);
                &back[start..start + block]
            });
            blocks.collect::<Vec<_>>().concat()
        });
        Ok(received.collect())
    }

    /// The group's first member sends.
    fn broadcast(&self, group: &Group) -> Result<(), Error> {
        for index in 0..self.arrays() {
            let like = self.arg(group, index)?;
            let mut value = match group.members[0].part {
                Some(part) => self.calls[part].operand(index)?.bytes().to_vec(),
                None => vec![0; like.bytes()],
            };
            if group.ranks.len() > 1 {
                let mut received = vec![0; value.len()];
                self.between(Kind::Bcast, group, like.dtype(), &mut value, &mut received)?;
                if group.members[0].part.is_none() {
                    value = received;
                }
            }
            for (_, part) in group.own() {
                self.calls[part].result(index)?.write(&value);
            }
        }
        Ok(())
    }

    /// Pairs of devices of two ranks are exchanged in rounds: one for each place of the sender in
    /// its rank, and each of the receiver in its own. In a round a rank sends once at most, and
    /// receives once at most.
    fn permute(&self, table: &DeviceTable) -> Result<(), Error> {
        let DeviceTable::Pairs(pairs) = table else {
            return Err(Error::internal("a collective-permute needs pairs"));
        };
        let devices = self.several.devices();
        let part = |device: i64| devices.iter().position(|&own| own == device);
        for index in 0..self.arrays() {
            for (own, device) in devices.iter().enumerate() {
                let from = pairs.iter().find(|pair| pair.1 == *device);
                match from.map(|pair| part(pair.0)) {
                    None => self.calls[own].result(index)?.clear(),
                    Some(Some(from)) => {
                        let operand = self.calls[from].operand(index)?;
                        self.calls[own].result(index)?.write(operand.bytes());
                    }
                    Some(None) => {}
                }
            }
            for round in 0..self.of_rank * self.of_rank {
                self.permute_round(pairs, index, round)?;
            }
        }
        Ok(())
    }

    fn permute_round(&self, pairs: &[(i64, i64)], index: usize, round: i64) -> Result<(), Error> {
        let devices = self.several.devices();
        let part = |device: i64| devices.iter().position(|&own| own == device);
        let (from, to) = (round / self.of_rank, round % self.of_rank);
        let of_round = |pair: &&(i64, i64)| {
            pair.0 % self.of_rank == from
                && pair.1 % self.of_rank == to
                && pair.0 / self.of_rank != pair.1 / self.of_rank
        };
        let sends = pairs
            .iter()
            .filter(of_round)
            .find_map(|pair| Some((part(pair.0)?, pair.1)));
        let receives = pairs
            .iter()
            .filter(of_round)
            .find_map(|pair| Some((part(pair.1)?, pair.0)));
        if sends.is_none() && receives.is_none() {
            return Ok(());
        }
        let rank = |device: i64| (device / self.of_rank) as i32;
        let like = self.calls[0].operand(index)?.buffer();
        let mut unused = vec![0; like.bytes()];
        let mut nowhere = vec![0; like.bytes()];
        let send = match sends {
            Some((part, _)) => self.calls[part].operand(index)?.buffer(),
            None => Buffer::over(&mut unused, like.dtype(), like.shape()),
        };
        let recv = match receives {
            Some((part, _)) => self.calls[part].result(index)?.buffer(),
            None => Buffer::over(&mut nowhere, like.dtype(), like.shape()),
        };
        self.communicate(&Operation {
            dest: sends.map_or(PROC_NULL, |(_, to)| rank(to)),
            source: receives.map_or(PROC_NULL, |(_, from)| rank(from)),
            ..operation(Kind::Sendrecv, COLLECTIVES, send, recv)
        })
    }

    /// The reduction of what this rank's members of a group pass, each as `prepare` makes it.
    fn reduced(
        &self,
        group: &Group,
        index: usize,
        prepare: impl Fn(&[u8]) -> Vec<u8>,
    ) -> Result<Vec<u8>, Error> {
        let (reduction, dtype) = (self.reduction()?, self.arg(group, index)?.dtype());
        let mut reduced: Option<Vec<u8>> = None;
        for (_, part) in group.own() {
            let own = prepare(self.calls[part].operand(index)?.bytes());
            match &mut reduced {
                Some(reduced) => {
                    reduce(reduction, dtype, reduced, &own).map_err(Error::unimplemented)?;
                }
                None => reduced = Some(own),
            }
        }
        Ok(reduced.unwrap_or_default())
    }

    fn arrays(&self) -> usize {
        self.calls[0].args.len()
    }

    fn outer(&self, index: usize) -> usize {
        self.calls[0].outer.get(index).copied().unwrap_or(1)
    }

    fn reduction(&self) -> Result<Reduction, Error> {
        let number = self.calls[0].numbers[1];
        let row = usize::try_from(number).ok().and_then(|n| REDUCTIONS.get(n));
        Ok(row
            .ok_or_else(|| Error::internal(format!("op={number} is no reduction")))?
            .0)
    }

    /// An array that a member of this rank passes: all pass ones that are alike.
    fn arg(&self, group: &Group, index: usize) -> Result<Buffer<'_>, Error> {
        let first = group.own().next();
        let (_, part) = first.ok_or_else(|| Error::internal("a group without this rank"))?;
        Ok(self.calls[part].operand(index)?.buffer())
    }

    /// Executes a collective of a group's ranks on memory of ours.
    fn between(
        &self,
        kind: Kind,
        group: &Group,
        dtype: ElementType,
        send: &mut [u8],
        recv: &mut [u8],
    ) -> Result<(), Error> {
        let shape = |memory: &[u8]| [(memory.len() / dtype.size()) as i64];
        let (sent, received) = (shape(send), shape(recv));
        let (send, recv) = (
            Buffer::over(send, dtype, &sent),
            Buffer::over(recv, dtype, &received),
        );
        self.communicate(&self.of_group(kind, group, send, recv)?)
    }

    /// A collective of a group's ranks.
    fn of_group<'a>(
        &self,
        kind: Kind,
        group: &Group,
        send: Buffer<'a>,
        recv: Buffer<'a>,
    ) -> Result<Operation<'a>, Error> {
        let reduces = matches!(kind, Kind::Allreduce | Kind::ReduceScatter);
        Ok(Operation {
            reduction: reduces.then(|| self.reduction()).transpose()?,
            ..operation(kind, group.comm, send, recv)
        })
    }

    /// Executes an operation between ranks.
    fn communicate(&self, op: &Operation<'_>) -> Result<(), Error> {
        let engine = &self.world.engine;
        let place = self.calls[0].numbers[2] as u64;
        let tag = match place {
            0 => TAG,
            place => engine.tag_at(place),
        };
        let op = Operation {
            place,
            send_tag: tag,
            recv_tag: tag,
            ..*op
        };
        let done = engine.execute(ticket_of(self.several)?, &op, Place::Host);
        done.map_err(Error::from)
    }
}

/// Blocks of `rows` rows of `columns`, whose rows become columns.
fn interleaved(blocks: Vec<u8>, rows: usize, columns: usize) -> Vec<u8> {
    if rows == 1 || columns == 1 {
        return blocks;
    }
    let block = blocks.len() / (rows * columns).max(1);
    let mut turned = vec![0; blocks.len()];
    for row in 0..rows {
        for column in 0..columns {
            let (here, there) = (
                (row * columns + column) * block,
                (column * rows + row) * block,
            );
            turned[there..there + block].copy_from_slice(&blocks[here..here + block]);
        }
    }
    turned
}
