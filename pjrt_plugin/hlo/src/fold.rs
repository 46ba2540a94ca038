//! All-to-alls of whole arrays.
//!
//! XLA cuts the array that an all-to-all sends into an operand for each rank, and joins the results.
//! Where the pieces lie one after the other in memory, that is two passes over memory for nothing: the
//! custom call takes the array itself, and gives the joined one.
//!
//! The passes that insert copies have run, and do not run again. Arrays that a loop carries, or that a
//! donated parameter becomes, share their memory whatever the program does with them. So an array may
//! only be used later than before where nothing in between writes into its memory, and be there earlier
//! where nothing in between reads what was there; each condition below is for that.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use crate::collective::{Call, Calls};
use crate::error::Refused;
use crate::module::Module;
use crate::proto::hlo::{HloComputationProto, HloInstructionProto, ShapeProto};
use crate::shape::{Physical, may_share, results, shape_of};
use crate::shape_rule::ShapeRule;

/// What an all-to-all is called with instead.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fold {
    /// The array of which its operands are the parts, in order.
    pub(crate) whole: Option<i64>,
    /// The instruction that joins its results in order.
    pub(crate) joined: Option<HloInstructionProto>,
}

/// What [`find`] found.
#[derive(Debug, Default)]
pub(crate) struct Folds {
    /// By the computation and the all-to-all.
    pub(crate) folds: HashMap<(i64, i64), Fold>,
    /// Instructions that are not needed any more, by computation and id.
    pub(crate) dropped: HashSet<(i64, i64)>,
}

/// Instructions that neither write into the memory of an operand nor have a part of it as their result.
const FRESH: [&str; 13] = [
    "add",
    "broadcast",
    "concatenate",
    "convert",
    "copy",
    "dot",
    "fusion",
    "multiply",
    "reduce",
    "reverse",
    "slice",
    "subtract",
    "transpose",
];

/// Instructions that do not write into memory that there was before.
const HARMLESS: [&str; 13] = [
    "all-gather",
    "all-reduce",
    "all-to-all",
    "bitcast",
    "collective-permute",
    "constant",
    "get-tuple-element",
    "iota",
    "parameter",
    "partition-id",
    "reduce-scatter",
    "replica-id",
    "tuple",
];

/// Instructions that neither read nor write memory.
const NO_MEMORY: [&str; 5] = [
    "bitcast",
    "constant",
    "get-tuple-element",
    "parameter",
    "tuple",
];

/// What in a fusion may write in place.
const IN_PLACE: [&str; 5] = [
    "call",
    "custom-call",
    "dynamic-update-slice",
    "scatter",
    "while",
];

/// Looks for all-to-alls of whole arrays among `calls`.
pub(crate) fn find(module: &Module, calls: &Calls) -> Result<Folds, Refused> {
    let mut found = Folds::default();
    for computation in module.computations() {
        let concerned = calls
            .iter()
            .any(|(place, call)| place.0 == computation.id && has_blocks(call));
        if concerned {
            View::new(module, computation)?.find(calls, &mut found);
        }
    }
    Ok(found)
}

/// Whether a call takes a block for each rank.
fn has_blocks(call: &Call) -> bool {
    call.form.shapes == ShapeRule::Blocks
}

/// A computation with what the conditions ask of it.
struct View<'a> {
    module: &'a Module,
    computation: &'a HloComputationProto,
    /// In the order of the schedule.
    ordered: Vec<HloInstructionProto>,
    /// Places in `ordered`.
    places: HashMap<i64, usize>,
    users: HashMap<i64, Vec<usize>>,
    /// Something has an order that no operand tells.
    has_control: bool,
}

impl<'a> View<'a> {
    fn new(module: &'a Module, computation: &'a HloComputationProto) -> Result<Self, Refused> {
        let ordered = module.ordered(computation.id)?;
        let mut users: HashMap<i64, Vec<usize>> = HashMap::new();
        for (place, instruction) in ordered.iter().enumerate() {
            for &operand in &instruction.operand_ids {
                users.entry(operand).or_default().push(place);
            }
        }
        Ok(View {
            module,
            computation,
            places: ordered.iter().map(|i| i.id).zip(0..).collect(),
            users,
            has_control: ordered
                .iter()
                .any(|i| !i.control_predecessor_ids.is_empty()),
            ordered,
        })
    }

    fn get(&self, id: i64) -> Option<&HloInstructionProto> {
        self.places.get(&id).map(|&place| &self.ordered[place])
    }

