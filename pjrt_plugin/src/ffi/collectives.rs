//! Handlers of XLA's collectives, which `hlo_rewrite` puts into partitioned programs.

use mpi_runtime::mpi::communicators::COLLECTIVES;
use mpi_runtime::{Buffer, Kind, Operation, PROC_NULL, Ticket};

use super::collective::{Collective, operation, run};
use super::collective_contract::CollectiveContract;
use super::contract::{Field, Values};
use super::contracts::{
    ALL_GATHER, ALL_REDUCE, ALL_REDUCE_DONE, ALL_REDUCE_START, ALL_TO_ALL, ALL_TO_ALL_ARRAY, BEGIN,
    COLLECTIVE_BROADCAST, COLLECTIVE_PERMUTE, ID, REDUCE_SCATTER,
};
use super::frame::{Frame, array};
use super::handler::{Handler, handler};
use super::local_devices;
use crate::error::Error;
use crate::ffi::memory::Memory;
use crate::ffi::replica_groups::{self, Part};
use crate::launch::completion::noted;
use crate::launch::meeting;
use crate::launch::ticket::ticket_of;
use crate::plugin::world;

macro_rules! handlers {
    ($($contract:ident: $body:ident),+) => {
        &[$(($contract.call.target, handler(|frame| run_on(&$contract, frame, $body)))),+]
    };
}

/// Handlers of collectives by their targets.
pub const HANDLERS: &[(&str, Handler)] = handlers!(
    ALL_REDUCE: all_reduce,
    ALL_REDUCE_START: all_reduce_start,
    ALL_REDUCE_DONE: all_reduce_done,
    ALL_GATHER: all_gather,
    REDUCE_SCATTER: reduce_scatter,
    ALL_TO_ALL: all_to_all,
    ALL_TO_ALL_ARRAY: all_to_all_array,
    COLLECTIVE_PERMUTE: collective_permute,
    COLLECTIVE_BROADCAST: collective_broadcast
);

/// Handlers of what is no collective, by their targets.
pub const OTHERS: &[(&str, Handler)] = &[(BEGIN.target, handler(begin)), (ID.target, handler(id))];

/// Runs `body` for a collective, if this rank's part of the launch is on one device.
fn run_on(
    contract: &CollectiveContract,
    frame: &Frame<'_>,
    body: impl FnOnce(&Collective<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    match meeting::find(frame.run_id()) {
        Some(part) => noted(local_devices::run(contract, frame, &part)),
        None => run(contract, frame, body),
    }
}

/// The first thing that a launch with collectives does, on every rank.
fn begin(frame: &Frame<'_>) -> Result<(), Error> {
    let world =
        world().ok_or_else(|| Error::internal("a program ran before the world was started"))?;
    let mut values = Values::default();
    BEGIN.check(frame, &mut values)?;
    let program = replica_groups::program(values.get(Field::Program))?;
    if let Some(part) = meeting::find(frame.run_id()) {
        return local_devices::begin(&part, world, values.get(Field::Program), &program);
    }
    let ticket = ticket_of(frame.run_id()).unwrap_or(Ticket(0));
    world
        .engine
        .begin_collectives(ticket, &program)
        .map_err(Error::from)
}

fn all_reduce(call: &Collective<'_>) -> Result<(), Error> {
    let ((group, _), reduction) = (call.member()?, call.reduction()?);
    let mut index = 0;
    while index < call.operands {
        let end = call.end_of_pack(index)?;
        if end == index + 1 {
            call.reduce(group, reduction, call.arg(index)?, call.ret(index)?)?;
        } else {
            call.reduce_packed(group, reduction, index..end)?;
        }
        index = end;
    }
    Ok(())
}

/// Starts an all-reduce, of several arrays as one. The engine copies the operand.
fn all_reduce_start(call: &Collective<'_>) -> Result<(), Error> {
    let ((group, _), reduction) = (call.member()?, call.reduction()?);
    let start = |send: Buffer<'_>| {
        call.execute(&Operation {
            reduction: Some(reduction),
            ..operation(Kind::Iallreduce, group, send, call.ret(0)?)
        })
    };
    match call.operands {
        1 => start(call.arg(0)?),
        count => call.packed(0..count, start),
    }
}

