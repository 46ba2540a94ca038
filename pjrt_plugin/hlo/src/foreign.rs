//! Programs that another XLA than the inner plugin's has partitioned and optimized.

use std::collections::HashMap;

use protobuf::{Message, MessageField, UnknownValueRef};

use crate::error::Refused;
use crate::options::Options;
use crate::proto::hlo::{
    HloComputationProto, HloInstructionProto, HloModuleConfigProto, HloModuleProto,
    HloModuleProtoWithConfig,
};
use crate::sequence;

/// The `HloModuleProto` that another XLA has made with these options, as the inner plugin would
/// give it: a serialized `HloModuleProtoWithConfig`.
///
/// # Errors
/// If it is no module.
pub fn program_of(module: &[u8], options: &Options) -> Result<Vec<u8>, Refused> {
    let mut module = HloModuleProto::parse_from_bytes(module)?;
    for computation in &mut module.computations {
        make_older(computation)?;
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

/// The last member of an instruction that the oldest inner plugin knows (PJRT 0.81).
const LAST_KNOWN: u32 = 93;

/// XLA's numbers of element types that are not whole numbers: those of floats (`xla_data.proto`).
const FLOATS: &[i32] = &[10, 11, 12, 16, 19, 20, 23, 24, 25, 28, 29, 32, 33];

/// Brings a computation into a form that an older XLA reads the same.
fn make_older(computation: &mut HloComputationProto) -> Result<(), Refused> {
    let instructions = computation.instructions.iter();
    let floats: HashMap<i64, bool> = instructions
        .map(|made| {
            let element = made.shape.as_ref().map_or(0, |shape| shape.element_type);
            (made.id, FLOATS.contains(&element))
        })
        .collect();
    for instruction in &mut computation.instructions {
        refuse_newer(instruction)?;
        if instruction.opcode == "while" {
            // XLA refuses a member that it does not know, and there are more in newer ones.
            let known = sequence::runs(instruction).map(sequence::known_trip_count);
            instruction.backend_config = known.unwrap_or_default().into_bytes();
        }
        let of_floats = instruction.operand_ids.first();
        let of_floats = of_floats.is_some_and(|id| floats.get(id) == Some(&true));
        if instruction.comparison_order == "TOTAL" && of_floats {
            instruction.comparison_type = "FLOATTOTALORDER".into();
        }
    }
    Ok(())
}

/// An older XLA drops what it does not know without a word. What is empty says nothing.
fn refuse_newer(instruction: &HloInstructionProto) -> Result<(), Refused> {
    let unknown = instruction.special_fields.unknown_fields();
    let says = |value: &UnknownValueRef<'_>| !matches!(value, UnknownValueRef::LengthDelimited([]));
    let newer = unknown
        .iter()
        .find(|(number, value)| *number > LAST_KNOWN && says(value));
    match newer {
        Some((number, _)) => Err(Refused::instruction(
            instruction,
            format!(
                "member {number}, which a newer XLA has written, may be unknown to the inner \
                 plugin; take one of the age of jaxlib (MPI_CUDA_INNER_PLUGIN)"
            ),
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::hlo::ShapeProto;

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

    fn compare(element_type: i32) -> HloComputationProto {
        let mut operand = HloInstructionProto {
            id: 7,
            ..Default::default()
        };
        operand.shape = MessageField::some(ShapeProto {
            element_type,
            ..Default::default()
        });
        let compare = HloInstructionProto {
            opcode: "compare".into(),
            operand_ids: vec![7, 7],
            comparison_order: "TOTAL".into(),
            ..Default::default()
        };
        HloComputationProto {
            instructions: vec![operand, compare],
            ..Default::default()
        }
    }

    #[test]
    fn a_total_order_of_floats_is_said_in_the_older_words() {
        // s32, f32, bf16.
        for (element_type, words) in [(4, ""), (11, "FLOATTOTALORDER"), (16, "FLOATTOTALORDER")] {
            let mut computation = compare(element_type);
            make_older(&mut computation).unwrap();
            assert_eq!(computation.instructions[1].comparison_type, words);
        }
    }

    #[test]
    fn what_an_older_xla_would_drop_is_refused() {
        let mut computation = compare(11);
        let fields = computation.instructions[1]
            .special_fields
            .mut_unknown_fields();
        fields.add_length_delimited(101, Vec::new());
        fields.add_varint(50, 1);
        make_older(&mut computation).unwrap();
        let fields = computation.instructions[1]
            .special_fields
            .mut_unknown_fields();
        fields.add_length_delimited(103, vec![1]);
        let error = make_older(&mut computation).unwrap_err().to_string();
        assert!(error.contains("member 103"), "{error}");
    }
}
