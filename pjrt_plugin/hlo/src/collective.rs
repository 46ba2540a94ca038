//! Recognising collectives: what each does, as the target and the attributes of a custom call.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::groups::{self, Devices, Mode};
use crate::module::{self, Module, TUPLE};
use crate::proto::hlo::{HloComputationProto, HloInstructionProto, ShapeProto};
use crate::{Refused, Table};

/// An instruction cannot be executed.
pub(crate) fn refused(instruction: &HloInstructionProto, reason: String) -> Refused {
    Refused::Instruction {
        instruction: instruction.name.clone(),
        opcode: instruction.opcode.clone(),
        reason,
    }
}

/// Reductions in the order of their numbers in custom calls (`include/mpi_cuda.h`).
pub const REDUCTIONS: [&str; 10] = [
    "SUM", "PROD", "MIN", "MAX", "LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR",
];

/// Element types: XLA's number (`PrimitiveType`), its name, and bytes.
const TYPES: [(i32, &str, u64); 15] = [
    (1, "pred", 1),
    (2, "s8", 1),
    (3, "s16", 2),
    (4, "s32", 4),
    (5, "s64", 8),
    (6, "u8", 1),
    (7, "u16", 2),
    (8, "u32", 4),
    (9, "u64", 8),
    (10, "f16", 2),
    (11, "f32", 4),
    (12, "f64", 8),
    (15, "c64", 8),
    (16, "bf16", 2),
    (18, "c128", 16),
];

/// A custom call that replaces an instruction.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// Its target, without the prefix.
    pub(crate) target: &'static str,
    /// What it refers to.
    pub(crate) table: Table,
    /// Number of the reduction in [`REDUCTIONS`].
    pub(crate) reduction: Option<usize>,
    /// For each array: how many blocks of each rank's lie apart from each other in the whole (1: those
    /// of a rank are contiguous). Empty if all are 1.
    pub(crate) outer: Vec<i64>,
    /// It communicates, so it takes part in the order.
    pub(crate) ordered: bool,
}

impl Table {
    /// The number by which custom calls name it: a hash of the content with bit 60, which no MPI handle
    /// and no communicator of a user's has.
    pub fn number(&self) -> i64 {
        const BIT: u64 = 1 << 60;
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        (hasher.finish() % BIT + BIT) as i64
    }
}

/// Opcodes that no plugin at hand leaves in an optimized program, or that we cannot execute.
const REFUSED: [&str; 9] = [
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
    "ragged-all-to-all",
    "recv",
    "recv-done",
    "send",
    "send-done",
    "all-to-all-start",
];

/// Whether an instruction is a collective as a whole.
pub(crate) fn is_collective(instruction: &HloInstructionProto) -> bool {
    matches!(
        instruction.opcode.as_str(),
        "all-reduce"
            | "all-gather"
            | "reduce-scatter"
            | "all-to-all"
            | "ragged-all-to-all"
            | "collective-permute"
            | "collective-broadcast"
            | "send"
            | "recv"
    )
}

