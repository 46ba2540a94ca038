//! One token through everything that has an order: collectives, in the order of the schedule, and
//! custom calls that have a token already (our operations, ordered host callbacks).
//!
//! The runtime orders only what depends on each other through values, so each ordered call takes
//! the token of the one before. Where a called computation has ordered calls, the token goes in and
//! comes out: the operands and results of `while` and `conditional` are paired with it, and `call`
//! has one more operand (`tokens.rs`).

use std::collections::{HashMap, HashSet};

use protobuf::MessageField;

use crate::collective::{Call, Calls};
use crate::error::Refused;
use crate::fold::Folds;
use crate::instructions::{BEGIN, END, START, TARGET_PREFIX};
use crate::module::Module;
use crate::output::Output;
use crate::proto::hlo::{HloInstructionProto, ShapeProto};
use crate::shape::{TOKEN, TUPLE, number, results, shape_of, token, tuple};
use crate::started::{Part, Started};
use crate::tokens::{TokenPath, TokenPaths, has_token};

/// `CustomCallApiVersion::API_VERSION_TYPED_FFI` (xla/service/hlo.proto).
const TYPED_FFI: i32 = 4;

/// What the rewriting of each computation needs.
pub(crate) struct Rewriting<'a> {
    pub(crate) calls: &'a Calls,
    pub(crate) paths: &'a TokenPaths,
    pub(crate) folds: &'a Folds,
    pub(crate) started: &'a Started,
    /// The number by which the launch names its program.
    pub(crate) program: i64,
}

