//! Rewriting as a whole: recorded modules, generated ones, and damaged ones. [`check`] is what must
//! hold of every module that comes out.

use std::collections::{HashMap, HashSet};

use protobuf::{Message, MessageField};

use crate::module::{TOKEN, TUPLE, shape_of, token, tuple};
use crate::proto::hlo::hlo_schedule_proto::{Entry, InstructionSequence};
use crate::proto::hlo::{
    HloComputationProto, HloInstructionProto, HloModuleProto, HloModuleProtoWithConfig,
    HloScheduleProto, ReplicaGroup, ShapeProto, SourceTarget,
};
use crate::{Devices, Refused, Rewritten, TARGET_PREFIX, rewrite};

const F32: i32 = 11;
const PRED: i32 = 1;

fn four() -> Devices {
    Devices::new(1, 4, vec![0, 1, 2, 3]).unwrap()
}

fn with_config(module: HloModuleProto) -> Vec<u8> {
    let both = HloModuleProtoWithConfig {
        hlo_module: MessageField::some(module),
        ..Default::default()
    };
    both.write_to_bytes().unwrap()
}

fn recorded(bytes: &[u8]) -> HloModuleProto {
    HloModuleProto::parse_from_bytes(bytes).unwrap()
}

/// What must hold: every value is there before it is used, with the schedule as with the list; no
/// collective is left; called computations fit their callers; one token passes through all ordered
/// calls of a computation in order.
fn check(rewritten: &Rewritten) -> HloModuleProto {
    let module = HloModuleProto::parse_from_bytes(&rewritten.module).unwrap();
    let by_id: HashMap<i64, &HloComputationProto> =
        module.computations.iter().map(|c| (c.id, c)).collect();
    let mut all_ids = HashSet::new();
    for computation in &module.computations {
        let mut seen: HashMap<i64, &HloInstructionProto> = HashMap::new();
        let mut last_token = None;
        for instruction in &computation.instructions {
            let place = format!("{} in {}", instruction.name, computation.name);
            assert!(all_ids.insert((computation.id, instruction.id)), "{place}");
            for operand in &instruction.operand_ids {
                assert!(seen.contains_key(operand), "{place}");
            }
            assert!(!is_collective(&instruction.opcode), "{place}");
            let operands: Vec<ShapeProto> = instruction
                .operand_ids
                .iter()
                .map(|id| shape_of(seen[id]))
                .collect();
            let called: Vec<&HloComputationProto> = instruction
                .called_computation_ids
                .iter()
                .map(|id| by_id[id])
                .collect();
            let result = shape_of(instruction);
            match instruction.opcode.as_str() {
                "while" => {
                    assert_eq!(parameters(called[0]), operands, "{place}");
                    assert_eq!(parameters(called[1]), operands, "{place}");
                    assert_eq!(root(called[0]), result, "{place}");
                    assert_eq!(operands[0], result, "{place}");
                }
                "conditional" => {
                    for (branch, operand) in called.iter().zip(&operands[1..]) {
                        assert_eq!(parameters(branch), std::slice::from_ref(operand), "{place}");
                        assert_eq!(root(branch), result, "{place}");
                    }
                }
                "call" => {
                    assert_eq!(parameters(called[0]), operands, "{place}");
                    assert_eq!(root(called[0]), result, "{place}");
                }
                "tuple" => assert_eq!(result, tuple(operands.clone()), "{place}"),
                "get-tuple-element" => {
                    let index = instruction.tuple_index as usize;
                    assert_eq!(operands[0].tuple_shapes[index], result, "{place}");
                }
                _ => {}
            }
            // The token that an ordered instruction takes is the one that the last one gave.
            let takes = instruction
                .operand_ids
                .iter()
                .filter(|id| leads_to_token(&seen, **id))
                .collect::<Vec<_>>();
            let gives = gives_token(&result);
            // Tokens that a program made for its own calls are not used any more.
            let made_before = instruction.name.starts_with("token.");
            let ordered = gives
                && rewritten.collectives > 0
                && !made_before
                && !matches!(instruction.opcode.as_str(), "tuple" | "get-tuple-element");
            if ordered {
                if let Some(last) = last_token {
                    assert!(!takes.is_empty(), "{place} takes no token");
                    for id in takes {
                        assert_eq!(origin(&seen, *id), last, "{place}");
                    }
                }
                last_token = Some(instruction.id);
            }
            seen.insert(instruction.id, instruction);
        }
        assert!(seen.contains_key(&computation.root_id));
        if let Some(shape) = computation.program_shape.as_ref()
            && computation.id != module.entry_computation_id
        {
            assert_eq!(shape.parameters, parameters(computation));
            assert_eq!(shape.result.get_or_default(), &root(computation));
        }
        if gives_token(&root(computation)) && rewritten.collectives > 0 {
            assert_eq!(Some(origin(&seen, computation.root_id)), last_token);
        }
    }
    let schedule = module.schedule.iter();
    for entry in schedule.flat_map(|schedule| &schedule.sequences) {
        let instructions = &by_id[&entry.key].instructions;
        let operands: HashMap<i64, &Vec<i64>> = instructions
            .iter()
            .map(|i| (i.id, &i.operand_ids))
            .collect();
        let mut done = HashSet::new();
        for id in &entry.value.instruction_ids {
            assert!(operands[id].iter().all(|operand| done.contains(operand)));
            assert!(done.insert(*id));
        }
        assert_eq!(done.len(), instructions.len());
    }
    module
}

