//! All-reduces that are started when their operands are there.

use std::collections::HashMap;

use super::check::check;
use super::{four, recording, with_config};
use crate::proto::hlo::{HloInstructionProto, HloModuleProto};
use crate::{Rewritten, Sizes, TARGET_PREFIX, rewrite, rewrite_started};

/// Whatever its size, each operand is started by itself.
const ALL: Sizes = Sizes {
    smallest: 0,
    small: 0,
    largest: 1 << 30,
};

fn started(module: HloModuleProto, sizes: Sizes) -> Rewritten {
    rewrite_started(&with_config(module), &four(), Some(sizes)).unwrap()
}

/// How many custom calls of each target there are.
fn targets(module: &HloModuleProto) -> HashMap<String, usize> {
    let mut found = HashMap::new();
    for instruction in module.computations.iter().flat_map(|c| &c.instructions) {
        if let Some(target) = instruction.custom_call_target.strip_prefix(TARGET_PREFIX) {
            *found.entry(target.to_owned()).or_default() += 1;
        }
    }
    found
}

fn all() -> [HloModuleProto; 5] {
    [
        recording!("automatic"),
        recording!("every_kind"),
        recording!("exchanges"),
        recording!("nested"),
        recording!("train"),
    ]
}

#[test]
fn what_is_started_is_waited_for_in_the_chain_of_the_token() {
    let mut starts = 0;
    for module in all() {
        let found = targets(&check(&started(module, ALL)));
        let count = |target: &str| found.get(target).copied().unwrap_or(0);
        assert_eq!(count("all_reduce_start"), count("all_reduce_done"));
        starts += count("all_reduce_start");
    }
    assert!(starts > 0);
}

#[test]
fn ranks_compare_the_same_sequence_whether_collectives_are_started_or_not() {
    for module in all() {
        let whole = rewrite(&with_config(module.clone()), &four()).unwrap();
        let parts = started(module, ALL);
        assert_eq!(whole.sequence, parts.sequence);
        assert_eq!(whole.summary, parts.summary);
    }
}

#[test]
fn a_start_stands_before_what_is_computed_meanwhile() {
    let module = check(&started(recording!("train"), ALL));
    let is = |i: &HloInstructionProto, target| {
        i.custom_call_target.strip_prefix(TARGET_PREFIX) == Some(target)
    };
    let mut meanwhile = 0;
    for computation in &module.computations {
        let instructions = computation.instructions.iter();
        let first = instructions.clone().position(|i| is(i, "all_reduce_start"));
        let end = instructions.clone().position(|i| is(i, "all_reduce_done"));
        if let (Some(first), Some(end)) = (first, end) {
            let between = instructions.skip(first).take(end - first);
            meanwhile += between
                .filter(|i| i.opcode == "fusion" || i.opcode == "dot")
                .count();
        }
    }
    assert!(meanwhile > 0);
}

#[test]
fn small_and_too_large_all_reduces_stay_whole() {
    let few = Sizes {
        smallest: 1 << 30,
        ..ALL
    };
    let large = Sizes { largest: 3, ..ALL };
    for sizes in [few, large] {
        let found = targets(&check(&started(recording!("train"), sizes)));
        assert!(!found.contains_key("all_reduce_start"));
        assert!(found.contains_key("all_reduce"));
    }
}

#[test]
fn all_reduces_that_ranks_compare_one_by_one_stay_whole() {
    // Its loops do not say how often they run.
    let found = targets(&check(&started(recording!("nested"), ALL)));
    assert!(!found.contains_key("all_reduce_start"));
}
