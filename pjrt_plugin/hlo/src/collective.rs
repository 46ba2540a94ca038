//! Recognising collectives: what each does, as the target and the attributes of a custom call.

use std::collections::HashMap;

use crate::devices::{DeviceTable, Devices};
use crate::error::Refused;
use crate::instructions::{self, Form, Participants, Treatment};
use crate::module::Module;
use crate::proto::hlo::{HloInstructionProto, ShapeProto};
use crate::reduction::{self, REDUCTIONS};
use crate::replica_groups::{self, GroupMode};
use crate::shape::{self, results, shape_of};

/// A custom call that replaces an instruction.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// Its target, and what its instruction was.
    pub(crate) form: &'static Form,
    /// What it refers to.
    pub(crate) table: DeviceTable,
    /// Number of the reduction in [`REDUCTIONS`].
    pub(crate) reduction: Option<usize>,
    /// For each array: how many blocks of each rank's lie apart from each other in the whole (1:
    /// those of a rank are contiguous). Empty if all are 1.
    pub(crate) outer: Vec<i64>,
    /// The number of its place, if ranks compare it by itself.
    pub(crate) place: Option<i64>,
}

impl Call {
    /// Whether it communicates, so that it takes part in the order.
    pub(crate) fn is_ordered(&self) -> bool {
        self.form.communicates()
    }
}

/// Calls by the computation and the instruction that they replace.
pub(crate) type Calls = HashMap<(i64, i64), Call>;

/// The custom calls for all instructions of `module` that need one.
pub(crate) fn recognise_all(module: &Module, devices: &Devices) -> Result<Calls, Refused> {
    let mut calls = Calls::new();
    for computation in module.computations() {
        let shapes: HashMap<i64, ShapeProto> = computation
            .instructions
            .iter()
            .map(|instruction| (instruction.id, shape_of(instruction)))
            .collect();
        for instruction in &computation.instructions {
            if let Some(call) = recognise(instruction, &shapes, module, devices)? {
                calls.insert((computation.id, instruction.id), call);
            }
        }
    }
    Ok(calls)
}

/// The custom call for an instruction among others of these shapes; none if it needs none.
fn recognise(
    instruction: &HloInstructionProto,
    shapes: &HashMap<i64, ShapeProto>,
    module: &Module,
    devices: &Devices,
) -> Result<Option<Call>, Refused> {
    let bad = |reason: &str| Refused::instruction(instruction, reason);
    let form = match instructions::treatment(instruction) {
        Some(Treatment::Call(form)) => form,
        Some(Treatment::Unsupported | Treatment::Start { .. }) => {
            return Err(bad("this form is not supported yet"));
        }
        None if names_devices(instruction) => {
            return Err(bad("this kind of collective is not known here"));
        }
        Some(Treatment::Kept | Treatment::Wrapper) | None => return Ok(None),
    };
    if !instruction.dynamic_slice_sizes.is_empty() {
        return Err(bad("it writes into slices of another array"));
    }
    let table = participants(instruction, form.participants, devices)?;
    let outer = form.shapes.check(instruction, shapes, &table)?;
    let reduction = form.reduces.then(|| reduction::number(instruction, module));
    Ok(Some(Call {
        form,
        table,
        reduction: reduction.transpose()?,
        outer,
        place: None,
    }))
}

fn participants(
    instruction: &HloInstructionProto,
    participants: Participants,
    devices: &Devices,
) -> Result<DeviceTable, Refused> {
    let bad = |reason: &str| Refused::instruction(instruction, reason);
    let by_global_ids = instruction.use_global_device_ids;
    let mode = |flag| GroupMode::of(instruction.channel_id > 0, flag);
    let mode_by_channel = || {
        let reason = "it uses global device ids, which this kind does not have";
        let mode = mode(None).filter(|_| !by_global_ids);
        mode.ok_or_else(|| bad(reason))
    };
    let groups = |mode| replica_groups::resolve(instruction, mode, devices);
    Ok(match participants {
        Participants::GroupsByFlag => {
            let reason = "it uses global device ids without a channel";
            let mode = mode(Some(by_global_ids)).ok_or_else(|| bad(reason))?;
            DeviceTable::Groups(groups(mode)?)
        }
        Participants::Groups => DeviceTable::Groups(groups(mode_by_channel()?)?),
        Participants::Pairs => {
            let pairs = replica_groups::pairs(instruction, mode_by_channel()?, devices)?;
            DeviceTable::Pairs(pairs)
        }
        Participants::Partition => DeviceTable::Values(devices.values(false)),
        Participants::Replica => DeviceTable::Values(devices.values(true)),
    })
}

/// Whether an instruction of a kind that we do not know names devices.
fn names_devices(instruction: &HloInstructionProto) -> bool {
    instruction.channel_id > 0
        || !instruction.replica_groups.is_empty()
        || !instruction.source_target_pairs.is_empty()
        || instruction.collective_device_list.is_some()
        || instruction.iota_collective_device_list.is_some()
        || instruction.mesh_axes_replica_group_list.is_some()
}

/// What stands for `call` in the sequence that ranks compare.
pub(crate) fn describe(instruction: &HloInstructionProto, call: &Call) -> String {
    let shapes: Vec<String> = results(instruction).into_iter().map(shape::text).collect();
    let mut text = format!("{} {}", instruction.opcode, shapes.join(" "));
    if let Some(reduction) = call.reduction {
        text += " ";
        text += REDUCTIONS[reduction];
    }
    match &call.table {
        DeviceTable::Groups(groups) => text + &format!(" among {groups:?}"),
        DeviceTable::Pairs(pairs) => text + &format!(" along {pairs:?}"),
        DeviceTable::Values(_) => text,
    }
}