/// The custom call for an instruction of `computation`; none if it does not concern us.
pub(crate) fn recognise(
    instruction: &HloInstructionProto,
    shapes: &HashMap<i64, ShapeProto>,
    module: &Module,
    devices: &Devices,
) -> Result<Option<Call>, Refused> {
    let bad = |reason: String| refused(instruction, reason);
    let has_channel = instruction.channel_id > 0;
    let by_flag = Mode::of(has_channel, Some(instruction.use_global_device_ids))
        .ok_or_else(|| bad("it uses global device ids without a channel".into()));
    let kind_without_flag = matches!(
        instruction.opcode.as_str(),
        "all-to-all" | "collective-permute" | "collective-broadcast"
    );
    if kind_without_flag && instruction.use_global_device_ids {
        return Err(bad(
            "it uses global device ids, which this kind does not have".into(),
        ));
    }
    let plain = if has_channel {
        Mode::CrossPartition
    } else {
        Mode::CrossReplica
    };
    let groups = |mode| groups::resolve(instruction, mode, devices);
    let operands = || -> Result<Vec<&ShapeProto>, Refused> {
        let ids = &instruction.operand_ids;
        let found: Option<_> = ids.iter().map(|id| shapes.get(id)).collect();
        found.ok_or_else(|| bad("an operand is missing".into()))
    };
    let results = results(instruction);
    let same_size = |groups: &[Vec<i64>]| match groups.first().map(Vec::len) {
        Some(size) if groups.iter().all(|group| group.len() == size) => Ok(size),
        _ => Err(bad("its groups differ in size".into())),
    };
    let (mut ordered, mut outer) = (true, Vec::new());
    let (target, table, reduction) = match instruction.opcode.as_str() {
        "all-reduce" => {
            pairwise(&operands()?, &results, |a, b| a == b).map_err(bad)?;
            let table = Table::Groups(groups(by_flag?)?);
            (
                "all_reduce",
                table,
                Some(reduction(instruction, &results, module)?),
            )
        }
        "all-gather" => {
            let (groups, dimension) = (groups(by_flag?)?, dimension(instruction)?);
            let size = same_size(&groups)?;
            outer = joined(&operands()?, &results, dimension, size).map_err(bad)?;
            ("all_gather", Table::Groups(groups), None)
        }
        "reduce-scatter" => {
            let (groups, dimension) = (groups(by_flag?)?, dimension(instruction)?);
            let size = same_size(&groups)?;
            outer = joined(&results, &operands()?, dimension, size).map_err(bad)?;
            let reduction = reduction(instruction, &results, module)?;
            ("reduce_scatter", Table::Groups(groups), Some(reduction))
        }
        "all-to-all" => {
            let groups = groups(plain)?;
            let size = same_size(&groups)?;
            let operands = operands()?;
            pairwise(&operands, &results, |a, b| a == b).map_err(bad)?;
            if instruction.shape.element_type == TUPLE {
                if operands.len() != size {
                    let given = operands.len();
                    return Err(bad(format!("{given} operands for groups of {size}")));
                }
                ("all_to_all", Table::Groups(groups), None)
            } else {
                let dimension = dimension(instruction)?;
                if results[0]
                    .dimensions
                    .get(dimension)
                    .is_none_or(|d| d % size as i64 != 0)
                {
                    return Err(bad(format!("its dimension is not divisible by {size}")));
                }
                outer = vec![blocks(results[0], dimension)];
                ("all_to_all_array", Table::Groups(groups), None)
            }
        }
        "collective-permute" => {
            if !instruction.dynamic_slice_sizes.is_empty() {
                return Err(bad("it writes into slices of another array".into()));
            }
            pairwise(&operands()?, &results, |a, b| a == b).map_err(bad)?;
            let pairs = groups::pairs(instruction, plain, devices)?;
            ("collective_permute", Table::Pairs(pairs), None)
        }
        "collective-broadcast" => {
            pairwise(&operands()?, &results, |a, b| a == b).map_err(bad)?;
            ("collective_broadcast", Table::Groups(groups(plain)?), None)
        }
        opcode @ ("partition-id" | "replica-id") => {
            ordered = false;
            (
                "id",
                Table::Values(devices.values(opcode == "replica-id")),
                None,
            )
        }
        opcode if REFUSED.contains(&opcode) => {
            return Err(bad("this form is not supported yet".into()));
        }
        // What is left of asynchronous calls has no collectives (`synchronous.rs`).
        "custom-call" | "async-start" | "async-update" | "async-done" => return Ok(None),
        _ if communicates(instruction) => {
            return Err(bad("this kind of collective is not known here".into()));
        }
        _ => return Ok(None),
    };
    if outer.iter().all(|&blocks| blocks == 1) {
        outer.clear();
    }
    Ok(Some(Call {
        target,
        table,
        reduction,
        outer,
        ordered,
    }))
}

/// The arrays of an instruction's result.
pub(crate) fn results(instruction: &HloInstructionProto) -> Vec<&ShapeProto> {
    let shape = instruction.shape.get_or_default();
    if shape.element_type == TUPLE {
        shape.tuple_shapes.iter().collect()
    } else {
        vec![shape]
    }
}

/// Whether an instruction of a kind that we do not know names devices.
fn communicates(instruction: &HloInstructionProto) -> bool {
    instruction.channel_id > 0
        || !instruction.replica_groups.is_empty()
        || !instruction.source_target_pairs.is_empty()
        || instruction.collective_device_list.is_some()
        || instruction.iota_collective_device_list.is_some()
        || instruction.mesh_axes_replica_group_list.is_some()
}

fn dimension(instruction: &HloInstructionProto) -> Result<usize, Refused> {
    match instruction.dimensions[..] {
        [dimension] if dimension >= 0 => Ok(dimension as usize),
        _ => Err(refused(instruction, "it has not one dimension".into())),
    }
}

fn pairwise(
    operands: &[&ShapeProto],
    results: &[&ShapeProto],
    fits: impl Fn(&Physical<'_>, &Physical<'_>) -> bool,
) -> Result<(), String> {
    if operands.len() != results.len() {
        let (operands, results) = (operands.len(), results.len());
        return Err(format!("{operands} operands and {results} results"));
    }
    for (operand, result) in operands.iter().zip(results) {
        if !fits(&Physical::of(operand), &Physical::of(result)) {
            return Err("operand and result lie differently in memory".into());
        }
    }
    Ok(())
}

