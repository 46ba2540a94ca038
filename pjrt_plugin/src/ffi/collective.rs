//! One collective of a launch: its arrays, its group, and how it is executed. Operands lie
//! contiguously as MPI wants them; the last operand and the last result are the token.

use std::ops::Range;

use mpi_runtime::engine::collectives::TAG;
use mpi_runtime::operation::{OF_XLA, REDUCTIONS};
use mpi_runtime::{Buffer, Kind, Operation, Reduction, Ticket, World};

use super::collective_contract::{CollectiveContract, Outer};
use super::contract::{Field, Values};
use super::frame::{Frame, array};
use crate::error::Error;
use crate::ffi::memory::Memory;
use crate::ffi::replica_groups::{self, Part};
use crate::launch::completion::noted;
use crate::launch::ticket::ticket_of;
use crate::plugin::world;

/// Arrays are reduced together up to so many bytes.
const LARGEST_PACK: usize = 64 << 10;

/// One collective of this launch, whose call has been checked.
pub struct Collective<'a> {
    pub frame: &'a Frame<'a>,
    pub world: &'a World,
    pub ticket: Ticket,
    /// Number of arrays in and out.
    pub operands: usize,
    pub results: usize,
    pub part: Part,
    pub memory: Memory<'a>,
    values: Values<'a>,
    outer: Outer,
}

/// Runs `body` for a collective of the launch.
pub fn run(
    contract: &CollectiveContract,
    frame: &Frame<'_>,
    body: impl FnOnce(&Collective<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    noted(run_checked(contract, frame, body))
}

fn run_checked(
    contract: &CollectiveContract,
    frame: &Frame<'_>,
    body: impl FnOnce(&Collective<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    let world =
        world().ok_or_else(|| Error::internal("a collective ran before the world was started"))?;
    let (values, outer) = contract.attributes(frame)?;
    let part = replica_groups::part(values.get(Field::Table))?;
    let size = match part {
        Part::Member { size, .. } => Some(size),
        _ => None,
    };
    contract.arrays(frame, &outer, size)?;
    body(&Collective {
        frame,
        world,
        ticket: ticket_of(frame.run_id()).unwrap_or(Ticket(0)),
        operands: frame.args.len() - 1,
        results: frame.rets.len() - 1,
        part,
        memory: Memory::of(frame)?,
        values,
        outer,
    })
}

impl Collective<'_> {
    pub fn arg(&self, index: usize) -> Result<Buffer<'_>, Error> {
        let found = self.frame.args[..self.operands].get(index);
        let found = found.ok_or_else(|| Error::internal("a collective lacks an operand"))?;
        Ok(array(found))
    }

    pub fn ret(&self, index: usize) -> Result<Buffer<'_>, Error> {
        let found = self.frame.rets[..self.results].get(index);
        let found = found.ok_or_else(|| Error::internal("a collective lacks a result"))?;
        Ok(array(found))
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
        let number = self.values.get(Field::Op);
        let row = usize::try_from(number).ok().and_then(|n| REDUCTIONS.get(n));
        Ok(row
            .ok_or_else(|| Error::internal(format!("op={number} is no reduction")))?
            .0)
    }

    /// How many blocks of each rank's part of array `index` lie apart in the whole.
    pub fn outer(&self, index: usize) -> usize {
        self.outer.get(index).copied().unwrap_or(1)
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
            if next.dtype() != first.dtype() || bytes > LARGEST_PACK {
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
        self.packed(arrays.clone(), |send| {
            self.unpacked(arrays, |recv| self.reduce(group, reduction, send, recv))
        })
    }

    /// Calls `use_it` with operands of one type as one array.
    pub fn packed(
        &self,
        arrays: Range<usize>,
        use_it: impl FnOnce(Buffer<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let arrays: Vec<Buffer<'_>> = arrays.map(|i| self.arg(i)).collect::<Result<_, _>>()?;
        let shape = [arrays.iter().map(Buffer::elements).sum()];
        let whole = Buffer::described(arrays[0].dtype(), &shape);
        let mut memory = self.memory.scratch(whole.bytes())?;
        let send = memory.over(&whole);
        let mut place = 0;
        for array in &arrays {
            self.memory.copy(array, &send.part(place, array))?;
            place += array.bytes();
        }
        use_it(send)
    }

    /// Has `fill` fill one array, which it cuts into results of one type.
    pub fn unpacked(
        &self,
        arrays: Range<usize>,
        fill: impl FnOnce(Buffer<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let arrays: Vec<Buffer<'_>> = arrays.map(|i| self.ret(i)).collect::<Result<_, _>>()?;
        let shape = [arrays.iter().map(Buffer::elements).sum()];
        let whole = Buffer::described(arrays[0].dtype(), &shape);
        let mut memory = self.memory.scratch(whole.bytes())?;
        let recv = memory.over(&whole);
        fill(recv)?;
        let mut place = 0;
        for array in &arrays {
            self.memory.copy(&recv.part(place, array), array)?;
            place += array.bytes();
        }
        Ok(())
    }

    pub fn execute(&self, op: &Operation<'_>) -> Result<(), Error> {
        let done = match self.values.get(Field::Place) {
            0 => self.memory.execute(self.world, self.ticket, op),
            place => self
                .memory
                .execute(self.world, self.ticket, &self.at(op, place as u64)),
        };
        done.map_err(Error::from)
    }

    /// Compares a collective that is executed as messages, if those of this program are compared.
    pub fn compare(&self, op: &Operation<'_>) -> Result<(), Error> {
        match self.values.get(Field::Place) {
            0 => Ok(()),
            place => self
                .world
                .engine
                .compare(self.ticket, &self.at(op, place as u64))
                .map_err(Error::from),
        }
    }

    /// An operation at that place of its program.
    fn at<'o>(&self, op: &Operation<'o>, place: u64) -> Operation<'o> {
        let tag = self.world.engine.tag_at(place);
        Operation {
            place,
            send_tag: tag,
            recv_tag: tag,
            ..*op
        }
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
