//! What cannot be rewritten, and what the error names.

use protobuf::MessageField;

use super::generator::{Generator, vector};
use super::{four, group, recording, with_config};
use crate::proto::hlo::{HloComputationProto, HloInstructionProto, HloModuleProto};
use crate::{Refused, rewrite};

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
