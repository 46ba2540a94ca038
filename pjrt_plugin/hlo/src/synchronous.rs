//! Collectives in two halves become whole ones.
//!
//! XLA:GPU starts a collective in one instruction and waits for it in another: `all-reduce-start`
//! and `all-reduce-done`, likewise all-gather and collective-permute, and `async-start` and
//! `async-done` around a computation with any other (xla/hlo/ir/hlo_instructions.h,
//! `HloAsyncInstruction`). The whole happens where it started: what it reads is there, and its
//! result has memory from then on.

use std::collections::{HashMap, HashSet};

use protobuf::MessageField;

use crate::error::Refused;
use crate::instructions::{self, Treatment, is_collective};
use crate::module::Module;
use crate::proto::hlo::HloInstructionProto;
use crate::shape::shape_of;

/// Makes every pair of `module` one instruction.
pub(crate) fn join(module: &mut Module) -> Result<(), Refused> {
    let ids: Vec<i64> = module.computations().iter().map(|c| c.id).collect();
    let mut unused = HashSet::new();
    for id in ids {
        let computation = module.computation(id)?;
        let mut whole = HashMap::new();
        for instruction in &computation.instructions {
            if let Some(joined) = joined(module, instruction)? {
                unused.extend(&instruction.called_computation_ids);
                whole.insert(instruction.id, joined);
            }
        }
        if !whole.is_empty() {
            rewrite(module, id, whole)?;
        }
    }
    module.remove_uncalled(unused);
    Ok(())
}

/// The whole collective that an instruction starts, if it does.
fn joined(
    module: &Module,
    start: &HloInstructionProto,
) -> Result<Option<HloInstructionProto>, Refused> {
    let (opcode, with_operands) = match instructions::treatment(start) {
        Some(&Treatment::Start {
            whole,
            with_operands,
        }) => (whole, with_operands),
        Some(Treatment::Wrapper) => return wrapped(module, start),
        _ => return Ok(None),
    };
    let mut whole = start.clone();
    whole.opcode = opcode.into();
    if with_operands {
        let result = shape_of(start).tuple_shapes.get(1).cloned();
        let result = result.ok_or_else(|| Refused::instruction(start, "its result is no pair"))?;
        whole.shape = MessageField::some(result);
    }
    Ok(Some(whole))
}

/// The one collective of the computation that an `async-start` calls; none if there is none in it.
fn wrapped(
    module: &Module,
    start: &HloInstructionProto,
) -> Result<Option<HloInstructionProto>, Refused> {
    let &[called] = &start.called_computation_ids[..] else {
        return Err(Refused::instruction(start, "it calls not one computation"));
    };
    let called = module.computation(called)?;
    if !called.instructions.iter().any(is_collective) {
        return Ok(None);
    }
    let root = called.instructions.iter().find(|i| i.id == called.root_id);
    let others = called
        .instructions
        .iter()
        .filter(|i| i.id != called.root_id);
    let is_only = others.into_iter().all(|i| i.opcode == "parameter");
    let root = root
        .filter(|root| is_only && is_collective(root))
        .ok_or_else(|| {
            let reason = "it starts several collectives at once, or more than that";
            Refused::instruction(start, reason)
        })?;
    let operand = |id: &i64| {
        let parameter = called.instructions.iter().find(|i| i.id == *id)?;
        let number = usize::try_from(parameter.parameter_number).ok()?;
        start.operand_ids.get(number).copied()
    };
    let operands: Option<Vec<i64>> = root.operand_ids.iter().map(operand).collect();
    let operands = operands.ok_or_else(|| Refused::instruction(start, "an operand is missing"))?;
    let mut whole = root.clone();
    (whole.id, whole.name) = (start.id, start.name.clone());
    whole.operand_ids = operands;
    whole
        .control_predecessor_ids
        .clone_from(&start.control_predecessor_ids);
    Ok(Some(whole))
}

/// Puts the whole collectives of a computation in place of what starts them, and takes away what
/// waits for them.
fn rewrite(
    module: &mut Module,
    id: i64,
    mut whole: HashMap<i64, HloInstructionProto>,
) -> Result<(), Refused> {
    let before = module.ordered(id)?;
    let root = module.computation(id)?.root_id;
    let mut stands_for: HashMap<i64, i64> = HashMap::new();
    let mut after = Vec::with_capacity(before.len());
    for mut instruction in before {
        let first = instruction.operand_ids.first();
        let waits_for = first.and_then(|id| stands_for.get(id)).copied();
        let waits = instruction.opcode.ends_with("-done") || instruction.opcode == "async-update";
        if let Some(start) = waits_for.filter(|_| waits) {
            stands_for.insert(instruction.id, start);
            continue;
        }
        if instruction
            .operand_ids
            .iter()
            .any(|id| stands_for.get(id) == Some(id))
        {
            let reason = "it reads the start of a collective, which only what waits for it may";
            return Err(Refused::instruction(&instruction, reason));
        }
        if let Some(joined) = whole.remove(&instruction.id) {
            stands_for.insert(instruction.id, instruction.id);
            instruction = joined;
        }
        after.push(instruction);
    }
    let follow = |id: &mut i64| {
        if let Some(start) = stands_for.get(id) {
            *id = *start;
        }
    };
    for instruction in &mut after {
        instruction.operand_ids.iter_mut().for_each(follow);
        instruction
            .control_predecessor_ids
            .iter_mut()
            .for_each(follow);
        let own = instruction.id;
        instruction
            .control_predecessor_ids
            .retain(|before| *before != own);
    }
    let mut root = root;
    follow(&mut root);
    module.replace(id, after, root);
    Ok(())
}