/// Waits for what was started.
fn all_reduce_done(call: &Collective<'_>) -> Result<(), Error> {
    let (group, _) = call.member()?;
    let wait = |recv: Buffer<'_>| call.execute(&operation(Kind::Wait, group, call.arg(0)?, recv));
    match call.results {
        1 => wait(call.ret(0)?),
        count => call.unpacked(0..count, wait),
    }
}

fn all_gather(call: &Collective<'_>) -> Result<(), Error> {
    let (group, size) = call.member()?;
    for index in 0..call.operands {
        let (send, recv) = (call.arg(index)?, call.ret(index)?);
        let outer = call.outer(index);
        if outer == 1 {
            call.execute(&operation(Kind::Allgather, group, send, recv))?;
            continue;
        }
        let mut gathered = call.memory.scratch(recv.bytes())?;
        let into = gathered.over(&recv);
        call.execute(&operation(Kind::Allgather, group, send, into))?;
        call.memory.interleave(&into, &recv, size as usize, outer)?;
    }
    Ok(())
}

fn reduce_scatter(call: &Collective<'_>) -> Result<(), Error> {
    let ((group, size), reduction) = (call.member()?, call.reduction()?);
    for index in 0..call.operands {
        let (mut send, recv) = (call.arg(index)?, call.ret(index)?);
        let outer = call.outer(index);
        let mut parts = call
            .memory
            .scratch(if outer > 1 { send.bytes() } else { 0 })?;
        if outer > 1 {
            let into = parts.over(&send);
            call.memory.interleave(&send, &into, outer, size as usize)?;
            send = into;
        }
        call.execute(&Operation {
            reduction: Some(reduction),
            ..operation(Kind::ReduceScatter, group, send, recv)
        })?;
    }
    Ok(())
}

/// Block `i` goes to the group's member `i`, whose block becomes block `i` of the result: pairwise
/// exchanges without a copy (Thakur, Rabenseifner and Gropp, 2005, section 4.3). Blocks are arrays
/// of their own, or parts of one.
fn all_to_all(call: &Collective<'_>) -> Result<(), Error> {
    let (group, size) = call.member()?;
    let (size, rank) = (size as usize, replica_groups::rank_in(&call.part)?);
    if call.operands == 1 && call.results == 1 {
        let (mut send, mut recv) = (call.arg(0)?, call.ret(0)?);
        let shape = [size as i64, send.elements() / (size as i64).max(1)];
        (send, recv) = (send.shaped(&shape), recv.shaped(&shape));
        return call.execute(&operation(Kind::Alltoall, group, send, recv));
    }
    let whole = if call.operands == 1 {
        call.arg(0)?
    } else {
        call.ret(0)?
    };
    let shape = [whole.elements() / size as i64];
    let block = whole.shaped(&shape);
    let send = |member: usize| match call.operands {
        1 => Ok(whole.part(member * block.bytes(), &block)),
        _ => call.arg(member),
    };
    let recv = |member: usize| match call.results {
        1 => Ok(whole.part(member * block.bytes(), &block)),
        _ => call.ret(member),
    };
    let all = [size as i64, send(rank)?.elements()];
    let blocks = Buffer::described(whole.dtype(), &all);
    call.compare(&operation(Kind::Alltoall, group, blocks, blocks))?;
    call.memory.copy(&send(rank)?, &recv(rank)?)?;
    for step in 1..size {
        let (to, from) = ((rank + step) % size, (rank + size - step) % size);
        call.execute(&Operation {
            dest: to as i32,
            source: from as i32,
            ..operation(Kind::Sendrecv, group, send(to)?, recv(from)?)
        })?;
    }
    Ok(())
}