impl Rewriting<'_> {
    /// Rewrites all computations that have collectives or ordered calls.
    pub(crate) fn module(&self, module: &mut Module) -> Result<(), Refused> {
        let unneeded = self.unneeded_computations(module);
        let with_calls: HashSet<i64> = self.calls.keys().map(|place| place.0).collect();
        let ids: Vec<i64> = module.computations().iter().map(|c| c.id).collect();
        for id in ids {
            if self.paths.contains_key(&id) || with_calls.contains(&id) {
                self.computation(module, id)?;
            }
        }
        module.remove_uncalled(unneeded);
        Ok(())
    }

    /// Reductions of collectives, and what only cuts or joins called.
    fn unneeded_computations(&self, module: &Module) -> HashSet<i64> {
        let mut unneeded = HashSet::new();
        for computation in module.computations() {
            for instruction in &computation.instructions {
                let place = (computation.id, instruction.id);
                if self.calls.contains_key(&place) || self.folds.dropped.contains(&place) {
                    unneeded.extend(&instruction.called_computation_ids);
                }
            }
        }
        unneeded
    }

    fn computation(&self, module: &mut Module, id: i64) -> Result<(), Refused> {
        let before = module.ordered(id)?;
        let root = module.computation(id)?.root_id;
        let path = self.paths.get(&id).copied();
        let mut out = Output::new(module, id, &before);
        let mut current = match path {
            Some(path) => Some(self.first_token(&mut out, path, &before)?),
            None => None,
        };
        let has_pair = matches!(path, Some(TokenPath::Paired | TokenPath::Condition));
        let mut starts = Starts::of(self.started, id, &before);
        for instruction in before {
            let (place, is_parameter) = (instruction.id, instruction.opcode == "parameter");
            if let Some(call) = self.calls.get(&(id, place)) {
                match current.as_mut().filter(|_| starts.has(place)) {
                    Some(current) => starts.end(&mut out, &instruction, call, current)?,
                    None => self.replace(&mut out, instruction, call, &mut current)?,
                }
            } else if has_pair && is_parameter || self.folds.dropped.contains(&(id, place)) {
                // It is there already, or not needed.
            } else if let Some(current) = &mut current {
                self.follow(&mut out, instruction, current)?;
            } else {
                out.push(instruction);
            }
            if let Some(current) = &mut current {
                starts.begin(&mut out, place, self.calls, current)?;
            }
        }
        let root = match (path, current) {
            (Some(TokenPath::Paired | TokenPath::Added), Some(token)) => out.pair(root, token)?,
            _ => root,
        };
        let instructions = out.instructions;
        module.replace(id, instructions, root);
        Ok(())
    }

    /// The token with which a computation of the instructions `before` begins.
    fn first_token(
        &self,
        out: &mut Output<'_>,
        path: TokenPath,
        before: &[HloInstructionProto],
    ) -> Result<i64, Refused> {
        let mut parameters = before.iter().filter(|i| i.opcode == "parameter");
        match path {
            TokenPath::Entry => {
                let first = out.make(None, "after-all", token(), &[], |_| {});
                // The launch begins here on every rank, whatever it executes later.
                Ok(out.make(None, "custom-call", token(), &[first], |made| {
                    made.custom_call_target = format!("{TARGET_PREFIX}{BEGIN}");
                    made.custom_call_api_version = TYPED_FFI;
                    made.custom_call_has_side_effect = true;
                    made.backend_config =
                        format!("{{program = {} : i64}}", self.program).into_bytes();
                }))
            }
            TokenPath::Added => {
                let count = parameters.count();
                Ok(out.make(None, "parameter", token(), &[], |made| {
                    made.parameter_number = count as i64;
                }))
            }
            TokenPath::Paired | TokenPath::Condition => {
                let id = out.computation;
                let parameter = parameters.next().ok_or_else(|| {
                    Refused::inconsistent(format!("computation {id} has no parameter"))
                })?;
                out.push_paired(parameter.clone())
            }
        }
    }

    /// Puts `call` in place of `instruction`.
    fn replace(
        &self,
        out: &mut Output<'_>,
        instruction: HloInstructionProto,
        call: &Call,
        current: &mut Option<i64>,
    ) -> Result<(), Refused> {
        let fold = self.folds.folds.get(&(out.computation, instruction.id));
        let fold = fold.cloned().unwrap_or_default();
        // What the others know the result by.
        let known = fold.joined.as_ref().unwrap_or(&instruction);
        let arrays: Vec<ShapeProto> = results(known).into_iter().cloned().collect();
        let is_tuple = known.shape.element_type == TUPLE;
        let (old, name) = (known.id, known.name.clone());
        let mut made = instruction;
        if let Some(whole) = fold.whole {
            made.operand_ids = vec![whole];
        }
        made.opcode = "custom-call".into();
        made.custom_call_target = format!("{TARGET_PREFIX}{}", call.form.target);
        made.custom_call_api_version = TYPED_FFI;
        made.custom_call_has_side_effect = call.is_ordered();
        made.backend_config = attributes(call).into_bytes();
        clear_collective(&mut made);
        let Some(current) = current.as_mut().filter(|_| call.is_ordered()) else {
            out.push(made);
            return Ok(());
        };
        made.id = out.fresh();
        made.name = format!("{name}.mpi_cuda");
        made.operand_ids.push(*current);
        let count = arrays.len();
        let mut shapes = arrays.clone();
        shapes.push(token());
        made.shape = MessageField::some(tuple(shapes));
        let called = out.push(made);
        if is_tuple {
            let elements: Vec<i64> = (0..count)
                .map(|index| out.element(None, None, called, index))
                .collect::<Result<_, _>>()?;
            out.make(Some(old), "tuple", tuple(arrays), &elements, |made| {
                made.name = name;
            });
        } else {
            out.element(Some(old), Some(name), called, 0)?;
        }
        *current = out.element(None, None, called, count)?;
        Ok(())
    }

    /// Pushes an instruction that is no collective, through which the token may go.
    fn follow(
        &self,
        out: &mut Output<'_>,
        mut instruction: HloInstructionProto,
        current: &mut i64,
    ) -> Result<(), Refused> {
        if has_token(&instruction) {
            for operand in &mut instruction.operand_ids {
                if out.is_token(*operand) {
                    *operand = *current;
                }
            }
            let shape = shape_of(&instruction);
            let id = out.push(instruction);
            *current = match shape
                .tuple_shapes
                .iter()
                .position(|s| s.element_type == TOKEN)
            {
                Some(index) => out.element(None, None, id, index)?,
                None => id,
            };
            return Ok(());
        }
        let called = &instruction.called_computation_ids;
        if !called.iter().any(|id| self.paths.contains_key(id)) {
            out.push(instruction);
            return Ok(());
        }
        match instruction.opcode.as_str() {
            "call" => instruction.operand_ids.push(*current),
            // A conditional's first operand chooses the branch.
            opcode => {
                let first = usize::from(opcode == "conditional");
                for operand in instruction.operand_ids.iter_mut().skip(first) {
                    *operand = out.pair(*operand, *current)?;
                }
            }
        }
        *current = out.push_paired(instruction)?;
        Ok(())
    }
}

/// The all-reduces of a computation that are started in parts.
#[derive(Default)]
struct Starts {
    /// What is started behind an instruction: the all-reduce, and a part of it.
    behind: HashMap<i64, Vec<(HloInstructionProto, Part)>>,
    /// By the all-reduce: the parts, with the numbers that their starts give.
    waited_for: HashMap<i64, Vec<(Part, i64)>>,
}