fn is_collective(opcode: &str) -> bool {
    let kinds = [
        "all-",
        "reduce-scatter",
        "collective-",
        "partition-id",
        "replica-id",
    ];
    kinds.iter().any(|kind| opcode.starts_with(kind))
}

fn gives_token(shape: &ShapeProto) -> bool {
    shape.element_type == TOKEN || shape.tuple_shapes.iter().any(|s| s.element_type == TOKEN)
}

fn leads_to_token(seen: &HashMap<i64, &HloInstructionProto>, id: i64) -> bool {
    gives_token(&shape_of(seen[&id]))
}

/// The ordered instruction whose token `id` is or holds.
fn origin(seen: &HashMap<i64, &HloInstructionProto>, id: i64) -> i64 {
    let instruction = seen[&id];
    match instruction.opcode.as_str() {
        "get-tuple-element" => origin(seen, instruction.operand_ids[0]),
        "tuple" => {
            let mut with = instruction.operand_ids.iter();
            let operand = with.rfind(|id| leads_to_token(seen, **id)).unwrap();
            origin(seen, *operand)
        }
        _ => id,
    }
}

fn parameters(computation: &HloComputationProto) -> Vec<ShapeProto> {
    let mut found: Vec<&HloInstructionProto> = computation
        .instructions
        .iter()
        .filter(|i| i.opcode == "parameter")
        .collect();
    found.sort_by_key(|parameter| parameter.parameter_number);
    found.into_iter().map(shape_of).collect()
}

fn root(computation: &HloComputationProto) -> ShapeProto {
    let found = computation
        .instructions
        .iter()
        .find(|i| i.id == computation.root_id);
    shape_of(found.unwrap())
}

fn count(module: &HloModuleProto, target: &str) -> usize {
    let target = format!("{TARGET_PREFIX}{target}");
    let all = module.computations.iter().flat_map(|c| &c.instructions);
    all.filter(|i| i.custom_call_target == target).count()
}

macro_rules! recording {
    ($name:literal) => {
        recorded(include_bytes!(concat!(
            "../tests/recorded/",
            $name,
            ".hlo.pb"
        )))
    };
}

#[test]
fn recorded_modules_are_rewritten() {
    for (module, collectives) in [
        (recording!("every_kind"), 5),
        (recording!("nested"), 4),
        (recording!("train"), 3),
        (recording!("automatic"), 1),
        (recording!("local"), 0),
    ] {
        let name = module.name.clone();
        let rewritten = rewrite(&with_config(module), &four()).unwrap();
        check(&rewritten);
        assert!(
            rewritten.collectives >= collectives,
            "{name}: {}",
            rewritten.collectives
        );
        assert_eq!(rewritten.collectives == 0, rewritten.tables.is_empty());
    }
}

