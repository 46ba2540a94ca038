//! Modules with collectives in loops, branches and calls, made at random.

use protobuf::MessageField;

use super::group;
use crate::proto::hlo::hlo_schedule_proto::{Entry, InstructionSequence};
use crate::proto::hlo::{
    HloComputationProto, HloInstructionProto, HloModuleProto, HloScheduleProto, ShapeProto,
    SourceTarget,
};
use crate::shape::{token, tuple};

const F32: i32 = 11;
const PRED: i32 = 1;

/// A small generator of modules: xorshift (Marsaglia, 2003), so that a failure can be repeated.
pub(super) struct Generator {
    state: u64,
    next_id: i64,
    pub(super) computations: Vec<HloComputationProto>,
    sequences: Vec<Entry>,
    collectives: usize,
}

impl Generator {
    pub(super) fn new(seed: u64) -> Generator {
        Generator {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            next_id: 1,
            computations: Vec::new(),
            sequences: Vec::new(),
            collectives: 0,
        }
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 33) as usize % bound
    }

    fn id(&mut self) -> i64 {
        self.next_id += 1;
        self.next_id
    }

    pub(super) fn make(
        &mut self,
        opcode: &str,
        shape: ShapeProto,
        operands: &[i64],
    ) -> HloInstructionProto {
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

    pub(super) fn finish(&mut self, instructions: Vec<HloInstructionProto>, root: i64) -> i64 {
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

    pub(super) fn adding(&mut self) -> i64 {
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

    pub(super) fn module(mut self, scheduled: bool) -> (HloModuleProto, usize) {
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

pub(super) fn vector() -> ShapeProto {
    ShapeProto {
        element_type: F32,
        dimensions: vec![4],
        ..Default::default()
    }
}
