//! Threading one token through everything that has an order: collectives, in the order of the
//! schedule, and custom calls that have a token already (our operations, ordered host callbacks).
//!
//! The runtime keeps apart only what depends on each other through values, so each ordered call takes
//! the token of the one before. Where a called computation has ordered calls, the token goes in and
//! comes out: the operand of `while` and `conditional`, and their results, are paired with it, and
//! `call` has one more operand.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use protobuf::MessageField;

use crate::collective::{self, Call, Calls, recognise_all};
use crate::devices::{DeviceTable, Devices};
use crate::error::Refused;
use crate::fold::{self, Folds};
use crate::instructions::{BEGIN, TARGET_PREFIX};
use crate::module::Module;
use crate::proto::hlo::{HloInstructionProto, ShapeProto};
use crate::shape::{self, TOKEN, TUPLE, results, shape_of, token, tuple};

/// `CustomCallApiVersion::API_VERSION_TYPED_FFI` (xla/service/hlo.proto).
const TYPED_FFI: i32 = 4;
/// Characters of the summary.
const LONGEST_SUMMARY: usize = 400;
/// What the names of our operations' targets begin with (`include/mpi_cuda.h`).
const OPERATIONS: &str = "mpi_cuda_";

/// What was found in a module.
#[derive(Default)]
pub(crate) struct Found {
    pub(crate) tables: BTreeMap<i64, DeviceTable>,
    pub(crate) identity: i64,
    pub(crate) sequence: u64,
    pub(crate) summary: String,
    pub(crate) collectives: usize,
    pub(crate) other_ordered: usize,
    /// Collectives executed, and bytes that they move, as far as loops tell how often they run.
    pub(crate) executed: u64,
    pub(crate) bytes: u64,
}

/// Rewrites `module`.
pub(crate) fn thread(module: &mut Module, devices: &Devices) -> Result<Found, Refused> {
    let mut found = Found::default();
    let calls = recognise_all(module, devices)?;
    let ordered = ordered_computations(module, &calls)?;
    let folds = fold::find(module, &calls)?;
    let mut description = Description::default();
    describe(
        module,
        module.entry(),
        &calls,
        &mut description,
        &mut found,
        Times { depth: 0, runs: 1 },
    )?;
    let mut hasher = DefaultHasher::new();
    (devices.ids(), &description.whole).hash(&mut hasher);
    found.sequence = hasher.finish();
    found.identity = identity(module, found.sequence);
    found.summary = description.summary();
    for call in calls.values() {
        found.tables.insert(call.table.number(), call.table.clone());
    }
    // Reductions, and what is cut or joined no more.
    let mut uncalled = HashSet::new();
    for computation in module.computations() {
        for instruction in &computation.instructions {
            let place = (computation.id, instruction.id);
            if calls.contains_key(&place) || folds.dropped.contains(&place) {
                uncalled.extend(&instruction.called_computation_ids);
            }
        }
    }
    let ids: Vec<i64> = module.computations().iter().map(|c| c.id).collect();
    for id in ids {
        let touched = ordered.contains_key(&id) || calls.keys().any(|&(in_, _)| in_ == id);
        if touched {
            let rewriting = Rewriting {
                calls: &calls,
                ordered: &ordered,
                folds: &folds,
                program: found.identity,
            };
            rewriting.computation(module, id)?;
        }
    }
    module.remove_uncalled(uncalled);
    Ok(found)
}

/// The same on all ranks, if they have the same program, and each time that it is compiled.
fn identity(module: &Module, sequence: u64) -> i64 {
    let mut hasher = DefaultHasher::new();
    sequence.hash(&mut hasher);
    for computation in module.computations() {
        computation.instructions.len().hash(&mut hasher);
        for instruction in &computation.instructions {
            instruction.opcode.hash(&mut hasher);
            instruction.custom_call_target.hash(&mut hasher);
            for shape in results(instruction) {
                (shape.element_type, &shape.dimensions).hash(&mut hasher);
            }
        }
    }
    hasher.finish() as i64
}

/// Whether a custom call has its place in the order already.
fn has_token(instruction: &HloInstructionProto) -> bool {
    instruction.opcode == "custom-call"
        && results(instruction)
            .iter()
            .any(|shape| shape.element_type == TOKEN)
}