/// What decides where elements lie in memory.
#[derive(PartialEq, Eq)]
pub(crate) struct Physical<'a> {
    pub(crate) element_type: i32,
    pub(crate) dimensions: &'a [i64],
    /// Those longer than 1, from major to minor.
    pub(crate) order: Vec<usize>,
}

impl Physical<'_> {
    pub(crate) fn of(shape: &ShapeProto) -> Physical<'_> {
        let minor_to_major = &shape.layout.get_or_default().minor_to_major;
        let rank = shape.dimensions.len();
        let all: Vec<usize> = if minor_to_major.len() == rank {
            minor_to_major.iter().rev().map(|&d| d as usize).collect()
        } else {
            (0..rank).collect()
        };
        let long = |&d: &usize| shape.dimensions.get(d).is_some_and(|&size| size != 1);
        Physical {
            element_type: shape.element_type,
            dimensions: &shape.dimensions,
            order: all.into_iter().filter(long).collect(),
        }
    }
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

/// Checks that each of `whole` is `size` of the `parts` along `dimension`; how many blocks of each part
/// lie apart in it.
fn joined(
    parts: &[&ShapeProto],
    whole: &[&ShapeProto],
    dimension: usize,
    size: usize,
) -> Result<Vec<i64>, String> {
    pairwise(parts, whole, |part, whole| {
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

/// The number of the reduction that an instruction's computation is.
fn reduction(
    instruction: &HloInstructionProto,
    results: &[&ShapeProto],
    module: &Module,
) -> Result<usize, Refused> {
    let [computation] = instruction.called_computation_ids[..] else {
        return Err(refused(instruction, "it has no computation".into()));
    };
    let computation = module.computation(computation)?;
    let opcode = binary(computation).ok_or_else(|| {
        let name = &computation.name;
        let reason = format!("its reduction {name} is not one operation of both its parameters");
        refused(instruction, reason)
    })?;
    let logical = results
        .iter()
        .all(|shape| shape.element_type == module::PRED);
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
            refused(
                instruction,
                format!("its reduction is {opcode}, which MPI lacks"),
            )
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

/// Bytes of an instruction's results.
pub(crate) fn bytes(instruction: &HloInstructionProto) -> u64 {
    let of = |shape: &&ShapeProto| {
        // All others have a byte, or less.
        let size = element_type(shape).map_or(1, |row| row.2);
        let elements = shape.dimensions.iter().map(|&d| d.max(0) as u64);
        elements.fold(size, u64::saturating_mul)
    };
    let results = results(instruction);
    results.iter().map(of).fold(0, u64::saturating_add)
}

/// Whether two arrays may have the same memory, because they have as many bytes.
pub(crate) fn may_share(one: &ShapeProto, other: &ShapeProto) -> bool {
    let bytes = |shape: &ShapeProto| {
        let size = element_type(shape)?.2;
        let elements = shape.dimensions.iter().map(|&d| d.max(0) as u64);
        Some(elements.fold(size, u64::saturating_mul))
    };
    match (bytes(one), bytes(other)) {
        (Some(one), Some(other)) => one == other,
        _ => true,
    }
}

/// What stands for `call` in the sequence that ranks compare.
pub(crate) fn describe(instruction: &HloInstructionProto, call: &Call) -> String {
    let shapes: Vec<String> = results(instruction).into_iter().map(shape_text).collect();
    let mut text = format!("{} {}", instruction.opcode, shapes.join(" "));
    if let Some(reduction) = call.reduction {
        text += " ";
        text += REDUCTIONS[reduction];
    }
    match &call.table {
        Table::Groups(groups) => text + &format!(" among {groups:?}"),
        Table::Pairs(pairs) => text + &format!(" along {pairs:?}"),
        Table::Values(_) => text,
    }
}

/// The row of an array's element type, if it is listed.
fn element_type(shape: &ShapeProto) -> Option<&'static (i32, &'static str, u64)> {
    TYPES.iter().find(|row| row.0 == shape.element_type)
}

/// `f32[2,3]`; a type that is not listed, an 8-bit float say, by its number: `type20[2,3]`.
fn shape_text(shape: &ShapeProto) -> String {
    let name = element_type(shape).map_or_else(
        || format!("type{}", shape.element_type),
        |row| row.1.to_owned(),
    );
    let dimensions: Vec<String> = shape.dimensions.iter().map(i64::to_string).collect();
    format!("{name}[{}]", dimensions.join(","))
}
