//! Modules that JAX's plugins made (`tests/record.py`).

use std::collections::HashSet;

use super::check::check;
use super::{four, recording, with_config};
use crate::proto::hlo::HloModuleProto;
use crate::{Devices, TARGET_PREFIX, rewrite};

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

fn count(module: &HloModuleProto, target: &str) -> usize {
    let target = format!("{TARGET_PREFIX}{target}");
    let all = module.computations.iter().flat_map(|c| &c.instructions);
    all.filter(|i| i.custom_call_target == target).count()
}

/// The recorded module with loops whose length is said to be this one, or not said.
fn nested(length: Option<u32>) -> HloModuleProto {
    let mut module = recording!("nested");
    for computation in &mut module.computations {
        for instruction in &mut computation.instructions {
            let config = String::from_utf8_lossy(&instruction.backend_config).into_owned();
            if config.contains("known_trip_count") {
                instruction.backend_config = match length {
                    Some(length) => config.replace(
                        "\"known_trip_count\":{\"n\":\"3\"}",
                        &format!("\"known_trip_count\":{{\"n\":\"{length}\"}}"),
                    ),
                    None => String::new(),
                }
                .into_bytes();
            }
        }
    }
    module
}

#[test]
fn lengths_of_loops_are_a_part_of_the_sequence() {
    let [three, four, unknown] = [Some(3), Some(4), None]
        .map(|length| rewrite(&with_config(nested(length)), &self::four()).unwrap());
    assert!(
        three.summary.contains("while 3 times {"),
        "{}",
        three.summary
    );
    assert!(four.summary.contains("while 4 times {"), "{}", four.summary);
    assert!(unknown.summary.contains("while {"), "{}", unknown.summary);
    assert_ne!(three.sequence, four.sequence);
    assert_ne!(three.sequence, unknown.sequence);
}

#[test]
fn collectives_have_places_where_ranks_may_differ() {
    let placed = |module: HloModuleProto| {
        let rewritten = rewrite(&with_config(module), &four()).unwrap();
        let module = check(&rewritten);
        let all = module.computations.iter().flat_map(|c| &c.instructions);
        let calls = all.filter(|i| {
            i.custom_call_target.starts_with("mpi_cuda_collective_")
                && i.custom_call_has_side_effect
        });
        let configs = calls.map(|call| String::from_utf8_lossy(&call.backend_config).into_owned());
        let with = configs.filter(|config| config.contains("place = ")).count();
        (with, rewritten.collectives, rewritten.places.len())
    };
    let (with, _, places) = placed(recording!("train"));
    assert_eq!((with, places), (0, 0));
    let (with, all, places) = placed(nested(None));
    assert_eq!(with, all);
    assert!(places > 0);
}
