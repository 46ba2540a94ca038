//! Shapes: element types, bytes, and where elements lie in memory.

use crate::proto::hlo::{HloInstructionProto, LayoutProto, ShapeProto};

/// XLA's element types that rewriting makes or asks for (`PrimitiveType`, xla/xla_data.proto).
pub(crate) const PRED: i32 = 1;
pub(crate) const U32: i32 = 8;
pub(crate) const TUPLE: i32 = 13;
pub(crate) const TOKEN: i32 = 17;

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

/// The shape of an instruction's result.
pub(crate) fn shape_of(instruction: &HloInstructionProto) -> ShapeProto {
    instruction.shape.get_or_default().clone()
}

/// The shape of a token.
pub(crate) fn token() -> ShapeProto {
    ShapeProto {
        element_type: TOKEN,
        ..Default::default()
    }
}

/// The shape of a number, `u32[]`.
pub(crate) fn number() -> ShapeProto {
    ShapeProto {
        element_type: U32,
        layout: Some(LayoutProto::default()).into(),
        ..Default::default()
    }
}

/// The shape of a tuple.
pub(crate) fn tuple(elements: Vec<ShapeProto>) -> ShapeProto {
    ShapeProto {
        element_type: TUPLE,
        tuple_shapes: elements,
        ..Default::default()
    }
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

/// Bytes of an instruction's results.
pub(crate) fn bytes(instruction: &HloInstructionProto) -> u64 {
    // Types that are not listed have a byte, or less.
    let of = |shape: &ShapeProto| elements_times(element_type(shape).map_or(1, |row| row.2), shape);
    let results = results(instruction);
    results.into_iter().map(of).fold(0, u64::saturating_add)
}

/// Whether two arrays may have the same memory, because they have as many bytes.
pub(crate) fn may_share(one: &ShapeProto, other: &ShapeProto) -> bool {
    let bytes = |shape| Some(elements_times(element_type(shape)?.2, shape));
    match (bytes(one), bytes(other)) {
        (Some(one), Some(other)) => one == other,
        _ => true,
    }
}

fn elements_times(size: u64, shape: &ShapeProto) -> u64 {
    let elements = shape.dimensions.iter().map(|&d| d.max(0) as u64);
    elements.fold(size, u64::saturating_mul)
}

/// `f32[2,3]`; a type that is not listed, an 8-bit float say, by its number: `type20[2,3]`.
pub(crate) fn text(shape: &ShapeProto) -> String {
    let name = element_type(shape).map_or_else(
        || format!("type{}", shape.element_type),
        |row| row.1.to_owned(),
    );
    let dimensions: Vec<String> = shape.dimensions.iter().map(i64::to_string).collect();
    format!("{name}[{}]", dimensions.join(","))
}

/// The row of an array's element type, if it is listed.
fn element_type(shape: &ShapeProto) -> Option<&'static (i32, &'static str, u64)> {
    TYPES.iter().find(|row| row.0 == shape.element_type)
}
