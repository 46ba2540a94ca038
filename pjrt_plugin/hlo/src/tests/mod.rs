//! Rewriting as a whole: recorded modules, generated ones, and damaged ones.

mod check;
mod damaged;
mod folds;
mod generated;
mod generator;
mod recorded;
mod refused;

use protobuf::{Message, MessageField};

use crate::Devices;
use crate::proto::hlo::{HloModuleProto, HloModuleProtoWithConfig, ReplicaGroup};
use crate::shape::{TUPLE, tuple};

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
fn tuples_have_no_other_type() {
    assert_eq!(tuple(vec![]).element_type, TUPLE);
}