/// On GPUs collectives come in two halves.
#[test]
fn recorded_modules_of_gpus_are_rewritten() {
    for (module, collectives) in [
        (recording!("cuda/every_kind"), 7),
        (recording!("cuda/nested"), 4),
        (recording!("cuda/exchanges"), 4),
        (recording!("cuda/train"), 3),
        (recording!("cuda/automatic"), 1),
        (recording!("cuda/local"), 0),
    ] {
        let name = module.name.clone();
        let rewritten = rewrite(&with_config(module), &four()).unwrap();
        let module = check(&rewritten);
        assert!(
            rewritten.collectives >= collectives,
            "{name}: {}",
            rewritten.collectives
        );
        // Every computation that is left is called, and is scheduled if it is no fusion's.
        let all = || module.computations.iter().flat_map(|c| &c.instructions);
        let called: HashSet<i64> = all()
            .flat_map(|i| i.called_computation_ids.clone())
            .chain([module.entry_computation_id])
            .collect();
        for computation in &module.computations {
            assert!(called.contains(&computation.id), "{}", computation.name);
        }
        for instruction in all() {
            assert!(!instruction.opcode.starts_with("async-"), "{name}");
        }
    }
}

#[test]
fn every_kind_finds_its_handler() {
    for (module, exchange) in [
        (recording!("every_kind"), "all_to_all"),
        (recording!("cuda/every_kind"), "all_to_all_array"),
    ] {
        let module = check(&rewrite(&with_config(module), &four()).unwrap());
        for target in [
            "all_reduce",
            "all_gather",
            "reduce_scatter",
            exchange,
            "collective_permute",
            "id",
        ] {
            assert!(count(&module, target) > 0, "{target}");
        }
    }
}

#[test]
fn halves_that_are_no_pairs_are_refused_by_name() {
    // Something else reads what is not there yet.
    let mut module = recording!("cuda/every_kind");
    let all = module.computations.iter_mut();
    for instruction in all.flat_map(|c| &mut c.instructions) {
        if instruction.opcode == "all-reduce-done" {
            instruction.opcode = "copy".into();
        }
    }
    let error = rewrite(&with_config(module), &four()).unwrap_err();
    assert!(error.to_string().contains("all-reduce-done"), "{error}");
    // Several collectives in one.
    let mut module = recording!("cuda/every_kind");
    let inside = |c: &&mut HloComputationProto| {
        let mut instructions = c.instructions.iter();
        instructions.any(|i| i.opcode == "reduce-scatter") && c.instructions.len() == 2
    };
    let wrapped = module.computations.iter_mut().find(inside).unwrap();
    let mut again = wrapped.instructions[1].clone();
    again.id += 1;
    wrapped.instructions.push(again);
    let error = rewrite(&with_config(module), &four()).unwrap_err();
    assert!(error.to_string().contains("async-start"), "{error}");
}

#[test]
fn the_same_module_becomes_the_same_bytes_and_another_name_the_same_program() {
    let bytes = with_config(recording!("nested"));
    let (first, second) = (
        rewrite(&bytes, &four()).unwrap(),
        rewrite(&bytes, &four()).unwrap(),
    );
    assert_eq!(first.module, second.module);
    let mut renamed = recording!("nested");
    for computation in &mut renamed.computations {
        for instruction in &mut computation.instructions {
            instruction.name += ".again";
        }
    }
    let renamed = rewrite(&with_config(renamed), &four()).unwrap();
    assert_eq!(
        (first.identity, first.sequence),
        (renamed.identity, renamed.sequence)
    );
    let mut changed = recording!("nested");
    changed.computations[0].instructions[0]
        .shape
        .mut_or_insert_default()
        .dimensions
        .push(1);
    if let Ok(changed) = rewrite(&with_config(changed), &four()) {
        assert_ne!(first.identity, changed.identity);
    }
    let others = Devices::new(1, 4, vec![3, 2, 1, 0]).unwrap();
    assert_ne!(first.sequence, rewrite(&bytes, &others).unwrap().sequence);
}

#[test]
fn unknown_fields_and_aliases_stay() {
    let mut module = recording!("train");
    module
        .special_fields
        .mut_unknown_fields()
        .add_varint(900, 7);
    let last = module.computations.last_mut().unwrap();
    let instruction = last.instructions.last_mut().unwrap();
    instruction
        .special_fields
        .mut_unknown_fields()
        .add_varint(901, 8);
    let id = instruction.id;
    let out = check(&rewrite(&with_config(module), &four()).unwrap());
    let unknown = out.special_fields.unknown_fields();
    assert!(unknown.get(900).is_some());
    assert!(!out.input_output_alias.entries.is_empty());
    let kept = out
        .computations
        .iter()
        .flat_map(|c| &c.instructions)
        .find(|i| i.id == id);
    assert!(
        kept.unwrap()
            .special_fields
            .unknown_fields()
            .get(901)
            .is_some()
    );
}

