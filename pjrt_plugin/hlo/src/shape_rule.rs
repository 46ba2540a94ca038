//! How the shapes of a collective's operands and results belong together.

use std::collections::HashMap;

use crate::devices::DeviceTable;
use crate::error::Refused;
use crate::proto::hlo::{HloInstructionProto, ShapeProto};
use crate::shape::{Physical, results};

/// What holds between operands and results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShapeRule {
    /// Each result is as its operand.
    Same,
    /// Each result is the operands of the whole group, joined along a dimension.
    Gathered,
    /// Each operand is the results of the whole group, joined along a dimension.
    Scattered,
    /// Operands and results are blocks, one for each member of the group.
    Blocks,
    /// Operand and result hold a block for each member of the group, along a dimension.
    Divided,
    /// There is no operand.
    Number,
}

impl ShapeRule {
    /// Checks an instruction among the devices of `table`, with the shapes of its computation. The
    /// result says for each array how many blocks of each rank's part lie apart from each other in
    /// the whole (1: those of a rank are contiguous); it is empty if all are 1.
    pub(crate) fn check(
        self,
        instruction: &HloInstructionProto,
        shapes: &HashMap<i64, ShapeProto>,
        table: &DeviceTable,
    ) -> Result<Vec<i64>, Refused> {
        let bad = |reason: String| Refused::instruction(instruction, reason);
        let results = results(instruction);
        let mut outer = match self {
            ShapeRule::Number => Vec::new(),
            ShapeRule::Same => {
                same(instruction, &operands(instruction, shapes)?, &results)?;
                Vec::new()
            }
            ShapeRule::Gathered | ShapeRule::Scattered => {
                let dimension = dimension(instruction)?;
                let size = group_size(instruction, table)?;
                let operands = operands(instruction, shapes)?;
                if self == ShapeRule::Gathered {
                    joined(instruction, &operands, &results, dimension, size)?
                } else {
                    joined(instruction, &results, &operands, dimension, size)?
                }
            }
            ShapeRule::Blocks => {
                let size = group_size(instruction, table)?;
                let operands = operands(instruction, shapes)?;
                same(instruction, &operands, &results)?;
                if operands.len() != size {
                    let given = operands.len();
                    return Err(bad(format!("{given} operands for groups of {size}")));
                }
                Vec::new()
            }
            ShapeRule::Divided => {
                let size = group_size(instruction, table)?;
                same(instruction, &operands(instruction, shapes)?, &results)?;
                let dimension = dimension(instruction)?;
                let length = results[0].dimensions.get(dimension);
                if length.is_none_or(|length| length % size as i64 != 0) {
                    return Err(bad(format!("its dimension is not divisible by {size}")));
                }
                vec![blocks(results[0], dimension)]
            }
        };
        if outer.iter().all(|&blocks| blocks == 1) {
            outer.clear();
        }
        Ok(outer)
    }
}

fn operands<'a>(
    instruction: &HloInstructionProto,
    shapes: &'a HashMap<i64, ShapeProto>,
) -> Result<Vec<&'a ShapeProto>, Refused> {
    let ids = &instruction.operand_ids;
    let found: Option<_> = ids.iter().map(|id| shapes.get(id)).collect();
    found.ok_or_else(|| Refused::instruction(instruction, "an operand is missing"))
}

/// The size that all groups have.
fn group_size(instruction: &HloInstructionProto, table: &DeviceTable) -> Result<usize, Refused> {
    let groups = match table {
        DeviceTable::Groups(groups) => &groups[..],
        _ => &[],
    };
    match groups.first().map(Vec::len) {
        Some(size) if groups.iter().all(|group| group.len() == size) => Ok(size),
        _ => Err(Refused::instruction(
            instruction,
            "its groups differ in size",
        )),
    }
}

fn dimension(instruction: &HloInstructionProto) -> Result<usize, Refused> {
    match instruction.dimensions[..] {
        [dimension] if dimension >= 0 => Ok(dimension as usize),
        _ => Err(Refused::instruction(
            instruction,
            "it has not one dimension",
        )),
    }
}

/// Checks that each result is as its operand.
fn same(
    instruction: &HloInstructionProto,
    operands: &[&ShapeProto],
    results: &[&ShapeProto],
) -> Result<(), Refused> {
    pairwise(instruction, operands, results, |a, b| a == b)
}

fn pairwise(
    instruction: &HloInstructionProto,
    operands: &[&ShapeProto],
    results: &[&ShapeProto],
    fits: impl Fn(&Physical<'_>, &Physical<'_>) -> bool,
) -> Result<(), Refused> {
    if operands.len() != results.len() {
        let (operands, results) = (operands.len(), results.len());
        let reason = format!("{operands} operands and {results} results");
        return Err(Refused::instruction(instruction, reason));
    }
    for (operand, result) in operands.iter().zip(results) {
        if !fits(&Physical::of(operand), &Physical::of(result)) {
            let reason = "operand and result lie differently in memory";
            return Err(Refused::instruction(instruction, reason));
        }
    }
    Ok(())
}

/// How many blocks along `dimension` lie apart: the elements of the more major dimensions.
fn blocks(shape: &ShapeProto, dimension: usize) -> i64 {
    let physical = Physical::of(shape);
    let outer = physical.order.iter().take_while(|&&d| d != dimension);
    if physical.order.contains(&dimension) {
        outer.map(|&d| shape.dimensions[d]).product()
    } else {
        1
    }
}

/// Checks that each of `whole` is `size` of the `parts` along `dimension`. Returns how many blocks
/// of each part lie apart in it.
fn joined(
    instruction: &HloInstructionProto,
    parts: &[&ShapeProto],
    whole: &[&ShapeProto],
    dimension: usize,
    size: usize,
) -> Result<Vec<i64>, Refused> {
    pairwise(instruction, parts, whole, |part, whole| {
        let strip = |physical: &Physical<'_>| {
            let mut order = physical.order.clone();
            order.retain(|&d| d != dimension);
            order
        };
        let fits = |d: usize| {
            let factor = if d == dimension { size as i64 } else { 1 };
            part.dimensions[d].checked_mul(factor) == Some(whole.dimensions[d])
        };
        part.element_type == whole.element_type
            && part.dimensions.len() == whole.dimensions.len()
            && (0..part.dimensions.len()).all(fits)
            // Where a part has one block, it does not matter where that dimension lies.
            && if part.dimensions.get(dimension) == Some(&1) {
                part.order == strip(whole)
            } else {
                part.order == whole.order || size == 1
            }
    })?;
    Ok(whole.iter().map(|shape| blocks(shape, dimension)).collect())
}