impl Starts {
    fn of(started: &Started, computation: i64, before: &[HloInstructionProto]) -> Starts {
        let mut starts = Starts::default();
        for whole in before {
            for part in started.get(&(computation, whole.id)).into_iter().flatten() {
                let behind = starts.behind.entry(part.after).or_default();
                behind.push((whole.clone(), part.clone()));
                starts.waited_for.entry(whole.id).or_default();
            }
        }
        starts
    }

    fn has(&self, whole: i64) -> bool {
        self.waited_for.contains_key(&whole)
    }

    /// Starts what is started behind an instruction.
    fn begin(
        &mut self,
        out: &mut Output<'_>,
        behind: i64,
        calls: &Calls,
        current: &mut i64,
    ) -> Result<(), Refused> {
        for (whole, part) in self.behind.remove(&behind).unwrap_or_default() {
            let Some(call) = calls.get(&(out.computation, whole.id)) else {
                continue;
            };
            let of = |&index: &usize| whole.operand_ids[index];
            let mut operands: Vec<i64> = part.operands.iter().map(of).collect();
            operands.push(*current);
            let shape = tuple(vec![number(), token()]);
            let started = out.make(None, "custom-call", shape, &operands, |made| {
                half(made, START, call, &whole);
            });
            let request = out.element(None, None, started, 0)?;
            *current = out.element(None, None, started, 1)?;
            let parts = self.waited_for.entry(whole.id).or_default();
            parts.push((part, request));
        }
        Ok(())
    }

    /// Waits for all parts of an all-reduce in its place.
    fn end(
        &mut self,
        out: &mut Output<'_>,
        whole: &HloInstructionProto,
        call: &Call,
        current: &mut i64,
    ) -> Result<(), Refused> {
        let arrays: Vec<ShapeProto> = results(whole).into_iter().cloned().collect();
        let mut elements = vec![0; arrays.len()];
        for (part, request) in self.waited_for.remove(&whole.id).unwrap_or_default() {
            let mut shapes: Vec<ShapeProto> = Vec::new();
            for &index in &part.operands {
                shapes.push(arrays[index].clone());
            }
            shapes.push(token());
            let operands = [request, *current];
            let ended = out.make(None, "custom-call", tuple(shapes), &operands, |made| {
                half(made, END, call, whole);
            });
            for (place, &index) in part.operands.iter().enumerate() {
                let is_all = whole.shape.element_type != TUPLE;
                let (id, name) = match is_all {
                    true => (Some(whole.id), Some(whole.name.clone())),
                    false => (None, None),
                };
                elements[index] = out.element(id, name, ended, place)?;
            }
            *current = out.element(None, None, ended, part.operands.len())?;
        }
        if whole.shape.element_type == TUPLE {
            out.make(Some(whole.id), "tuple", tuple(arrays), &elements, |made| {
                made.name.clone_from(&whole.name);
            });
        }
        Ok(())
    }
}

/// Makes an instruction the custom call `target` of a part of `whole`.
fn half(made: &mut HloInstructionProto, target: &str, call: &Call, whole: &HloInstructionProto) {
    made.custom_call_target = format!("{TARGET_PREFIX}{target}");
    made.custom_call_api_version = TYPED_FFI;
    made.custom_call_has_side_effect = true;
    made.backend_config = attributes(call).into_bytes();
    // Where it came from in the source, among others.
    made.special_fields.clone_from(&whole.special_fields);
}

/// The attributes of a custom call, as MLIR writes them.
fn attributes(call: &Call) -> String {
    let mut attributes = vec![format!("table = {} : i64", call.table.number())];
    if let Some(reduction) = call.reduction {
        attributes.push(format!("op = {reduction} : i64"));
    }
    if let Some(place) = call.place {
        attributes.push(format!("place = {place} : i64"));
    }
    for (index, outer) in call.outer.iter().enumerate() {
        attributes.push(format!("outer{index} = {outer} : i64"));
    }
    format!("{{{}}}", attributes.join(", "))
}

/// Takes away what only a collective has.
fn clear_collective(instruction: &mut HloInstructionProto) {
    instruction.channel_id = 0;
    instruction.use_global_device_ids = false;
    instruction.constrain_layout = false;
    instruction.called_computation_ids.clear();
    instruction.dimensions.clear();
    instruction.replica_groups.clear();
    instruction.source_target_pairs.clear();
    instruction.collective_device_list = MessageField::none();
    instruction.iota_collective_device_list = MessageField::none();
    instruction.mesh_axes_replica_group_list = MessageField::none();
}