/// A small generator of modules: xorshift (Marsaglia, 2003), so that a failure can be repeated.
struct Generator {
    state: u64,
    next_id: i64,
    computations: Vec<HloComputationProto>,
    sequences: Vec<Entry>,
    collectives: usize,
}

impl Generator {
    fn new(seed: u64) -> Generator {
        Generator {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            next_id: 1,
            computations: Vec::new(),
            sequences: Vec::new(),
            collectives: 0,
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 33) as usize % bound
    }

    fn id(&mut self) -> i64 {
        self.next_id += 1;
        self.next_id
    }

    fn make(&mut self, opcode: &str, shape: ShapeProto, operands: &[i64]) -> HloInstructionProto {
        let id = self.id();
        HloInstructionProto {
            name: format!("{opcode}.{id}"),
            opcode: opcode.into(),
            shape: MessageField::some(shape),
            id,
            operand_ids: operands.to_vec(),
            ..Default::default()
        }
    }

    fn finish(&mut self, instructions: Vec<HloInstructionProto>, root: i64) -> i64 {
        let id = self.id();
        self.sequences.push(Entry {
            key: id,
            value: MessageField::some(InstructionSequence {
                instruction_ids: instructions.iter().map(|i| i.id).collect(),
                ..Default::default()
            }),
            ..Default::default()
        });
        self.computations.push(HloComputationProto {
            name: format!("computation.{id}"),
            instructions,
            id,
            root_id: root,
            ..Default::default()
        });
        id
    }

    fn adding(&mut self) -> i64 {
        let mut parameters = [
            self.make("parameter", scalar(F32), &[]),
            self.make("parameter", scalar(F32), &[]),
        ];
        parameters[1].parameter_number = 1;
        let sum = self.make("add", scalar(F32), &[parameters[0].id, parameters[1].id]);
        let root = sum.id;
        let [first, second] = parameters;
        self.finish(vec![first, second, sum], root)
    }

    /// A computation from a vector to a vector, or to a predicate.
    fn vector_function(&mut self, depth: usize, predicate: bool) -> i64 {
        let parameter = self.make("parameter", vector(), &[]);
        let mut value = parameter.id;
        let mut body = vec![parameter];
        for _ in 0..self.below(5) {
            let made = self.step(depth, value);
            value = made.last().map_or(value, |instruction| instruction.id);
            body.extend(made);
        }
        if predicate {
            let test = self.make("is-positive", scalar(PRED), &[value]);
            value = test.id;
            body.push(test);
        }
        self.finish(body, value)
    }

    /// Instructions from one vector to another.
    fn step(&mut self, depth: usize, value: i64) -> Vec<HloInstructionProto> {
        let choice = self.below(if depth == 0 { 5 } else { 9 });
        match choice {
            0 => vec![self.make("negate", vector(), &[value])],
            1 => {
                self.collectives += 1;
                let adding = self.adding();
                let mut made = self.make("all-reduce", vector(), &[value]);
                made.called_computation_ids = vec![adding];
                made.channel_id = 1;
                made.use_global_device_ids = true;
                made.replica_groups = vec![group(&[0, 2]), group(&[1, 3])];
                vec![made]
            }
            2 => {
                self.collectives += 1;
                let mut made = self.make("collective-permute", vector(), &[value]);
                made.channel_id = 1;
                made.source_target_pairs = vec![SourceTarget {
                    source: 0,
                    target: 3,
                    ..Default::default()
                }];
                vec![made]
            }
            3 => {
                self.collectives += 1;
                let adding = self.adding();
                let both = tuple(vec![vector(), vector()]);
                let mut made = self.make("all-reduce", both, &[value, value]);
                made.called_computation_ids = vec![adding];
                made.channel_id = 1;
                made.use_global_device_ids = true;
                made.replica_groups = vec![group(&[0, 1, 2, 3])];
                let mut element = self.make("get-tuple-element", vector(), &[made.id]);
                element.tuple_index = 1;
                vec![made, element]
            }
            4 => {
                let mut first = self.make("after-all", token(), &[]);
                first.name = format!("token.{}", first.id);
                let result = tuple(vec![vector(), token()]);
                let mut call = self.make("custom-call", result, &[value, first.id]);
                call.custom_call_target = "mpi_cuda_allreduce".into();
                let mut element = self.make("get-tuple-element", vector(), &[call.id]);
                element.tuple_index = 0;
                vec![first, call, element]
            }
            5 | 6 => {
                let body = self.vector_function(depth - 1, false);
                let condition = self.vector_function(depth - 1, true);
                let mut made = self.make("while", vector(), &[value]);
                made.called_computation_ids = vec![body, condition];
                vec![made]
            }
            7 => {
                let branches = vec![
                    self.vector_function(depth - 1, false),
                    self.vector_function(depth - 1, false),
                ];
                let test = self.make("is-positive", scalar(PRED), &[value]);
                let mut made = self.make("conditional", vector(), &[test.id, value, value]);
                made.called_computation_ids = branches;
                vec![test, made]
            }
            _ => {
                let callee = self.vector_function(depth - 1, false);
                let mut made = self.make("call", vector(), &[value]);
                made.called_computation_ids = vec![callee];
                vec![made]
            }
        }
    }

