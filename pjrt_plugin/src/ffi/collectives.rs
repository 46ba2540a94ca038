//! Handlers of collectives, which `hlo_rewrite` puts into partitioned programs. Their operands
//! lie contiguously as MPI wants them; the last operand and the last result are the token.

use std::ops::Range;
use std::sync::atomic::Ordering;

use mpi_runtime::engine::collectives::TAG;
use mpi_runtime::operation::REDUCTIONS;
use mpi_runtime::{Buffer, Kind, Operation, PROC_NULL, Reduction, Ticket, World};
use pjrt_sys::*;

use super::Handler;
use super::frame::{Frame, handle};
use crate::error::Error;
use crate::ffi::memory::Memory;
use crate::ffi::replica_groups::{self, Part};
use crate::launch::ticket::ticket_of;
use crate::plugin::world;

/// Handlers by the name of the target, without the prefix.
pub const HANDLERS: &[(&str, Handler)] = &[
    ("begin", begin),
    ("all_reduce", all_reduce),
    ("all_gather", all_gather),
    ("reduce_scatter", reduce_scatter),
    ("all_to_all", all_to_all),
    ("all_to_all_array", all_to_all_array),
    ("collective_permute", collective_permute),
    ("collective_broadcast", collective_broadcast),
    ("id", id),
];

/// Arrays are reduced together up to so many bytes.
const LARGEST_PACK: usize = 64 << 10;

/// One collective of this launch.
struct Collective<'a> {
    frame: &'a Frame<'a>,
    world: &'a World,
    ticket: Ticket,
    /// Number of arrays in and out.
    operands: usize,
    results: usize,
    part: Part,
    memory: Memory<'a>,
}

/// Runs `body` for a collective, in the order of its program.
///
/// # Safety
/// `frame` must be what XLA passed.
unsafe fn collective(
    frame: *mut XLA_FFI_CallFrame,
    body: impl FnOnce(&Collective<'_>) -> Result<(), Error>,
) -> *mut XLA_FFI_Error {
    // SAFETY: as the caller promises.
    unsafe {
        handle(frame, |frame| {
            let world = world()
                .ok_or_else(|| Error::internal("a collective ran before the world was started"))?;
            let ticket = ticket_of(frame.run_id()).unwrap_or(Ticket(0));
            let collective = Collective {
                frame,
                world,
                ticket,
                operands: frame.raw_args().len().saturating_sub(1),
                results: frame.raw_rets().len().saturating_sub(1),
                part: replica_groups::part(attribute(frame, "table")?)?,
                memory: Memory::of(frame)?,
            };
            refuse_narrow(frame)?;
            body(&collective)
        })
    }
}

/// The first thing that a launch with collectives does, on every rank.
unsafe extern "C" fn begin(frame: *mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe {
        handle(frame, |frame| {
            let world = world()
                .ok_or_else(|| Error::internal("a program ran before the world was started"))?;
            let program = replica_groups::program(attribute(frame, "program")?)?;
            let ticket = ticket_of(frame.run_id()).unwrap_or(Ticket(0));
            let again = program.ran.swap(true, Ordering::Relaxed);
            world
                .engine
                .begin_collectives(ticket, &program.sequence, !again)
                .map_err(Error::from)
        })
    }
}

/// Elements of less than 8 bits may share bytes, so nothing here may move them by their number.
fn refuse_narrow(frame: &Frame<'_>) -> Result<(), Error> {
    let all = frame.raw_args().iter().chain(frame.raw_rets());
    for buffer in all {
        // SAFETY: XLA's buffers are valid during the call.
        let dtype = unsafe { (**buffer).dtype };
        if super::frame::is_narrow(dtype) {
            return Err(Error::internal(
                "a collective of a type of less than 8 bits is not supported; cast to a \
                 supported type first",
            ));
        }
    }
    Ok(())
}

fn attribute(frame: &Frame<'_>, name: &str) -> Result<i64, Error> {
    frame
        .integer(name)
        .ok_or_else(|| Error::internal(format!("a collective lacks its attribute {name}")))
}

impl Collective<'_> {
    fn arg(&self, index: usize) -> Result<Buffer<'_>, Error> {
        let found = self.frame.arg(index).filter(|_| index < self.operands);
        found.ok_or_else(|| Error::internal("a collective lacks an operand"))
    }

    fn ret(&self, index: usize) -> Result<Buffer<'_>, Error> {
        let found = self.frame.ret(index).filter(|_| index < self.results);
        found.ok_or_else(|| Error::internal("a collective lacks a result"))
    }

    /// The number of this rank's group, and its size; none if it is in none.
    fn group(&self) -> Result<Option<(i64, i64)>, Error> {
        match self.part {
            Part::Member { group, size, .. } => Ok(Some((group, size))),
            Part::None => Ok(None),
            _ => Err(Error::internal("a collective needs groups")),
        }
    }

    fn member(&self) -> Result<(i64, i64), Error> {
        self.group()?
            .ok_or_else(|| Error::internal("this rank is in no group of a collective"))
    }

    fn reduction(&self) -> Result<Reduction, Error> {
        let number = attribute(self.frame, "op")?;
        let row = usize::try_from(number).ok().and_then(|n| REDUCTIONS.get(n));
        Ok(row
            .ok_or_else(|| Error::internal(format!("op={number} is no reduction")))?
            .0)
    }

    /// How many blocks of each rank's part of array `index` lie apart in the whole.
    fn outer(&self, index: usize) -> usize {
        let outer = self.frame.integer(&format!("outer{index}")).unwrap_or(1);
        usize::try_from(outer).unwrap_or(1).max(1)
    }

    /// Whether any array has parts that lie apart.
    fn has_outer(&self) -> bool {
        self.frame.integer("outer0").is_some()
    }

    fn reduce(
        &self,
        group: i64,
        reduction: Reduction,
        send: Buffer<'_>,
        recv: Buffer<'_>,
    ) -> Result<(), Error> {
        self.execute(&Operation {
            reduction: Some(reduction),
            ..operation(Kind::Allreduce, group, send, recv)
        })
    }

    /// Where the arrays end that are reduced together with array `start`: small ones of one dtype.
    fn end_of_pack(&self, start: usize) -> Result<usize, Error> {
        let first = self.arg(start)?;
        let mut end = start + 1;
        let mut bytes = first.bytes();
        while self.memory.is_hosts() && end < self.operands && bytes <= LARGEST_PACK {
            let next = self.arg(end)?;
            bytes += next.bytes();
            if next.dtype != first.dtype || bytes > LARGEST_PACK {
                break;
            }
            end += 1;
        }
        Ok(end)
    }

    /// Reduces arrays as one: a message costs more than to copy a small array twice.
    fn reduce_packed(
        &self,
        group: i64,
        reduction: Reduction,
        arrays: Range<usize>,
    ) -> Result<(), Error> {
        let dtype = self.arg(arrays.start)?.dtype;
        let mut elements = 0;
        for index in arrays.clone() {
            elements += self.arg(index)?.elements();
        }
        let shape = [elements];
        let whole = Buffer {
            data: std::ptr::null_mut(),
            dtype,
            shape: &shape,
        };
        let bytes = elements as usize * dtype.size();
        let (mut out, mut back) = (self.memory.scratch(bytes)?, self.memory.scratch(bytes)?);
        let (send, recv) = (out.over(&whole), back.over(&whole));
        let mut place = 0;
        for index in arrays.clone() {
            let array = self.arg(index)?;
            self.memory.copy(&array, &part(&send, place, &array))?;
            place += array.bytes();
        }
        self.reduce(group, reduction, send, recv)?;
        place = 0;
        for index in arrays {
            let array = self.ret(index)?;
            self.memory.copy(&part(&recv, place, &array), &array)?;
            place += array.bytes();
        }
        Ok(())
    }

    fn execute(&self, op: &Operation<'_>) -> Result<(), Error> {
        let done = self.memory.execute(self.world, self.ticket, op);
        done.map_err(Error::from)
    }
}