    fn users(&self, id: i64) -> impl Iterator<Item = &HloInstructionProto> {
        let places = self.users.get(&id).map_or(&[][..], Vec::as_slice);
        places.iter().map(|&place| &self.ordered[place])
    }

    fn only_user(&self, id: i64) -> Option<&HloInstructionProto> {
        let mut users = self.users(id);
        let first = users.next().filter(|_| id != self.computation.root_id);
        first.filter(|_| users.next().is_none())
    }

    fn find(&self, calls: &Calls, found: &mut Folds) {
        if self.has_control {
            return;
        }
        for instruction in &self.ordered {
            let place = (self.computation.id, instruction.id);
            let several = instruction.operand_ids.len() > 1;
            if !several || !calls.get(&place).is_some_and(has_blocks) {
                continue;
            }
            let whole = self.whole(instruction);
            let joined = self.joined(instruction, whole);
            if whole.is_some() {
                let parts = &instruction.operand_ids;
                let unneeded = parts.iter().filter(|&&id| self.only_user(id).is_some());
                found
                    .dropped
                    .extend(unneeded.map(|&id| (self.computation.id, id)));
            }
            if let Some(joined) = &joined {
                let elements = self.users(instruction.id).map(|element| element.id);
                let all = elements.chain([joined.id]);
                found
                    .dropped
                    .extend(all.map(|id| (self.computation.id, id)));
            }
            if whole.is_some() || joined.is_some() {
                found.folds.insert(place, Fold { whole, joined });
            }
        }
    }

    /// The array of which the operands of `call` are the parts, in order, if it is as it was when they
    /// were cut.
    fn whole(&self, call: &HloInstructionProto) -> Option<i64> {
        let parts: Option<Vec<Part>> = call.operand_ids.iter().map(|&id| self.part(id)).collect();
        let parts = parts?;
        let of = parts.first()?.of;
        let shape = shape_of(self.get(of)?);
        let mut end = 0;
        for part in &parts {
            if part.of != of || part.elements.start != end {
                return None;
            }
            end = part.elements.end;
        }
        if end != elements(&shape) || shape.element_type != results_type(call) {
            return None;
        }
        let first = call
            .operand_ids
            .iter()
            .map(|id| self.places.get(id))
            .min()??;
        let between = self.ordered.get(*first..*self.places.get(&call.id)?)?;
        let own_memory = self.has_own_memory(of);
        let keeps = |i: &HloInstructionProto| {
            let overwrites = results(i).iter().any(|r| may_share(r, &shape));
            let untouched = NO_MEMORY.contains(&i.opcode.as_str()) || !overwrites;
            self.is_harmless(i) && (own_memory || untouched)
        };
        between.iter().all(keeps).then_some(of)
    }

    /// Which part of which array an instruction is, if nothing else.
    fn part(&self, id: i64) -> Option<Part> {
        let instruction = self.get(id)?;
        let &[operand] = &instruction.operand_ids[..] else {
            return None;
        };
        let elements = match instruction.opcode.as_str() {
            "slice" => sliced(instruction, &shape_of(self.get(operand)?))?,
            "fusion" => {
                let &[called] = &instruction.called_computation_ids[..] else {
                    return None;
                };
                let called = self.module.computation(called).ok()?;
                part_of_parameter(called, called.root_id, called.instructions.len())?
            }
            _ => return None,
        };
        Some(Part {
            of: operand,
            elements,
        })
    }

    /// The instruction that joins the results of `call`, if it may be there earlier.
    fn joined(
        &self,
        call: &HloInstructionProto,
        whole: Option<i64>,
    ) -> Option<HloInstructionProto> {
        let count = call.operand_ids.len();
        let mut elements = vec![None; count];
        for element in self.users(call.id) {
            let place = usize::try_from(element.tuple_index).ok()?;
            if element.opcode != "get-tuple-element"
                || elements.get(place)?.is_some()
                || call.id == self.computation.root_id
            {
                return None;
            }
            elements[place] = Some(element.id);
        }
        let elements: Option<Vec<i64>> = elements.into_iter().collect();
        let elements = elements?;
        let join = self.only_user(*elements.first()?)?;
        let only = |&id: &i64| self.only_user(id).is_some_and(|user| user.id == join.id);
        if self.joins(join)? != elements || !elements.iter().all(only) {
            return None;
        }
        let apart = self.is_only_read(join)
            || whole.is_none_or(|id| self.has_own_memory(id)) && self.may_be_earlier(join, call)?;
        apart.then(|| join.clone())
    }

