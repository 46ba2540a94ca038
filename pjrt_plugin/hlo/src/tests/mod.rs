//! Rewriting as a whole: recorded modules, generated ones, and damaged ones.

mod check;
mod damaged;
mod folds;
mod generated;
mod generator;
mod recorded;
mod refused;
mod started;

use protobuf::{Message, MessageField};

use crate::proto::hlo::hlo_input_output_alias_proto::AliasEntryProto;
use crate::proto::hlo::{
    HloComputationProto, HloInputOutputAliasProto, HloInstructionProto, HloModuleProto,
    HloModuleProtoWithConfig, ReplicaGroup,
};
use crate::shape::{TUPLE, tuple};
use crate::{Devices, attributes, donated_parameters};

/// A recorded module by the path of its file, without the ending.
macro_rules! recording {
    ($name:literal) => {
        $crate::tests::recorded(include_bytes!(concat!(
            "../../tests/recorded/",
            $name,
            ".hlo.pb"
        )))
    };
}
use recording;

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

fn group(ids: &[i64]) -> ReplicaGroup {
    ReplicaGroup {
        replica_ids: ids.to_vec(),
        ..Default::default()
    }
}

#[test]
fn parameters_are_donated_whose_memory_results_take() {
    let entry = |number, index: &[i64]| AliasEntryProto {
        parameter_number: number,
        parameter_shape_index: index.to_vec(),
        ..Default::default()
    };
    let module = |entries| HloModuleProto {
        input_output_alias: MessageField::some(HloInputOutputAliasProto {
            entries,
            ..Default::default()
        }),
        ..Default::default()
    };
    let of = |entries| donated_parameters(&with_config(module(entries))).unwrap();
    assert!(of(vec![]).is_empty());
    assert_eq!(
        of(vec![entry(3, &[]), entry(0, &[]), entry(3, &[])]),
        [0, 3]
    );
    assert_eq!(of(vec![entry(0, &[2]), entry(0, &[1])]), [1, 2]);
    assert!(donated_parameters(b"nothing").is_err());
}

#[test]
fn attributes_of_custom_calls_are_read() {
    let call = |target: &str, config: &str| HloInstructionProto {
        custom_call_target: target.into(),
        backend_config: config.into(),
        ..Default::default()
    };
    let computation = HloComputationProto {
        instructions: vec![
            call("ours", "{comm = 7 : i64, op = 0 : i64}"),
            call("ours", "{recomm = 5 : i64}"),
            call("other", "{comm = 9 : i64}"),
            call("ours", "{op = 1 : i64, comm = -3 : i64}"),
            call("ours", "{comm = 7 : i64}"),
        ],
        ..Default::default()
    };
    let program = with_config(HloModuleProto {
        computations: vec![computation],
        ..Default::default()
    });
    let found = attributes(&program, "comm", |target| (target == "ours").then_some(1));
    assert_eq!(found.unwrap(), [-3, 1, 7]);
}

#[test]
fn tuples_have_no_other_type() {
    assert_eq!(tuple(vec![]).element_type, TUPLE);
}
