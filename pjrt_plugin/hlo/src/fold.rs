//! All-to-alls of whole arrays.
//!
//! XLA cuts the array that an all-to-all sends into an operand for each rank, and joins the
//! results. Where the pieces lie one after the other in memory, those two passes over memory are
//! not needed: the custom call takes the array itself, and gives the joined one.
//!
//! The passes that insert copies have run, and do not run again. Arrays that a loop carries, or
//! that a donated parameter becomes, share their memory whatever the program does with them. So an
//! array may be used later than before only where nothing in between writes into its memory. It may
//! be there earlier only where nothing in between reads what was there. Each condition below is for
//! one of these.

use std::collections::{HashMap, HashSet};

use crate::collective::{Call, Calls};
use crate::effects::{has_no_memory, is_fresh, is_harmless};
use crate::error::Refused;
use crate::module::Module;
use crate::parts::{
    Part, elements, follow_each_other, joined_parameters, part_of_parameter, sliced,
};
use crate::proto::hlo::{HloComputationProto, HloInstructionProto};
use crate::shape::{may_share, results, shape_of};
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
    /// Instructions that are not needed, by computation and id.
    pub(crate) dropped: HashSet<(i64, i64)>,
}

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

    /// The array of which the operands of `call` are the parts, in order, if it is still as it was
    /// when they were cut.
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
            let untouched = has_no_memory(i) || !overwrites;
            is_harmless(self.module, i) && (own_memory || untouched)
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

    /// Whether nothing between `call` and `instruction` reads what the result of `instruction` may
    /// overwrite.
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
            has_no_memory(i) || is_harmless(self.module, i) && !reads
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
                _ => is_fresh(self.module, instruction),
            }
        })
    }

    /// An instruction's memory is not that of something after it.
    fn is_only_read(&self, instruction: &HloInstructionProto) -> bool {
        instruction.id != self.computation.root_id
            && self
                .users(instruction.id)
                .all(|user| is_fresh(self.module, user))
    }
}

fn results_type(call: &HloInstructionProto) -> i32 {
    let first = call.shape.get_or_default().tuple_shapes.first();
    first.map_or(0, |shape| shape.element_type)
}