fn all_to_all_array(call: &Collective<'_>) -> Result<(), Error> {
    let (group, size) = call.member()?;
    let (mut send, mut recv) = (call.arg(0)?, call.ret(0)?);
    let outer = call.outer(0);
    let shape = [size, send.elements() / size.max(1)];
    let whole = recv;
    (send, recv) = (send.shaped(&shape), recv.shaped(&shape));
    if outer == 1 {
        return call.execute(&operation(Kind::Alltoall, group, send, recv));
    }
    let mut out = call.memory.scratch(send.bytes())?;
    let mut back = call.memory.scratch(recv.bytes())?;
    let parts = out.over(&send);
    call.memory
        .interleave(&send, &parts, outer, size as usize)?;
    let received = back.over(&recv);
    call.execute(&operation(Kind::Alltoall, group, parts, received))?;
    call.memory
        .interleave(&received, &whole, size as usize, outer)?;
    Ok(())
}

fn collective_permute(call: &Collective<'_>) -> Result<(), Error> {
    let Part::Pair { to, from } = call.part else {
        return Err(Error::internal("a collective-permute needs pairs"));
    };
    let own = call.world.rank;
    for index in 0..call.operands {
        let (send, recv) = (call.arg(index)?, call.ret(index)?);
        match (to, from) {
            (Some(to), Some(from)) if to == own && from == own => {
                call.memory.copy(&send, &recv)?;
            }
            (None, None) => call.memory.clear(&recv)?,
            _ => {
                if from.is_none() {
                    call.memory.clear(&recv)?;
                }
                call.execute(&Operation {
                    dest: to.unwrap_or(PROC_NULL),
                    source: from.unwrap_or(PROC_NULL),
                    ..operation(Kind::Sendrecv, COLLECTIVES, send, recv)
                })?;
            }
        }
    }
    Ok(())
}

/// The group's first member sends; who is in no group has zeros.
fn collective_broadcast(call: &Collective<'_>) -> Result<(), Error> {
    let group = call.group()?;
    for index in 0..call.operands {
        let (send, recv) = (call.arg(index)?, call.ret(index)?);
        match group {
            Some((group, _)) => call.execute(&operation(Kind::Bcast, group, send, recv))?,
            None => call.memory.clear(&recv)?,
        }
    }
    Ok(())
}

/// The partition or replica that this rank's device runs.
fn id(frame: &Frame<'_>) -> Result<(), Error> {
    let mut values = Values::default();
    ID.check(frame, &mut values)?;
    if let Some(part) = meeting::find(frame.run_id()) {
        let value = local_devices::id(&part, values.get(Field::Table))?;
        return Memory::of(frame)?.write(&array(frame.rets[0]), value);
    }
    let Part::Value(value) = replica_groups::part(values.get(Field::Table))? else {
        return Err(Error::internal("this rank runs no part of the program"));
    };
    Memory::of(frame)?.write(&array(frame.rets[0]), value)
}

#[cfg(test)]
mod tests {
    use mpi_runtime::operation::REDUCTIONS;

    #[test]
    fn every_target_of_a_rewritten_program_has_a_handler() {
        let all = super::HANDLERS.iter().chain(super::OTHERS);
        let name = |target: &'static str| target.strip_prefix(hlo_rewrite::TARGET_PREFIX);
        let mut handled: Vec<_> = all.filter_map(|row| name(row.0)).collect();
        let mut targets = hlo_rewrite::targets();
        handled.sort_unstable();
        targets.sort_unstable();
        assert_eq!(handled, targets);
    }

    #[test]
    fn reductions_have_the_same_numbers_in_programs_and_in_the_engine() {
        let engine = REDUCTIONS.iter().map(|row| row.1);
        assert!(engine.eq(hlo_rewrite::REDUCTIONS));
    }
}
