//! Reductions: which of MPI's a computation is.

use crate::error::Refused;
use crate::module::Module;
use crate::proto::hlo::{HloComputationProto, HloInstructionProto};
use crate::shape::{PRED, results};

/// Reductions in the order of their numbers in custom calls (`include/mpi_cuda.h`).
pub const REDUCTIONS: [&str; 10] = [
    "SUM", "PROD", "MIN", "MAX", "LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR",
];

/// The number of the reduction that an instruction's computation is.
pub(crate) fn number(instruction: &HloInstructionProto, module: &Module) -> Result<usize, Refused> {
    let [computation] = instruction.called_computation_ids[..] else {
        return Err(Refused::instruction(instruction, "it has no computation"));
    };
    let computation = module.computation(computation)?;
    let opcode = binary(computation).ok_or_else(|| {
        let name = &computation.name;
        let reason = format!("its reduction {name} is not one operation of both its parameters");
        Refused::instruction(instruction, reason)
    })?;
    let results = results(instruction);
    let logical = results.iter().all(|shape| shape.element_type == PRED);
    let name = match (opcode, logical) {
        ("add", false) => "SUM",
        ("multiply", false) => "PROD",
        ("minimum", false) => "MIN",
        ("maximum", false) => "MAX",
        ("and" | "multiply" | "minimum", true) => "LAND",
        ("or" | "add" | "maximum", true) => "LOR",
        ("xor", true) => "LXOR",
        ("and", false) => "BAND",
        ("or", false) => "BOR",
        ("xor", false) => "BXOR",
        _ => "",
    };
    REDUCTIONS
        .iter()
        .position(|known| *known == name)
        .ok_or_else(|| {
            let reason = format!("its reduction is {opcode}, which MPI lacks");
            Refused::instruction(instruction, reason)
        })
}

/// The opcode of a computation that applies one operation to its two parameters.
fn binary(computation: &HloComputationProto) -> Option<&str> {
    let by_id = |id: i64| computation.instructions.iter().find(|i| i.id == id);
    // Conversions, as of 16-bit floats to 32 bits and back, are ours anyway.
    let bare = |mut id: i64| {
        for _ in 0..computation.instructions.len() {
            let instruction = by_id(id)?;
            match (instruction.opcode.as_str(), &instruction.operand_ids[..]) {
                ("convert" | "copy" | "bitcast", &[operand]) => id = operand,
                _ => return Some(instruction),
            }
        }
        None
    };
    let root = bare(computation.root_id)?;
    let [first, second] = root.operand_ids[..] else {
        return None;
    };
    let parameter = |id| {
        let found = bare(id)?;
        (found.opcode == "parameter").then_some(found.parameter_number)
    };
    let mut numbers = [parameter(first)?, parameter(second)?];
    numbers.sort_unstable();
    (numbers == [0, 1]).then_some(root.opcode.as_str())
}