    fn module(mut self, scheduled: bool) -> (HloModuleProto, usize) {
        let entry = self.vector_function(3, false);
        let schedule = HloScheduleProto {
            sequences: self.sequences,
            ..Default::default()
        };
        let module = HloModuleProto {
            name: "generated".into(),
            computations: self.computations,
            entry_computation_id: entry,
            schedule: scheduled.then_some(schedule).into(),
            ..Default::default()
        };
        (module, self.collectives)
    }
}

fn scalar(element_type: i32) -> ShapeProto {
    ShapeProto {
        element_type,
        ..Default::default()
    }
}

fn vector() -> ShapeProto {
    ShapeProto {
        element_type: F32,
        dimensions: vec![4],
        ..Default::default()
    }
}

fn group(ids: &[i64]) -> ReplicaGroup {
    ReplicaGroup {
        replica_ids: ids.to_vec(),
        ..Default::default()
    }
}

#[test]
fn generated_modules_are_rewritten() {
    let mut most = 0;
    for seed in 1..400 {
        let (module, collectives) = Generator::new(seed).module(seed % 2 == 0);
        let rewritten = rewrite(&with_config(module), &four());
        let rewritten = rewritten.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        check(&rewritten);
        assert_eq!(rewritten.collectives, collectives, "seed {seed}");
        most = most.max(collectives);
    }
    assert!(most > 10, "the generator makes too little: {most}");
}

#[test]
fn control_dependencies_stay() {
    let mut edges = 0;
    for seed in 1..200 {
        let mut generator = Generator::new(seed + 1000);
        let (mut module, _) = Generator::new(seed).module(seed % 2 == 0);
        for computation in &mut module.computations {
            let ids: Vec<i64> = computation.instructions.iter().map(|i| i.id).collect();
            for (place, instruction) in computation.instructions.iter_mut().enumerate().skip(1) {
                if instruction.opcode != "parameter" && generator.below(3) == 0 {
                    let before = ids[generator.below(place)];
                    instruction.control_predecessor_ids.push(before);
                }
            }
        }
        let rewritten = rewrite(&with_config(module.clone()), &four());
        let out = check(&rewritten.unwrap_or_else(|error| panic!("seed {seed}: {error}")));
        for was in &module.computations {
            // How a collective reduced is no computation any more.
            let Some(is) = out.computations.iter().find(|is| is.id == was.id) else {
                continue;
            };
            let place = |id: i64| is.instructions.iter().position(|i| i.id == id);
            for instruction in &is.instructions {
                for before in &instruction.control_predecessor_ids {
                    let first = place(*before);
                    let own = place(instruction.id);
                    assert!(
                        first.is_some() && first < own,
                        "seed {seed}: {}",
                        instruction.name
                    );
                }
            }
            for instruction in &was.instructions {
                for before in &instruction.control_predecessor_ids {
                    let (first, second) = (place(*before).unwrap(), place(instruction.id).unwrap());
                    // What an instruction became begins with what takes over its dependencies.
                    let between = &is.instructions[..=second];
                    assert!(first < second, "seed {seed}");
                    assert!(
                        between
                            .iter()
                            .any(|i| i.control_predecessor_ids.contains(before)),
                        "seed {seed}: {} after {before}",
                        instruction.name
                    );
                    edges += 1;
                }
            }
        }
    }
    assert!(edges > 500, "{edges}");
}

