//! All-reduces that are started as soon as a part of their operands is there, and waited for where
//! they stood.
//!
//! XLA combines the all-reduces of a program that do not depend on each other. The whole then waits
//! for the last operand. Here it is cut into parts again: each is started behind the instruction
//! that makes its last operand, and XLA computes the others meanwhile. All parts are waited for
//! where the all-reduce stood, behind the last start, so whatever comes later depends on as much as
//! before. A start copies its operands, and only the wait has the result, so no array lives longer
//! or earlier than before.

use std::collections::HashMap;

use crate::collective::Calls;
use crate::effects::has_no_memory;
use crate::error::Refused;
use crate::module::Module;
use crate::proto::hlo::HloInstructionProto;
use crate::shape::{self, shape_of};
use crate::tokens::TokenPaths;

/// Which all-reduces are started, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Smaller ones stay whole.
    pub smallest: u64,
    /// Smaller operands are started together.
    pub small: u64,
    /// Those with a larger operand stay whole.
    pub largest: u64,
}

/// Operands of one type that are started together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Their places among the operands, in the order in which they are there.
    pub(crate) operands: Vec<usize>,
    /// The instruction that makes the last of them.
    pub(crate) after: i64,
}

/// The parts of all-reduces that are started, by the computation and the instruction. They are in
/// the order in which they are started.
pub(crate) type Started = HashMap<(i64, i64), Vec<Part>>;

/// The all-reduces to be started.
pub(crate) fn find(
    module: &Module,
    calls: &Calls,
    paths: &TokenPaths,
    sizes: Sizes,
) -> Result<Started, Refused> {
    let mut found = Started::new();
    for computation in module.computations() {
        let reduces = |id| {
            let call = calls.get(&(computation.id, id));
            call.is_some_and(|call| call.form.target == "all_reduce" && call.place.is_none())
        };
        let has_any = computation.instructions.iter().any(|i| reduces(i.id));
        if !has_any || !paths.contains_key(&computation.id) {
            continue;
        }
        let ordered = module.ordered(computation.id)?;
        for (place, instruction) in ordered.iter().enumerate() {
            if !reduces(instruction.id) || !instruction.control_predecessor_ids.is_empty() {
                continue;
            }
            if let Some(parts) = parts(&ordered[..place], instruction, sizes) {
                found.insert((computation.id, instruction.id), parts);
            }
        }
    }
    Ok(found)
}

/// A part while operands are put into it.
struct Open {
    operands: Vec<usize>,
    bytes: u64,
    element_type: i32,
    /// Where the instruction stands that makes the last of them.
    place: usize,
}

/// The parts of an all-reduce behind the instructions `before`; none if nothing would be gained.
fn parts(
    before: &[HloInstructionProto],
    whole: &HloInstructionProto,
    sizes: Sizes,
) -> Option<Vec<Part>> {
    let places: HashMap<i64, usize> = before.iter().map(|i| i.id).zip(0..).collect();
    let mut operands: Vec<(usize, usize)> = Vec::new();
    for (index, id) in whole.operand_ids.iter().enumerate() {
        operands.push((*places.get(id)?, index));
    }
    operands.sort_unstable();
    let (mut open, mut total) = (Vec::<Open>::new(), 0u64);
    for (place, index) in operands {
        let shape = shape_of(&before[place]);
        let bytes = shape::bytes(&before[place]);
        if bytes > sizes.largest {
            return None;
        }
        total = total.saturating_add(bytes);
        let joins = |part: &&mut Open| {
            let is_small = part.bytes < sizes.small && bytes < sizes.small;
            is_small
                && part.bytes + bytes <= sizes.largest
                && part.element_type == shape.element_type
        };
        match open.iter_mut().find(joins) {
            Some(part) => {
                part.operands.push(index);
                part.bytes += bytes;
                part.place = place;
            }
            None => open.push(Open {
                operands: vec![index],
                bytes,
                element_type: shape.element_type,
                place,
            }),
        }
    }
    open.sort_by_key(|part| part.place);
    // Something must be computed between a start and the end.
    let first = open.first()?;
    let computes = before[first.place + 1..].iter().any(|i| !has_no_memory(i));
    let part = |part: Open| Part {
        after: before[part.place].id,
        operands: part.operands,
    };
    (computes && total >= sizes.smallest).then(|| open.into_iter().map(part).collect())
}
