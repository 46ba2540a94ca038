//! What must hold of every module that comes out of rewriting.

use std::collections::{HashMap, HashSet};

use protobuf::Message;

use crate::Rewritten;
use crate::proto::hlo::{HloComputationProto, HloInstructionProto, HloModuleProto, ShapeProto};
use crate::shape::{TOKEN, shape_of, tuple};

type Computations<'a> = HashMap<i64, &'a HloComputationProto>;
type Instructions<'a> = HashMap<i64, &'a HloInstructionProto>;

/// Checks a rewritten module. Every value is there before it is used, with the schedule as with the
/// list. No collective is left. Called computations fit their callers. One token passes through all
/// ordered calls of a computation in order.
pub(super) fn check(rewritten: &Rewritten) -> HloModuleProto {
    let module = HloModuleProto::parse_from_bytes(&rewritten.module).unwrap();
    let by_id: Computations<'_> = module.computations.iter().map(|c| (c.id, c)).collect();
    assert_eq!(by_id.len(), module.computations.len());
    for computation in &module.computations {
        check_computation(computation, &by_id, rewritten.collectives > 0);
        if let Some(shape) = computation.program_shape.as_ref()
            && computation.id != module.entry_computation_id
        {
            assert_eq!(shape.parameters, parameters(computation));
            assert_eq!(shape.result.get_or_default(), &root(computation));
        }
    }
    check_schedule(&module, &by_id);
    module
}

fn check_computation(
    computation: &HloComputationProto,
    by_id: &Computations<'_>,
    has_collectives: bool,
) {
    let mut seen = Instructions::new();
    let mut last_token = None;
    for instruction in &computation.instructions {
        let place = format!("{} in {}", instruction.name, computation.name);
        for operand in &instruction.operand_ids {
            assert!(seen.contains_key(operand), "{place}");
        }
        assert!(!is_collective(&instruction.opcode), "{place}");
        check_shapes(instruction, &seen, by_id, &place);
        // Tokens that a program made for its own calls are not used any more.
        let made_before = instruction.name.starts_with("token.");
        let ordered = gives_token(&shape_of(instruction))
            && has_collectives
            && !made_before
            && !matches!(instruction.opcode.as_str(), "tuple" | "get-tuple-element");
        if ordered {
            check_token(instruction, &seen, last_token, &place);
            last_token = Some(instruction.id);
        }
        assert!(
            seen.insert(instruction.id, instruction).is_none(),
            "{place}"
        );
    }
    assert!(seen.contains_key(&computation.root_id));
    if gives_token(&root(computation)) && has_collectives {
        assert_eq!(Some(origin(&seen, computation.root_id)), last_token);
    }
}

/// The result fits the operands and what is called.
fn check_shapes(
    instruction: &HloInstructionProto,
    seen: &Instructions<'_>,
    by_id: &Computations<'_>,
    place: &str,
) {
    let operands = instruction.operand_ids.iter().map(|id| shape_of(seen[id]));
    let operands: Vec<ShapeProto> = operands.collect();
    let called = instruction
        .called_computation_ids
        .iter()
        .map(|id| by_id[id]);
    let called: Vec<&HloComputationProto> = called.collect();
    let result = shape_of(instruction);
    match instruction.opcode.as_str() {
        "while" => {
            assert_eq!(parameters(called[0]), operands, "{place}");
            assert_eq!(parameters(called[1]), operands, "{place}");
            assert_eq!(root(called[0]), result, "{place}");
            assert_eq!(operands[0], result, "{place}");
        }
        "conditional" => {
            for (branch, operand) in called.iter().zip(&operands[1..]) {
                assert_eq!(parameters(branch), std::slice::from_ref(operand), "{place}");
                assert_eq!(root(branch), result, "{place}");
            }
        }
        "call" => {
            assert_eq!(parameters(called[0]), operands, "{place}");
            assert_eq!(root(called[0]), result, "{place}");
        }
        "tuple" => assert_eq!(result, tuple(operands), "{place}"),
        "get-tuple-element" => {
            let index = instruction.tuple_index as usize;
            assert_eq!(operands[0].tuple_shapes[index], result, "{place}");
        }
        _ => {}
    }
}

/// The token that an ordered instruction takes is the one that the last one gave.
fn check_token(
    instruction: &HloInstructionProto,
    seen: &Instructions<'_>,
    last: Option<i64>,
    place: &str,
) {
    let Some(last) = last else {
        return;
    };
    let operands = instruction.operand_ids.iter();
    let tokens: Vec<&i64> = operands.filter(|id| leads_to_token(seen, **id)).collect();
    assert!(!tokens.is_empty(), "{place} takes no token");
    for id in tokens {
        assert_eq!(origin(seen, *id), last, "{place}");
    }
}

/// The schedule of a computation has all its instructions, each after its operands.
fn check_schedule(module: &HloModuleProto, by_id: &Computations<'_>) {
    let schedule = module.schedule.iter();
    for entry in schedule.flat_map(|schedule| &schedule.sequences) {
        let instructions = &by_id[&entry.key].instructions;
        let operands: HashMap<i64, &Vec<i64>> = instructions
            .iter()
            .map(|i| (i.id, &i.operand_ids))
            .collect();
        let mut done = HashSet::new();
        for id in &entry.value.instruction_ids {
            assert!(operands[id].iter().all(|operand| done.contains(operand)));
            assert!(done.insert(*id));
        }
        assert_eq!(done.len(), instructions.len());
    }
}

fn is_collective(opcode: &str) -> bool {
    let kinds = [
        "all-",
        "reduce-scatter",
        "collective-",
        "partition-id",
        "replica-id",
    ];
    kinds.iter().any(|kind| opcode.starts_with(kind))
}

fn gives_token(shape: &ShapeProto) -> bool {
    shape.element_type == TOKEN || shape.tuple_shapes.iter().any(|s| s.element_type == TOKEN)
}

fn leads_to_token(seen: &Instructions<'_>, id: i64) -> bool {
    gives_token(&shape_of(seen[&id]))
}

/// The ordered instruction whose token `id` is or holds.
fn origin(seen: &Instructions<'_>, id: i64) -> i64 {
    let instruction = seen[&id];
    match instruction.opcode.as_str() {
        "get-tuple-element" => origin(seen, instruction.operand_ids[0]),
        "tuple" => {
            let mut with = instruction.operand_ids.iter();
            let operand = with.rfind(|id| leads_to_token(seen, **id)).unwrap();
            origin(seen, *operand)
        }
        _ => id,
    }
}

fn parameters(computation: &HloComputationProto) -> Vec<ShapeProto> {
    let mut found: Vec<&HloInstructionProto> = computation
        .instructions
        .iter()
        .filter(|i| i.opcode == "parameter")
        .collect();
    found.sort_by_key(|parameter| parameter.parameter_number);
    found.into_iter().map(shape_of).collect()
}

fn root(computation: &HloComputationProto) -> ShapeProto {
    let found = computation
        .instructions
        .iter()
        .find(|i| i.id == computation.root_id);
    shape_of(found.unwrap())
}
