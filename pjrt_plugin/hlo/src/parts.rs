//! Which instructions take a contiguous part of an array, or join such parts.

use std::ops::Range;

use crate::proto::hlo::{HloComputationProto, HloInstructionProto, ShapeProto};
use crate::shape::{Physical, shape_of};

/// A part of an array, by its elements in the order of memory.
pub(crate) struct Part {
    pub(crate) of: i64,
    pub(crate) elements: Range<i64>,
}

/// The number of elements of an array.
pub(crate) fn elements(shape: &ShapeProto) -> i64 {
    let dimensions = shape.dimensions.iter();
    dimensions.fold(1, |product, &size| product.saturating_mul(size))
}

/// Which elements of a computation's one parameter its instruction `id` is.
pub(crate) fn part_of_parameter(
    computation: &HloComputationProto,
    id: i64,
    left: usize,
) -> Option<Range<i64>> {
    let find = |id: i64| computation.instructions.iter().find(|i| i.id == id);
    let instruction = find(id)?;
    let shape = shape_of(instruction);
    if instruction.opcode == "parameter" {
        return Some(0..elements(&shape));
    }
    let &[operand] = &instruction.operand_ids[..] else {
        return None;
    };
    let before = part_of_parameter(computation, operand, left.checked_sub(1)?)?;
    let from = shape_of(find(operand)?);
    match instruction.opcode.as_str() {
        "bitcast" if from.element_type == shape.element_type => Some(before),
        "slice" => {
            let within = sliced(instruction, &from)?;
            let after = |elements| before.start.checked_add(elements);
            Some(after(within.start)?..after(within.end)?)
        }
        _ => None,
    }
}

/// The numbers of the parameters that a computation joins, one after the other in memory.
pub(crate) fn joined_parameters(computation: &HloComputationProto) -> Option<Vec<i64>> {
    let join = without_bitcasts(computation, computation.root_id)?;
    let find = |id: i64| computation.instructions.iter().find(|i| i.id == id);
    let parts: Option<Vec<_>> = join.operand_ids.iter().map(|&id| find(id)).collect();
    if join.opcode != "concatenate" || !follow_each_other(join, &parts?) {
        return None;
    }
    let number = |&id: &i64| {
        let parameter = without_bitcasts(computation, id)?;
        (parameter.opcode == "parameter").then_some(parameter.parameter_number)
    };
    join.operand_ids.iter().map(number).collect()
}

fn without_bitcasts(
    computation: &HloComputationProto,
    mut id: i64,
) -> Option<&HloInstructionProto> {
    let find = |id: i64| computation.instructions.iter().find(|i| i.id == id);
    for _ in &computation.instructions {
        let instruction = find(id)?;
        let &[operand] = &instruction.operand_ids[..] else {
            return Some(instruction);
        };
        if instruction.opcode != "bitcast" {
            return Some(instruction);
        }
        let types = [instruction, find(operand)?].map(|i| shape_of(i).element_type);
        if types[0] != types[1] {
            return None;
        }
        id = operand;
    }
    None
}

/// Whether the parts that a concatenation joins follow each other in its memory.
pub(crate) fn follow_each_other(
    concatenate: &HloInstructionProto,
    parts: &[&HloInstructionProto],
) -> bool {
    let &[dimension] = &concatenate.dimensions[..] else {
        return false;
    };
    let whole = shape_of(concatenate);
    let fits = |part: &&HloInstructionProto| {
        let part = shape_of(part);
        usize::try_from(dimension)
            .is_ok_and(|d| is_outermost(&Physical::of(&whole), &Physical::of(&part), d))
    };
    parts.iter().all(fits)
}

/// Whether `part` is a contiguous part of `whole`, which is longer in `dimension` alone.
fn is_outermost(whole: &Physical<'_>, part: &Physical<'_>, dimension: usize) -> bool {
    let others = |order: &[usize]| {
        let other = order.iter().copied().filter(|&d| d != dimension);
        other.collect::<Vec<_>>()
    };
    let place = part.order.iter().position(|&d| d == dimension);
    whole.order.first() == Some(&dimension)
        && others(&whole.order) == others(&part.order)
        && place.is_none_or(|place| place == 0)
        && whole.element_type == part.element_type
}

/// Which elements of an array like `from` a slice takes, if they lie one after the other.
pub(crate) fn sliced(slice: &HloInstructionProto, from: &ShapeProto) -> Option<Range<i64>> {
    let shape = shape_of(slice);
    let (whole, part) = (Physical::of(from), Physical::of(&shape));
    let bounds = &slice.slice_dimensions;
    if bounds.len() != whole.dimensions.len() || bounds.iter().any(|bound| bound.stride != 1) {
        return None;
    }
    let cut =
        |&d: &usize| Some(bounds[d].limit - bounds[d].start) != whole.dimensions.get(d).copied();
    let mut cuts = (0..bounds.len()).filter(cut);
    let dimension = match (cuts.next(), cuts.next()) {
        (None, _) => return Some(0..elements(from)),
        (Some(only), None) => only,
        _ => return None,
    };
    let row = elements(from) / whole.dimensions[dimension].max(1);
    if !is_outermost(&whole, &part, dimension) {
        return None;
    }
    let bounds = &bounds[dimension];
    Some(bounds.start.checked_mul(row)?..bounds.limit.checked_mul(row)?)
}