/// Whatever the bytes are, there is an answer or an error.
#[test]
fn damaged_modules_never_panic() {
    let mut generator = Generator::new(99);
    for module in [
        recording!("every_kind"),
        recording!("nested"),
        recording!("train"),
        recording!("exchanges"),
        recording!("cuda/every_kind"),
    ] {
        let bytes = with_config(module);
        for _ in 0..1500 {
            let mut damaged = bytes.clone();
            for _ in 0..=generator.below(4) {
                let place = generator.below(damaged.len());
                match generator.below(3) {
                    0 => damaged[place] = generator.below(256) as u8,
                    1 => damaged.truncate(place.max(1)),
                    _ => damaged[place] ^= 1 << generator.below(8),
                }
            }
            let _ = rewrite(&damaged, &four());
        }
    }
}

/// As above, but well-formed: numbers are changed in the messages.
#[test]
fn inconsistent_modules_never_panic() {
    for seed in 1..3000 {
        let mut generator = Generator::new(seed);
        let mut module = match seed % 5 {
            0 => recording!("every_kind"),
            1 => recording!("nested"),
            2 => recording!("cuda/every_kind"),
            3 => recording!("exchanges"),
            _ => Generator::new(seed).module(true).0,
        };
        for _ in 0..3 {
            let computations = module.computations.len();
            let computation = &mut module.computations[generator.below(computations)];
            if computation.instructions.is_empty() {
                continue;
            }
            let place = generator.below(computation.instructions.len());
            let number = generator.below(40) as i64 - 3;
            let instruction = &mut computation.instructions[place];
            match generator.below(10) {
                0 => instruction.id = number,
                1 => instruction.operand_ids.push(number),
                2 => instruction.called_computation_ids.push(number),
                3 => instruction.operand_ids.clear(),
                4 => instruction.dimensions = vec![number],
                5 => instruction.shape = MessageField::some(tuple(vec![])),
                6 => instruction.called_computation_ids = vec![computation.id],
                7 => instruction.opcode = "all-gather".into(),
                8 => computation.root_id = number,
                _ => {
                    computation.instructions.remove(place);
                }
            }
        }
        let _ = rewrite(&with_config(module), &four());
    }
}

#[test]
fn what_cannot_be_executed_is_refused_by_name() {
    let refusal = |edit: &dyn Fn(&mut HloInstructionProto)| {
        let mut module = recording!("every_kind");
        let all = module
            .computations
            .iter_mut()
            .flat_map(|c| &mut c.instructions);
        let instruction = all.into_iter().find(|i| i.opcode == "all-reduce").unwrap();
        edit(instruction);
        let name = instruction.name.clone();
        match rewrite(&with_config(module), &four()) {
            Err(error @ Refused::Instruction { .. }) => {
                assert!(error.to_string().contains(&name));
                error.to_string()
            }
            other => panic!("{:?}", other.map(|rewritten| rewritten.summary)),
        }
    };
    let text = refusal(&|i| i.opcode = "ragged-all-to-all".into());
    assert!(text.contains("ragged-all-to-all"), "{text}");
    refusal(&|i| i.opcode = "all-reduce-done".into());
    refusal(&|i| i.called_computation_ids.clear());
    refusal(&|i| {
        i.collective_device_list = MessageField::none();
        i.replica_groups = vec![group(&[0, 0])];
    });
    let text = refusal(&|i| {
        i.channel_id = 0;
        i.use_global_device_ids = true;
    });
    assert!(text.contains("channel"), "{text}");
}

#[test]
fn an_unusual_reduction_is_refused() {
    let mut generator = Generator::new(5);
    let adding = generator.adding();
    let computation = generator.computations.last_mut().unwrap();
    computation.instructions.last_mut().unwrap().opcode = "subtract".into();
    let parameter = generator.make("parameter", vector(), &[]);
    let mut reduce = generator.make("all-reduce", vector(), &[parameter.id]);
    reduce.called_computation_ids = vec![adding];
    let root = reduce.id;
    let entry = generator.finish(vec![parameter, reduce], root);
    let module = HloModuleProto {
        computations: generator.computations,
        entry_computation_id: entry,
        ..Default::default()
    };
    let error = rewrite(&with_config(module), &four())
        .unwrap_err()
        .to_string();
    assert!(error.contains("subtract"), "{error}");
}

#[test]
fn tuples_have_no_other_type() {
    assert_eq!(tuple(vec![]).element_type, TUPLE);
}