/// How a computation with ordered calls gets and gives the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// The program itself: it begins with a new token.
    Entry,
    /// Its one parameter and its result are paired with the token.
    Paired,
    /// Its one parameter is paired with the token, and nothing comes out: a loop's condition.
    Condition,
    /// One more parameter, and the result is paired with the token.
    Added,
}

/// The computations that have ordered calls, directly or not.
fn ordered_computations(module: &Module, calls: &Calls) -> Result<HashMap<i64, Shape>, Refused> {
    let mut with_calls: HashSet<i64> = calls
        .iter()
        .filter(|(_, call)| call.is_ordered())
        .map(|(&(computation, _), _)| computation)
        .collect();
    for computation in module.computations() {
        if computation.instructions.iter().any(has_token) {
            with_calls.insert(computation.id);
        }
    }
    // A token is only needed where there is a collective to be ordered.
    if !calls.values().any(|call| call.is_ordered()) {
        return Ok(HashMap::new());
    }
    let mut shapes: HashMap<i64, Shape> = HashMap::new();
    loop {
        let mut grown = false;
        for computation in module.computations() {
            for instruction in &computation.instructions {
                let called = &instruction.called_computation_ids;
                if !called.iter().any(|id| with_calls.contains(id)) {
                    continue;
                }
                // A collective's own reduction has no calls; if it had, it would be refused below.
                let shape_of_called = |position: usize| match instruction.opcode.as_str() {
                    // Body and condition (`HloInstruction::while_body`, index 0).
                    "while" if position == 0 => Ok(Shape::Paired),
                    "while" => Ok(Shape::Condition),
                    "conditional" => Ok(Shape::Paired),
                    "call" => Ok(Shape::Added),
                    _ => Err(Refused::instruction(
                        instruction,
                        "what it calls has collectives, or other ordered calls",
                    )),
                };
                grown |= with_calls.insert(computation.id);
                for (position, &id) in called.iter().enumerate() {
                    grown |= with_calls.insert(id);
                    let shape = shape_of_called(position)?;
                    match shapes.insert(id, shape) {
                        Some(before) if before != shape => {
                            return Err(Refused::instruction(
                                instruction,
                                "what it calls is also called in another way",
                            ));
                        }
                        Some(_) => {}
                        None => grown = true,
                    }
                }
            }
        }
        if !grown {
            break;
        }
    }
    let entry = module.entry();
    if with_calls.contains(&entry) {
        shapes.insert(entry, Shape::Entry);
    }
    // What nothing calls is not executed, and stays as it is but for its collectives.
    Ok(shapes)
}

/// The sequence in words.
#[derive(Default)]
struct Description {
    whole: String,
}

impl Description {
    fn add(&mut self, text: &str) {
        if !self.whole.is_empty() {
            self.whole += "; ";
        }
        self.whole += text;
    }

    fn summary(&self) -> String {
        match self.whole.char_indices().nth(LONGEST_SUMMARY) {
            Some((end, _)) => format!("{} ...", &self.whole[..end]),
            None => self.whole.clone(),
        }
    }
}

/// Where [`describe`] is.
#[derive(Clone, Copy)]
struct Times {
    /// Calls inside each other.
    depth: usize,
    /// How often the computation runs.
    runs: u64,
}

/// How often what an instruction calls runs; very often, if it does not say.
fn runs(instruction: &HloInstructionProto) -> u64 {
    if instruction.opcode != "while" {
        return 1;
    }
    // `WhileLoopBackendConfig` as JSON.
    let config = String::from_utf8_lossy(&instruction.backend_config);
    let count = config
        .split_once("\"known_trip_count\":{\"n\":\"")
        .and_then(|(_, rest)| rest.split('"').next()?.parse().ok());
    count.unwrap_or(u64::MAX)
}