    /// Whether nothing between `call` and `instruction` reads what the latter's result may overwrite.
    fn may_be_earlier(
        &self,
        instruction: &HloInstructionProto,
        call: &HloInstructionProto,
    ) -> Option<bool> {
        let place = |i: &HloInstructionProto| self.places.get(&i.id).copied();
        let between = self.ordered.get(place(call)? + 1..place(instruction)?)?;
        let shape = shape_of(instruction);
        let keeps = |i: &HloInstructionProto| {
            let mut operands = i.operand_ids.iter().filter_map(|&id| self.get(id));
            let reads = operands.any(|o| results(o).iter().any(|r| may_share(r, &shape)));
            NO_MEMORY.contains(&i.opcode.as_str()) || self.is_harmless(i) && !reads
        };
        Some(between.iter().all(keeps))
    }

    /// The operands that an instruction joins, one after the other in memory, if it does no more.
    fn joins(&self, join: &HloInstructionProto) -> Option<Vec<i64>> {
        match join.opcode.as_str() {
            "concatenate" => {
                let parts: Option<Vec<_>> =
                    join.operand_ids.iter().map(|&id| self.get(id)).collect();
                follow_each_other(join, &parts?).then(|| join.operand_ids.clone())
            }
            "fusion" => {
                let &[called] = &join.called_computation_ids[..] else {
                    return None;
                };
                let numbers = joined_parameters(self.module.computation(called).ok()?)?;
                let operand = |&number: &i64| {
                    let place = usize::try_from(number).ok()?;
                    join.operand_ids.get(place).copied()
                };
                numbers.iter().map(operand).collect()
            }
            _ => None,
        }
    }

    /// An instruction's memory is not that of something before it.
    fn has_own_memory(&self, id: i64) -> bool {
        self.get(id).is_some_and(|instruction| {
            let is_entry = self.computation.id == self.module.entry();
            match instruction.opcode.as_str() {
                "parameter" => is_entry && !self.module.has_aliases(),
                "bitcast" => instruction
                    .operand_ids
                    .iter()
                    .all(|&i| self.has_own_memory(i)),
                _ => self.is_fresh(instruction),
            }
        })
    }

    /// An instruction's memory is not that of something after it.
    fn is_only_read(&self, instruction: &HloInstructionProto) -> bool {
        instruction.id != self.computation.root_id
            && self.users(instruction.id).all(|user| self.is_fresh(user))
    }

    fn is_fresh(&self, instruction: &HloInstructionProto) -> bool {
        let opcode = instruction.opcode.as_str();
        FRESH.contains(&opcode) && (opcode != "fusion" || !self.writes_in_place(instruction))
    }

    fn is_harmless(&self, instruction: &HloInstructionProto) -> bool {
        HARMLESS.contains(&instruction.opcode.as_str()) || self.is_fresh(instruction)
    }

    fn writes_in_place(&self, fusion: &HloInstructionProto) -> bool {
        let called = fusion.called_computation_ids.iter();
        called.into_iter().any(|&id| {
            let Ok(computation) = self.module.computation(id) else {
                return true;
            };
            let mut inside = computation.instructions.iter();
            // A fusion in a fusion may do anything.
            inside.any(|i| i.opcode == "fusion" || IN_PLACE.contains(&i.opcode.as_str()))
        })
    }
}

/// A part of an array, by its elements in the order of memory.
struct Part {
    of: i64,
    elements: Range<i64>,
}

fn elements(shape: &ShapeProto) -> i64 {
    let dimensions = shape.dimensions.iter();
    dimensions.fold(1, |product, &size| product.saturating_mul(size))
}

fn results_type(call: &HloInstructionProto) -> i32 {
    let first = call.shape.get_or_default().tuple_shapes.first();
    first.map_or(0, |shape| shape.element_type)
}

/// Which elements of a computation's one parameter its instruction `id` is.
fn part_of_parameter(
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
fn joined_parameters(computation: &HloComputationProto) -> Option<Vec<i64>> {
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
fn follow_each_other(concatenate: &HloInstructionProto, parts: &[&HloInstructionProto]) -> bool {
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
fn sliced(slice: &HloInstructionProto, from: &ShapeProto) -> Option<Range<i64>> {
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
