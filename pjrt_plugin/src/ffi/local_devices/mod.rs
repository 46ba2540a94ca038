//! Collectives of a program that runs on several devices of this rank at once
//! (`MPI_CUDA_LOCAL_DEVICES`). Its parts meet at each (`launch/meeting.rs`), and the last to come
//! executes it for all of them: first among the devices of the rank, then between ranks.

mod collectives;
pub mod groups;

use std::sync::Arc;

use hlo_rewrite::DeviceTable;
use mpi_runtime::{CollectiveSequence, LentArray, Ticket, World};

use super::collective_contract::{CollectiveContract, Rule};
use super::contract::{Field, Values};
use super::frame::{Frame, array};
use crate::error::Error;
use crate::ffi::replica_groups;
use crate::launch::meeting::Several;
use crate::launch::meeting_call::Call;
use crate::plugin::world;

/// A part of a launch: its launch, and its place there.
type Part = (Arc<Several>, usize);

/// Begins a launch of that program, of which `program` is the number, once all parts have begun.
pub fn begin(
    (several, place): &Part,
    world: &World,
    number: i64,
    program: &CollectiveSequence,
) -> Result<(), Error> {
    let call = Call {
        target: super::contracts::BEGIN.target,
        numbers: [number, 0, 0, 0],
        outer: Vec::new(),
        args: Vec::new(),
        rets: Vec::new(),
    };
    several.meet(*place, call, |_| {
        let begun = world.engine.begin_collectives(ticket_of(several)?, program);
        begun.map_err(Error::from)
    })
}

/// The partition or replica that a part's device runs.
pub fn id((several, place): &Part, table: i64) -> Result<u32, Error> {
    let device = several.devices()[*place];
    let value = match &*replica_groups::table(table)? {
        DeviceTable::Values(values) => values.iter().find(|value| value.0 == device).copied(),
        _ => None,
    };
    let found = value.map(|(_, value)| value);
    found.ok_or_else(|| Error::internal(format!("device {device} runs no part of the program")))
}

/// Runs a part's collective.
pub fn run(
    contract: &CollectiveContract,
    frame: &Frame<'_>,
    (several, place): &Part,
) -> Result<(), Error> {
    let world =
        world().ok_or_else(|| Error::internal("a collective ran before the world was started"))?;
    let (values, outer) = contract.attributes(frame)?;
    if matches!(contract.rule, Rule::Started | Rule::Ended) {
        return Err(Error::unimplemented(
            "all-reduces that are started early (MPI_CUDA_OVERLAP) are for ranks with one device",
        ));
    }
    let table = replica_groups::table(values.get(Field::Table))?;
    let device = several.devices()[*place];
    contract.arrays(frame, &outer, groups::size_of(&table, device))?;
    let lend = |given: &[&pjrt_sys::XLA_FFI_Buffer]| -> Vec<LentArray> {
        let arrays = given[..given.len() - 1].iter();
        // SAFETY: they are valid during this call, which returns when the meeting is over. XLA
        // neither writes operands meanwhile nor reads results, whose memory is theirs alone.
        arrays
            .map(|given| unsafe { LentArray::new(array(given)) })
            .collect()
    };
    let call = Call {
        target: contract.call.target,
        numbers: numbers(&values),
        args: lend(frame.args),
        rets: lend(frame.rets),
        outer,
    };
    several.meet(*place, call, |calls| {
        collectives::execute(world, several, contract.call.target, &table, calls)
    })
}

fn ticket_of(several: &Several) -> Result<Ticket, Error> {
    let none = || Error::internal("a collective of a launch without a ticket");
    several.ticket().ok_or_else(none)
}

/// The attributes that the parts' calls have in common.
fn numbers(values: &Values<'_>) -> [i64; 4] {
    [Field::Table, Field::Op, Field::Place, Field::Program].map(|field| values.get(field))
}