/// Describes what a computation does, with what it calls, in order.
fn describe(
    module: &Module,
    computation: i64,
    calls: &Calls,
    description: &mut Description,
    found: &mut Found,
    times: Times,
) -> Result<(), Refused> {
    if times.depth > module.computations().len() {
        return Err(Refused::inconsistent("a computation calls itself"));
    }
    for instruction in module.ordered(computation)? {
        if let Some(call) = calls.get(&(computation, instruction.id)) {
            if call.is_ordered() {
                description.add(&collective::describe(&instruction, call));
                found.collectives += 1;
                let bytes = shape::bytes(&instruction).saturating_mul(times.runs);
                found.executed = found.executed.saturating_add(times.runs);
                found.bytes = found.bytes.saturating_add(bytes);
            }
            continue;
        }
        if has_token(&instruction) {
            description.add(&instruction.custom_call_target);
            found.other_ordered += 1;
        } else if instruction.custom_call_target.starts_with(OPERATIONS) && !calls.is_empty() {
            return Err(Refused::instruction(
                &instruction,
                "it has no XLA token, so it has no order beside collectives",
            ));
        }
        if !matches!(
            instruction.opcode.as_str(),
            "while" | "conditional" | "call"
        ) {
            continue;
        }
        let length = description.whole.len();
        description.add(&instruction.opcode);
        description.whole += " {";
        let inside = description.whole.len();
        for &called in &instruction.called_computation_ids {
            let inner = Times {
                depth: times.depth + 1,
                runs: times.runs.saturating_mul(runs(&instruction)),
            };
            describe(module, called, calls, description, found, inner)?;
        }
        if description.whole.len() == inside {
            description.whole.truncate(length);
        } else {
            description.whole += "}";
        }
    }
    Ok(())
}

/// What the rewriting of each computation needs.
struct Rewriting<'a> {
    calls: &'a Calls,
    ordered: &'a HashMap<i64, Shape>,
    folds: &'a Folds,
    program: i64,
}

/// A computation while it is rewritten.
struct Output<'a> {
    module: &'a mut Module,
    computation: i64,
    /// Ids of the instructions that were there before.
    ids: Vec<i64>,
    instructions: Vec<HloInstructionProto>,
    shapes: HashMap<i64, ShapeProto>,
}

impl Output<'_> {
    fn push(&mut self, instruction: HloInstructionProto) -> i64 {
        let id = instruction.id;
        self.shapes.insert(id, shape_of(&instruction));
        self.instructions.push(instruction);
        id
    }

    fn fresh(&mut self) -> i64 {
        self.module.fresh_id(&self.instructions, &self.ids)
    }

    fn shape(&self, id: i64) -> Result<ShapeProto, Refused> {
        self.shapes.get(&id).cloned().ok_or_else(|| {
            Refused::inconsistent(format!("instruction {id} is used before it is there"))
        })
    }

    /// A new instruction; `id` may be that of one that it stands for.
    fn make(
        &mut self,
        id: Option<i64>,
        opcode: &str,
        shape: ShapeProto,
        operands: &[i64],
        edit: impl FnOnce(&mut HloInstructionProto),
    ) -> i64 {
        let own = id.unwrap_or_else(|| self.fresh());
        let mut instruction = HloInstructionProto {
            name: format!("mpi_cuda.{opcode}.{}.{own}", self.computation),
            opcode: opcode.into(),
            shape: MessageField::some(shape),
            id: own,
            operand_ids: operands.to_vec(),
            ..Default::default()
        };
        edit(&mut instruction);
        self.push(instruction)
    }

    fn element(
        &mut self,
        id: Option<i64>,
        name: Option<String>,
        of: i64,
        index: usize,
    ) -> Result<i64, Refused> {
        let shape = self.shape(of)?.tuple_shapes.get(index).cloned();
        let shape =
            shape.ok_or_else(|| Refused::inconsistent(format!("{of} has no element {index}")))?;
        Ok(self.make(id, "get-tuple-element", shape, &[of], |made| {
            made.tuple_index = index as i64;
            if let Some(name) = name {
                made.name = name;
            }
        }))
    }

    /// `first` paired with the token.
    fn pair(&mut self, first: i64, second: i64) -> Result<i64, Refused> {
        let shape = tuple(vec![self.shape(first)?, token()]);
        Ok(self.make(None, "tuple", shape, &[first, second], |_| {}))
    }

    /// Pushes `instruction`, whose result is now paired with the token, under a new id; what stood for
    /// it stands for the first element. Returns the token.
    fn push_paired(&mut self, mut instruction: HloInstructionProto) -> Result<i64, Refused> {
        let (old, name) = (instruction.id, instruction.name.clone());
        instruction.id = self.fresh();
        instruction.name = format!("{name}.mpi_cuda");
        instruction.shape = MessageField::some(tuple(vec![shape_of(&instruction), token()]));
        let paired = self.push(instruction);
        self.element(Some(old), Some(name), paired, 0)?;
        self.element(None, None, paired, 1)
    }
}

