//! One collective of a launch: its arrays, its group, and how it is executed. Operands lie
//! contiguously as MPI wants them; the last operand and the last result are the token.

use std::ops::Range;

use mpi_runtime::engine::collectives::{OF_XLA, TAG};
use mpi_runtime::operation::REDUCTIONS;
use mpi_runtime::{Buffer, Kind, Operation, Reduction, Ticket, World};

use super::frame::{Frame, is_narrow};
use super::handler::{Handler, handler};
use crate::error::Error;
use crate::ffi::memory::Memory;
use crate::ffi::replica_groups::{self, Part};
use crate::launch::ticket::ticket_of;
use crate::plugin::world;

/// Arrays are reduced together up to so many bytes.
const LARGEST_PACK: usize = 64 << 10;

/// One collective of this launch.
pub struct Collective<'a> {
    pub frame: &'a Frame<'a>,
    pub world: &'a World,
    pub ticket: Ticket,
    /// Number of arrays in and out.
    pub operands: usize,
    pub results: usize,
    pub part: Part,
    pub memory: Memory<'a>,
}

/// The handler that runs `body` for a collective of the launch.
pub const fn collective<F>(body: F) -> Handler
where
    F: Fn(&Collective<'_>) -> Result<(), Error> + Copy,
{
    handler(move |frame: &Frame<'_>| {
        let world = world()
            .ok_or_else(|| Error::internal("a collective ran before the world was started"))?;
        let collective = Collective {
            frame,
            world,
            ticket: ticket_of(frame.run_id()).unwrap_or(Ticket(0)),
            operands: frame.args.len().saturating_sub(1),
            results: frame.rets.len().saturating_sub(1),
            part: replica_groups::part(attribute(frame, "table")?)?,
            memory: Memory::of(frame)?,
        };
        refuse_narrow(frame)?;
        body(&collective)
    })
}

/// Elements of less than 8 bits may share bytes, so nothing here may move them by their number.
fn refuse_narrow(frame: &Frame<'_>) -> Result<(), Error> {
    let mut all = frame.args.iter().chain(frame.rets);
    if all.any(|buffer| is_narrow(buffer.dtype)) {
        return Err(Error::internal(
            "a collective of a type of less than 8 bits is not supported; cast to a supported type \
             first",
        ));
    }
    Ok(())
}

/// A number that stands in every program with collectives.
pub fn attribute(frame: &Frame<'_>, name: &str) -> Result<i64, Error> {
    frame
        .integer(name)
        .ok_or_else(|| Error::internal(format!("a collective lacks its attribute {name}")))
}

impl Collective<'_> {
    pub fn arg(&self, index: usize) -> Result<Buffer<'_>, Error> {
        let found = self.frame.arg(index).filter(|_| index < self.operands);
        found.ok_or_else(|| Error::internal("a collective lacks an operand"))
    }

    pub fn ret(&self, index: usize) -> Result<Buffer<'_>, Error> {
        let found = self.frame.ret(index).filter(|_| index < self.results);
        found.ok_or_else(|| Error::internal("a collective lacks a result"))
    }

    /// The number of this rank's group, and its size; none if it is in none.
    pub fn group(&self) -> Result<Option<(i64, i64)>, Error> {
        match self.part {
            Part::Member { group, size, .. } => Ok(Some((group, size))),
            Part::None => Ok(None),
            _ => Err(Error::internal("a collective needs groups")),
        }
    }

    pub fn member(&self) -> Result<(i64, i64), Error> {
        self.group()?
            .ok_or_else(|| Error::internal("this rank is in no group of a collective"))
    }

    pub fn reduction(&self) -> Result<Reduction, Error> {
        let number = attribute(self.frame, "op")?;
        let row = usize::try_from(number).ok().and_then(|n| REDUCTIONS.get(n));
        Ok(row
            .ok_or_else(|| Error::internal(format!("op={number} is no reduction")))?
            .0)
    }

    /// How many blocks of each rank's part of array `index` lie apart in the whole.
    pub fn outer(&self, index: usize) -> usize {
        let outer = self.frame.integer(&format!("outer{index}")).unwrap_or(1);
        usize::try_from(outer).unwrap_or(1).max(1)
    }

    /// Whether any array has parts that lie apart.
    pub fn has_outer(&self) -> bool {
        self.frame.integer("outer0").is_some()
    }

    pub fn reduce(
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
    pub fn end_of_pack(&self, start: usize) -> Result<usize, Error> {
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
    pub fn reduce_packed(
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

    pub fn execute(&self, op: &Operation<'_>) -> Result<(), Error> {
        let done = self.memory.execute(self.world, self.ticket, op);
        done.map_err(Error::from)
    }
}

/// An operation on `comm` that needs no more.
pub fn operation<'a>(kind: Kind, comm: i64, send: Buffer<'a>, recv: Buffer<'a>) -> Operation<'a> {
    Operation {
        of: Some(OF_XLA),
        send_tag: TAG,
        recv_tag: TAG,
        ..Operation::new(kind, comm, send, recv)
    }
}

/// An array like `like`, `place` bytes after the start of `whole`.
pub fn part<'a>(whole: &Buffer<'_>, place: usize, like: &Buffer<'a>) -> Buffer<'a> {
    assert!(place + like.bytes() <= whole.bytes());
    Buffer {
        data: whole.data.wrapping_byte_add(place),
        ..*like
    }
}
