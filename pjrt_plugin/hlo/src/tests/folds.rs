//! All-to-alls of whole arrays.

use protobuf::Message;

use super::{four, recording, with_config};
use crate::proto::hlo::{HloInstructionProto, HloModuleProto};
use crate::shape::shape_of;
use crate::{TARGET_PREFIX, rewrite};

/// Operands and results, without the token, of each all-to-all, in the order of the program.
fn blocks(module: HloModuleProto) -> Vec<(usize, usize)> {
    let rewritten = rewrite(&with_config(module), &four()).unwrap();
    let module = HloModuleProto::parse_from_bytes(&rewritten.module).unwrap();
    let target = format!("{TARGET_PREFIX}all_to_all");
    let all = module.computations.iter().flat_map(|c| &c.instructions);
    let calls = all.filter(|i| i.custom_call_target == target);
    let mut found: Vec<_> = calls
        .map(|call| {
            (
                call.operand_ids.len() - 1,
                shape_of(call).tuple_shapes.len() - 1,
            )
        })
        .collect();
    found.sort_unstable();
    found
}

fn instructions(module: &mut HloModuleProto) -> impl Iterator<Item = &mut HloInstructionProto> {
    let computations = module.computations.iter_mut();
    computations.flat_map(|computation| &mut computation.instructions)
}

#[test]
fn whole_arrays_are_exchanged_where_nothing_forbids_it() {
    // Fresh; cut in another dimension; carried by a loop, whose memory the result must take; the
    // operand is the parameter whose memory the result takes.
    assert_eq!(
        blocks(recording!("exchanges")),
        [(1, 1), (1, 2), (1, 2), (2, 2)]
    );
}

#[test]
fn an_order_that_no_operand_tells_is_left_alone() {
    let mut module = recording!("exchanges");
    for instruction in instructions(&mut module) {
        if instruction.opcode == "all-to-all" {
            let first = instruction.operand_ids[0];
            instruction.control_predecessor_ids.push(first);
        }
    }
    assert_eq!(blocks(module), [(2, 2); 4]);
}

#[test]
fn memory_that_a_loop_gives_to_another_array_is_cut_before() {
    let mut module = recording!("exchanges");
    // What is computed between the cuts and the exchange in the loop could be its next operand.
    let result = instructions(&mut module).find(|i| i.name == "concatenate");
    let whole = result.map(|result| shape_of(result));
    let counter = instructions(&mut module).find(|i| i.name == "wrapped_add");
    counter.unwrap().shape = whole.into();
    // Its results may be joined, since what it sends is not there any more.
    assert_eq!(blocks(module), [(1, 1), (1, 2), (2, 1), (2, 2)]);
}

#[test]
fn what_is_written_in_between_is_cut_before() {
    let mut module = recording!("exchanges");
    let cuts = instructions(&mut module).filter(|i| i.opcode == "fusion");
    let called: Vec<i64> = cuts
        .flat_map(|i| i.called_computation_ids.clone())
        .collect();
    for computation in &mut module.computations {
        let root = computation.root_id;
        let mut root = computation.instructions.iter_mut().filter(|i| i.id == root);
        if let Some(root) = root.next()
            && called.contains(&computation.id)
            && root.opcode == "slice"
        {
            root.opcode = "dynamic-update-slice".into();
        }
    }
    assert!(blocks(module).iter().all(|&(operands, _)| operands == 2));
}