/// An operation on `comm` that needs no more.
fn operation<'a>(kind: Kind, comm: i64, send: Buffer<'a>, recv: Buffer<'a>) -> Operation<'a> {
    Operation {
        of: Some("XLA's"),
        send_tag: TAG,
        recv_tag: TAG,
        ..Operation::new(kind, comm, send, recv)
    }
}

/// An array like `like`, `place` bytes after the start of `whole`.
fn part<'a>(whole: &Buffer<'_>, place: usize, like: &Buffer<'a>) -> Buffer<'a> {
    assert!(place + like.bytes() <= whole.bytes());
    Buffer {
        data: whole.data.wrapping_byte_add(place),
        ..*like
    }
}

unsafe extern "C" fn all_reduce(frame: *mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe {
        collective(frame, |call| {
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
        })
    }
}

unsafe extern "C" fn all_gather(frame: *mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe {
        collective(frame, |call| {
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
        })
    }
}

unsafe extern "C" fn reduce_scatter(frame: *mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe {
        collective(frame, |call| {
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
        })
    }
}

/// Block `i` goes to the group's member `i`, whose block becomes block `i` of the result: pairwise
/// exchanges without a copy (Thakur, Rabenseifner and Gropp, 2005, section 4.3). Blocks are arrays of
/// their own, or parts of one.
unsafe extern "C" fn all_to_all(frame: *mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe {
        collective(frame, |call| {
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
        })
    }
}

unsafe extern "C" fn all_to_all_array(frame: *mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe {
        collective(frame, |call| {
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
        })
    }
}

unsafe extern "C" fn collective_permute(frame: *mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe {
        collective(frame, |call| {
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
                            ..operation(
                                Kind::Sendrecv,
                                mpi_runtime::mpi::communicators::COLLECTIVES,
                                send,
                                recv,
                            )
                        })?;
                    }
                }
            }
            Ok(())
        })
    }
}

/// The group's first member sends; who is in no group has zeros.
unsafe extern "C" fn collective_broadcast(frame: *mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe {
        collective(frame, |call| {
            let group = call.group()?;
            for index in 0..call.operands {
                let (send, recv) = (call.arg(index)?, call.ret(index)?);
                match group {
                    Some((group, _)) => call.execute(&operation(Kind::Bcast, group, send, recv))?,
                    None => call.memory.clear(&recv)?,
                }
            }
            Ok(())
        })
    }
}

/// The partition or replica that this rank's device runs.
unsafe extern "C" fn id(frame: *mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe {
        handle(frame, |frame| {
            let Part::Value(value) = replica_groups::part(attribute(frame, "table")?)? else {
                return Err(Error::internal("this rank runs no part of the program"));
            };
            let result = frame
                .ret(0)
                .filter(|result| result.bytes() == size_of::<u32>());
            let result =
                result.ok_or_else(|| Error::internal("an id must be one number of 32 bits"))?;
            Memory::of(frame)?.write(&result, value)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_have_the_same_numbers_in_programs_and_in_the_engine() {
        let engine = REDUCTIONS.iter().map(|row| row.1);
        assert!(engine.eq(hlo_rewrite::REDUCTIONS));
    }
}