impl Rewriting<'_> {
    fn computation(&self, module: &mut Module, id: i64) -> Result<(), Refused> {
        let before = module.ordered(id)?;
        let root = module.computation(id)?.root_id;
        let shape = self.ordered.get(&id).copied();
        let mut out = Output {
            computation: id,
            ids: before.iter().map(|instruction| instruction.id).collect(),
            instructions: Vec::with_capacity(before.len() + 8),
            shapes: HashMap::new(),
            module,
        };
        let mut current = match shape {
            Some(Shape::Entry) => {
                let first = out.make(None, "after-all", token(), &[], |_| {});
                // The launch begins here on every rank, whatever it executes later.
                Some(out.make(None, "custom-call", token(), &[first], |made| {
                    made.custom_call_target = format!("{TARGET_PREFIX}{BEGIN}");
                    made.custom_call_api_version = TYPED_FFI;
                    made.custom_call_has_side_effect = true;
                    made.backend_config =
                        format!("{{program = {} : i64}}", self.program).into_bytes();
                }))
            }
            Some(Shape::Added) => {
                let parameters = before.iter().filter(|i| i.opcode == "parameter").count();
                Some(out.make(None, "parameter", token(), &[], |made| {
                    made.parameter_number = parameters as i64;
                }))
            }
            Some(Shape::Paired | Shape::Condition) => {
                let parameter = before.iter().find(|i| i.opcode == "parameter");
                let parameter = parameter.ok_or_else(|| {
                    Refused::inconsistent(format!("computation {id} has no parameter"))
                })?;
                Some(out.push_paired(parameter.clone())?)
            }
            None => None,
        };
        for instruction in before {
            let paired_parameter = instruction.opcode == "parameter"
                && matches!(shape, Some(Shape::Paired | Shape::Condition));
            if paired_parameter || self.folds.dropped.contains(&(id, instruction.id)) {
                continue;
            }
            if let Some(call) = self.calls.get(&(id, instruction.id)) {
                self.replace(&mut out, instruction, call, &mut current)?;
            } else if let Some(current) = &mut current {
                self.follow(&mut out, instruction, current)?;
            } else {
                out.push(instruction);
            }
        }
        let root = match (shape, current) {
            (Some(Shape::Paired | Shape::Added), Some(current)) => out.pair(root, current)?,
            _ => root,
        };
        let instructions = out.instructions;
        module.replace(id, instructions, root);
        Ok(())
    }

    /// Puts `call` in place of `instruction`.
    fn replace(
        &self,
        out: &mut Output<'_>,
        instruction: HloInstructionProto,
        call: &Call,
        current: &mut Option<i64>,
    ) -> Result<(), Refused> {
        let mut attributes = vec![format!("table = {} : i64", call.table.number())];
        if let Some(reduction) = call.reduction {
            attributes.push(format!("op = {reduction} : i64"));
        }
        for (index, outer) in call.outer.iter().enumerate() {
            attributes.push(format!("outer{index} = {outer} : i64"));
        }
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
        made.backend_config = format!("{{{}}}", attributes.join(", ")).into_bytes();
        made.channel_id = 0;
        made.use_global_device_ids = false;
        made.constrain_layout = false;
        made.called_computation_ids.clear();
        made.dimensions.clear();
        made.replica_groups.clear();
        made.source_target_pairs.clear();
        made.collective_device_list = MessageField::none();
        made.iota_collective_device_list = MessageField::none();
        made.mesh_axes_replica_group_list = MessageField::none();
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
                if out
                    .shapes
                    .get(operand)
                    .is_some_and(|s| s.element_type == TOKEN)
                {
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
        if !called.iter().any(|id| self.ordered.contains_key(id)) {
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
