//! Programs that another XLA than the inner plugin's has partitioned and optimized.

use protobuf::{Message, MessageField};

use crate::error::Refused;
use crate::options::Options;
use crate::proto::hlo::{HloModuleConfigProto, HloModuleProto, HloModuleProtoWithConfig};
use crate::sequence;

/// The `HloModuleProto` that another XLA has made with these options, as the inner plugin would
/// give it: a serialized `HloModuleProtoWithConfig`.
///
/// # Errors
/// If it is no module.
pub fn program_of(module: &[u8], options: &Options) -> Result<Vec<u8>, Refused> {
    let mut module = HloModuleProto::parse_from_bytes(module)?;
    let computations = module.computations.iter_mut();
    for instruction in computations.flat_map(|computation| &mut computation.instructions) {
        if instruction.opcode == "while" {
            // XLA refuses a member that it does not know, and there are more in newer ones.
            let known = sequence::runs(instruction).map(sequence::known_trip_count);
            instruction.backend_config = known.unwrap_or_default().into_bytes();
        }
    }
    let (replicas, partitions) = options.counts();
    let config = HloModuleConfigProto {
        entry_computation_layout: module.host_program_shape.clone(),
        replica_count: replicas as i64,
        num_partitions: partitions as i64,
        use_spmd_partitioning: true,
        ..Default::default()
    };
    let program = HloModuleProtoWithConfig {
        hlo_module: MessageField::some(module),
        config: MessageField::some(config),
        ..Default::default()
    };
    Ok(program.write_to_bytes()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::hlo::{HloComputationProto, HloInstructionProto};

    #[test]
    fn of_a_loop_its_length_is_kept() {
        let made = |opcode: &str, config: &str| HloInstructionProto {
            opcode: opcode.into(),
            backend_config: config.into(),
            ..Default::default()
        };
        let length = r#"{"known_trip_count":{"n":"3"}}"#;
        let newer = r#"{"dynamic_variables":[],"known_trip_count":{"n":"3"},"newer":1}"#;
        let module = HloModuleProto {
            computations: vec![HloComputationProto {
                instructions: vec![
                    made("while", newer),
                    made("while", r#"{"newer":1}"#),
                    made("fusion", newer),
                ],
                ..Default::default()
            }],
            ..Default::default()
        };
        let options = Options::for_one(0);
        let program = program_of(&module.write_to_bytes().unwrap(), &options).unwrap();
        let program = HloModuleProtoWithConfig::parse_from_bytes(&program).unwrap();
        assert_eq!(program.config.num_partitions, 1);
        let configs = program.hlo_module.computations[0].instructions.iter();
        let configs: Vec<_> = configs.map(|made| &made.backend_config[..]).collect();
        assert_eq!(configs, [length.as_bytes(), b"", newer.as_bytes()]);
    }
}
