//! A module with what rewriting needs: lookups, fresh ids, and the shapes of instructions.

use std::collections::{HashMap, HashSet};

use protobuf::MessageField;

use crate::error::Refused;
use crate::proto::hlo::hlo_schedule_proto::InstructionSequence;
use crate::proto::hlo::{
    HloComputationProto, HloInstructionProto, HloModuleProto, ProgramShapeProto, ShapeProto,
};
use crate::shape::shape_of;

/// A module and its indices.
pub(crate) struct Module {
    proto: HloModuleProto,
    /// Position of each computation.
    positions: HashMap<i64, usize>,
    /// The last id given out in the module, or, where ids contain that of their computation, none.
    last_id: Option<i64>,
}

impl Module {
    pub(crate) fn new(proto: HloModuleProto) -> Result<Module, Refused> {
        let positions = positions(&proto.computations);
        if positions.len() != proto.computations.len() {
            let reason = "two of its computations have the same id";
            return Err(Refused::inconsistent(reason));
        }
        let mut last_id = 0;
        let mut compound = false;
        for computation in &proto.computations {
            for instruction in &computation.instructions {
                last_id = last_id.max(instruction.id);
                compound |= instruction.id >> 32 != 0;
            }
        }
        if !positions.contains_key(&proto.entry_computation_id) {
            return Err(Refused::inconsistent("it has no entry computation"));
        }
        Ok(Module {
            proto,
            positions,
            last_id: (!compound).then_some(last_id),
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.proto.name
    }

    pub(crate) fn entry(&self) -> i64 {
        self.proto.entry_computation_id
    }

    pub(crate) fn computations(&self) -> &[HloComputationProto] {
        &self.proto.computations
    }

    pub(crate) fn computation(&self, id: i64) -> Result<&HloComputationProto, Refused> {
        self.positions
            .get(&id)
            .map(|&position| &self.proto.computations[position])
            .ok_or_else(|| Refused::inconsistent(format!("there is no computation {id}")))
    }

    /// The instructions of a computation in the order of its schedule, or as they stand.
    pub(crate) fn ordered(&self, id: i64) -> Result<Vec<HloInstructionProto>, Refused> {
        let computation = self.computation(id)?;
        let sequence = self
            .proto
            .schedule
            .iter()
            .flat_map(|schedule| &schedule.sequences)
            .find(|entry| entry.key == id);
        let Some(sequence) = sequence else {
            return Ok(computation.instructions.clone());
        };
        let by_id: HashMap<i64, &HloInstructionProto> = computation
            .instructions
            .iter()
            .map(|instruction| (instruction.id, instruction))
            .collect();
        let scheduled = &sequence.value.instruction_ids;
        let ordered: Option<Vec<HloInstructionProto>> = scheduled
            .iter()
            .map(|id| by_id.get(id).map(|&instruction| instruction.clone()))
            .collect();
        ordered
            .filter(|ordered| ordered.len() == computation.instructions.len())
            .ok_or_else(|| {
                Refused::inconsistent(format!(
                    "the schedule of {} is incomplete",
                    computation.name
                ))
            })
    }

    /// Replaces the instructions of a computation, its root and its schedule.
    pub(crate) fn replace(&mut self, id: i64, instructions: Vec<HloInstructionProto>, root: i64) {
        if let Some(schedule) = self.proto.schedule.as_mut()
            && let Some(entry) = schedule.sequences.iter_mut().find(|entry| entry.key == id)
        {
            entry.value = MessageField::some(InstructionSequence {
                instruction_ids: instructions
                    .iter()
                    .map(|instruction| instruction.id)
                    .collect(),
                ..Default::default()
            });
        }
        let is_entry = id == self.entry();
        let Some(&position) = self.positions.get(&id) else {
            return;
        };
        let computation = &mut self.proto.computations[position];
        computation.root_id = root;
        computation.instructions = instructions;
        if !is_entry {
            computation.program_shape = MessageField::some(program_shape(computation));
        }
    }

    /// Removes those of some computations that nothing calls.
    pub(crate) fn remove_uncalled(&mut self, mut ids: HashSet<i64>) {
        ids.remove(&self.entry());
        let computations = self.proto.computations.iter();
        for instruction in computations.flat_map(|computation| &computation.instructions) {
            for called in &instruction.called_computation_ids {
                ids.remove(called);
            }
        }
        self.proto.computations.retain(|c| !ids.contains(&c.id));
        self.positions = positions(&self.proto.computations);
        if let Some(schedule) = self.proto.schedule.as_mut() {
            schedule.sequences.retain(|entry| !ids.contains(&entry.key));
        }
    }

    /// Whether results take the memory of parameters.
    pub(crate) fn has_aliases(&self) -> bool {
        let aliases = self.proto.input_output_alias.as_ref();
        aliases.is_some_and(|aliases| !aliases.entries.is_empty())
    }

    /// A new id for an instruction of `computation`, of which `used` are the ids so far.
    pub(crate) fn fresh_id(&mut self, used: &[HloInstructionProto], more: &[i64]) -> i64 {
        match &mut self.last_id {
            Some(last) => {
                *last += 1;
                *last
            }
            None => {
                let ids = used.iter().map(|instruction| instruction.id);
                ids.chain(more.iter().copied()).max().unwrap_or(0) + 1
            }
        }
    }

    /// The layouts of parameters and result.
    pub(crate) fn layouts(&self) -> Layouts {
        let shape = self.proto.host_program_shape.as_ref();
        Layouts {
            parameters: shape.map_or_else(Vec::new, |shape| shape.parameters.clone()),
            result: shape.and_then(|shape| shape.result.as_ref().cloned()),
        }
    }

    pub(crate) fn into_proto(self) -> HloModuleProto {
        self.proto
    }
}

/// Shapes with layouts of a module's parameters and its result.
#[derive(Clone, Debug, Default)]
pub struct Layouts {
    pub(crate) parameters: Vec<ShapeProto>,
    pub(crate) result: Option<ShapeProto>,
}

fn positions(computations: &[HloComputationProto]) -> HashMap<i64, usize> {
    let ids = computations.iter().map(|computation| computation.id);
    ids.zip(0..).collect()
}

fn program_shape(computation: &HloComputationProto) -> ProgramShapeProto {
    let mut parameters: Vec<&HloInstructionProto> = computation
        .instructions
        .iter()
        .filter(|instruction| instruction.opcode == "parameter")
        .collect();
    parameters.sort_by_key(|parameter| parameter.parameter_number);
    let root = computation
        .instructions
        .iter()
        .find(|instruction| instruction.id == computation.root_id);
    ProgramShapeProto {
        parameters: parameters.iter().map(|p| shape_of(p)).collect(),
        parameter_names: parameters.iter().map(|p| p.name.clone()).collect(),
        result: root.map(shape_of).into(),
        ..Default::default()
    }
}
