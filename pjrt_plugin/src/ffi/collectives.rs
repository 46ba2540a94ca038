//! Handlers of XLA's collectives, which `hlo_rewrite` puts into partitioned programs.

use mpi_runtime::mpi::communicators::COLLECTIVES;
use mpi_runtime::{Buffer, Kind, Operation, PROC_NULL, Ticket};

use super::collective::{Collective, attribute, collective, operation, part};
use super::frame::Frame;
use super::handler::{Handler, handler};
use crate::error::Error;
use crate::ffi::memory::Memory;
use crate::ffi::replica_groups::{self, Part};
use crate::launch::ticket::ticket_of;
use crate::plugin::world;

/// Handlers by the name of the target, without the prefix.
pub const HANDLERS: &[(&str, Handler)] = &[
    ("begin", handler(begin)),
    ("all_reduce", collective(all_reduce)),
    ("all_gather", collective(all_gather)),
    ("reduce_scatter", collective(reduce_scatter)),
    ("all_to_all", collective(all_to_all)),
    ("all_to_all_array", collective(all_to_all_array)),
    ("collective_permute", collective(collective_permute)),
    ("collective_broadcast", collective(collective_broadcast)),
    ("id", handler(id)),
];

/// The first thing that a launch with collectives does, on every rank.
fn begin(frame: &Frame<'_>) -> Result<(), Error> {
    let world =
        world().ok_or_else(|| Error::internal("a program ran before the world was started"))?;
    let program = replica_groups::program(attribute(frame, "program")?)?;
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

fn all_gather(call: &Collective<'_>) -> Result<(), Error> {
    let (group, size) = call.member()?;
    let apart = call.has_outer();
    for index in 0..call.operands {
        let (send, recv) = (call.arg(index)?, call.ret(index)?);
        let outer = if apart { call.outer(index) } else { 1 };
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
    let apart = call.has_outer();
    for index in 0..call.operands {
        let (mut send, recv) = (call.arg(index)?, call.ret(index)?);
        let outer = if apart { call.outer(index) } else { 1 };
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
    for blocks in [call.operands, call.results] {
        if blocks != size && blocks != 1 {
            return Err(Error::internal(
                "an all-to-all does not have a block for each rank",
            ));
        }
    }
    if call.operands == 1 && call.results == 1 {
        let (mut send, mut recv) = (call.arg(0)?, call.ret(0)?);
        let shape = [size as i64, send.elements() / (size as i64).max(1)];
        (send.shape, recv.shape) = (&shape, &shape);
        return call.execute(&operation(Kind::Alltoall, group, send, recv));
    }
    let whole = if call.operands == 1 {
        call.arg(0)?
    } else {
        call.ret(0)?
    };
    let shape = [whole.elements() / size as i64];
    let block = Buffer {
        shape: &shape,
        ..whole
    };
    let send = |member: usize| match call.operands {
        1 => Ok(part(&whole, member * block.bytes(), &block)),
        _ => call.arg(member),
    };
    let recv = |member: usize| match call.results {
        1 => Ok(part(&whole, member * block.bytes(), &block)),
        _ => call.ret(member),
    };
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
    let outer = if call.has_outer() { call.outer(0) } else { 1 };
    let shape = [size, send.elements() / size.max(1)];
    let whole = recv;
    (send.shape, recv.shape) = (&shape, &shape);
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
    let Part::Value(value) = replica_groups::part(attribute(frame, "table")?)? else {
        return Err(Error::internal("this rank runs no part of the program"));
    };
    let result = frame
        .ret(0)
        .filter(|result| result.bytes() == size_of::<u32>());
    let result = result.ok_or_else(|| Error::internal("an id must be one number of 32 bits"))?;
    Memory::of(frame)?.write(&result, value)
}

#[cfg(test)]
mod tests {
    use mpi_runtime::operation::REDUCTIONS;

    #[test]
    fn every_target_of_a_rewritten_program_has_a_handler() {
        let mut handled: Vec<_> = super::HANDLERS.iter().map(|row| row.0).collect();
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
