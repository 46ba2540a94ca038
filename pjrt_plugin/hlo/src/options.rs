//! `CompileOptionsProto`: for which devices a program is, and options to compile a rewritten one.

use protobuf::{Message, MessageField, UnknownValueRef};

use crate::devices::Devices;
use crate::error::Refused;
use crate::module::Layouts;
use crate::proto::compile_options::compile_options_proto::Override;
use crate::proto::compile_options::option_override_proto::Value;
use crate::proto::compile_options::{
    CompileOptionsProto, ExecutableBuildOptionsProto, Fields, OptionOverrideProto,
};
use crate::proto::hlo::DeviceAssignmentProto;
use crate::proto::hlo::device_assignment_proto::ComputationDevice;

/// The number of `debug_options` in `ExecutableBuildOptionsProto`.
const DEBUG_OPTIONS: u32 = 3;

/// Options that the framework compiles with.
#[derive(Clone, Debug)]
pub struct Options(CompileOptionsProto);

impl Options {
    /// Reads a serialized `CompileOptionsProto`.
    ///
    /// # Errors
    /// If it is none.
    pub fn read(bytes: &[u8]) -> Result<Options, Refused> {
        Ok(Options(CompileOptionsProto::parse_from_bytes(bytes)?))
    }

    /// Options that compile a program for one device.
    pub fn for_one(device: i64) -> Options {
        Options(CompileOptionsProto {
            executable_build_options: MessageField::some(ExecutableBuildOptionsProto {
                num_replicas: 1,
                num_partitions: 1,
                device_assignment: MessageField::some(assignment(1, 1, &[device])),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    /// Serialized again.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write(&self) -> Result<Vec<u8>, Refused> {
        Ok(self.0.write_to_bytes()?)
    }

    /// Bytes that are the same for equal options. Serialized ones are not: XLA writes the entries
    /// of a map in any order.
    ///
    /// # Errors
    /// If they cannot be read or written.
    pub fn in_order(&self) -> Result<Vec<u8>, Refused> {
        let mut options = self.0.clone();
        let overrides = &mut options.env_option_overrides;
        overrides.sort_by(|one, other| one.key.cmp(&other.key));
        if let Some(build) = options.executable_build_options.as_mut() {
            let unknown = build.special_fields.mut_unknown_fields();
            let all = unknown
                .iter()
                .filter(|&(number, _)| number == DEBUG_OPTIONS);
            let mut debug = Fields::new();
            for (_, value) in all {
                if let UnknownValueRef::LengthDelimited(bytes) = value {
                    debug.merge_from_bytes(bytes)?;
                }
            }
            unknown.remove(DEBUG_OPTIONS);
            let mut rows = Vec::new();
            for (number, value) in debug.special_fields.unknown_fields() {
                let mut row = Fields::new();
                let fields = row.special_fields.mut_unknown_fields();
                match value {
                    UnknownValueRef::Fixed32(value) => fields.add_fixed32(number, value),
                    UnknownValueRef::Fixed64(value) => fields.add_fixed64(number, value),
                    UnknownValueRef::Varint(value) => fields.add_varint(number, value),
                    UnknownValueRef::LengthDelimited(value) => {
                        fields.add_length_delimited(number, value.to_vec());
                    }
                }
                rows.push(row.write_to_bytes()?);
            }
            rows.sort();
            unknown.add_length_delimited(DEBUG_OPTIONS, rows.concat());
        }
        Ok(options.write_to_bytes()?)
    }

    /// Serialized options for a first compilation, of which only the optimized module is used: all
    /// passes over the module, and as little as possible for machine code.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn without_code(&self) -> Result<Vec<u8>, Refused> {
        self.with("xla_backend_optimization_level", Value::IntField(0))
    }

    /// Serialized options for a first compilation for GPUs: each rank tunes its kernels by itself,
    /// since XLA would wait for what other processes have tuned.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn tuned_alone(&self) -> Result<Vec<u8>, Refused> {
        self.with("xla_gpu_shard_autotuning", Value::BoolField(false))
    }

    /// Serialized, with one of XLA's debug options.
    fn with(&self, name: &str, value: Value) -> Result<Vec<u8>, Refused> {
        let mut options = self.0.clone();
        options.env_option_overrides.retain(|own| own.key != name);
        options.env_option_overrides.push(Override {
            key: name.into(),
            value: MessageField::some(OptionOverrideProto {
                value: Some(value),
                ..Default::default()
            }),
            ..Default::default()
        });
        Ok(options.write_to_bytes()?)
    }

    /// Replicas and partitions.
    pub fn counts(&self) -> (usize, usize) {
        let build = self.0.executable_build_options.get_or_default();
        let count = |number: i64| usize::try_from(number).unwrap_or(1).max(1);
        (count(build.num_replicas), count(build.num_partitions))
    }

    /// Whether devices are assigned.
    pub fn is_assigned(&self) -> bool {
        let build = self.0.executable_build_options.get_or_default();
        build.device_assignment.is_some()
    }

    /// Whether this is for one device.
    pub fn is_for_one(&self) -> bool {
        self.counts() == (1, 1)
    }

    /// The devices: those assigned, else the first ones in order.
    ///
    /// # Errors
    /// If the assignment does not fit the counts.
    pub fn devices(&self) -> Result<Devices, Refused> {
        let (replicas, partitions) = self.counts();
        let build = self.0.executable_build_options.get_or_default();
        let Some(assignment) = build.device_assignment.as_ref() else {
            let count = (replicas * partitions) as i64;
            return Devices::new(replicas, partitions, (0..count).collect());
        };
        let columns = &assignment.computation_devices;
        let complete = columns
            .iter()
            .all(|column| column.replica_device_ids.len() == replicas);
        if columns.len() != partitions || !complete {
            return Err(Refused::inconsistent(format!(
                "the device assignment does not have {replicas} replicas of {partitions} partitions"
            )));
        }
        let ids = (0..replicas)
            .flat_map(|replica| columns.iter().map(move |c| c.replica_device_ids[replica]))
            .collect();
        Devices::new(replicas, partitions, ids)
    }

    /// The same on another device, for a program for one.
    pub fn on_device(&self, device: i64) -> Options {
        let mut options = self.clone();
        let build = options.0.executable_build_options.mut_or_insert_default();
        build.device_assignment = MessageField::some(assignment(1, 1, &[device]));
        options
    }

    /// The same for as many devices, numbered from 0.
    ///
    /// # Errors
    /// If the counts are of no devices.
    pub fn numbered(&self) -> Result<Options, Refused> {
        let (replicas, partitions) = self.counts();
        let ids: Vec<i64> = (0..(replicas * partitions) as i64).collect();
        Devices::new(replicas, partitions, ids.clone())?;
        let mut options = self.clone();
        let build = options.0.executable_build_options.mut_or_insert_default();
        build.device_assignment = MessageField::some(assignment(replicas, partitions, &ids));
        Ok(options)
    }

    /// Serialized options that compile a rewritten module for `device` alone, without any pass.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn for_device(&self, device: i64, layouts: &Layouts) -> Result<Vec<u8>, Refused> {
        let mut options = self.0.clone();
        let tupled = options.parameter_is_tupled_arguments;
        if !tupled {
            options.argument_layouts = layouts.parameters.clone();
        }
        let build = options.executable_build_options.mut_or_insert_default();
        build.result_layout = layouts.result.clone().into();
        build.num_replicas = 1;
        build.num_partitions = 1;
        build.use_spmd_partitioning = false;
        build.use_auto_spmd_partitioning = false;
        build.use_shardy_partitioner = false;
        build.allow_spmd_sharding_propagation_to_output.clear();
        build.allow_spmd_sharding_propagation_to_parameters.clear();
        build.run_backend_only = true;
        build.device_assignment = MessageField::some(assignment(1, 1, &[device]));
        Ok(options.write_to_bytes()?)
    }
}

impl Devices {
    /// A serialized `DeviceAssignmentProto`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn to_assignment(&self) -> Result<Vec<u8>, Refused> {
        Ok(assignment(self.replicas(), self.partitions(), self.ids()).write_to_bytes()?)
    }
}

fn assignment(replicas: usize, partitions: usize, ids: &[i64]) -> DeviceAssignmentProto {
    let column = |partition: usize| ComputationDevice {
        replica_device_ids: (0..replicas)
            .map(|replica| ids[replica * partitions + partition])
            .collect(),
        ..Default::default()
    };
    DeviceAssignmentProto {
        replica_count: replicas as i32,
        computation_count: partitions as i32,
        computation_devices: (0..partitions).map(column).collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(replicas: i64, partitions: i64, ids: Option<&[i64]>) -> Options {
        let build = ExecutableBuildOptionsProto {
            num_replicas: replicas,
            num_partitions: partitions,
            device_assignment: ids
                .map(|ids| assignment(replicas as usize, partitions as usize, ids))
                .into(),
            ..Default::default()
        };
        Options(CompileOptionsProto {
            executable_build_options: MessageField::some(build),
            ..Default::default()
        })
    }

    #[test]
    fn devices_are_those_assigned() {
        assert!(options(0, 0, None).is_for_one() && options(1, 1, None).is_for_one());
        assert_eq!(options(2, 2, None).devices().unwrap().ids(), [0, 1, 2, 3]);
        let assigned = options(2, 2, Some(&[3, 1, 0, 2]));
        assert_eq!(assigned.devices().unwrap().ids(), [3, 1, 0, 2]);
        let mut wrong = assigned;
        wrong
            .0
            .executable_build_options
            .mut_or_insert_default()
            .num_replicas = 4;
        assert!(wrong.devices().is_err());
    }

    #[test]
    fn equal_options_are_known_as_such() {
        // Fields 1 and 9 of the debug options, and the map entries 2 and 3 of them.
        let [one, nine, two, three] = [
            &[0x08, 1][..],
            &[0x4a, 1, 7],
            &[0xaa, 0x16, 1, 2],
            &[0xaa, 0x16, 1, 3],
        ];
        let with = |debug: &[&[u8]], overrides: &[&str]| {
            let mut options = options(1, 1, Some(&[0])).0;
            let build = options.executable_build_options.mut_or_insert_default();
            let unknown = build.special_fields.mut_unknown_fields();
            unknown.add_length_delimited(DEBUG_OPTIONS, debug.concat());
            for key in overrides {
                options.env_option_overrides.push(Override {
                    key: (*key).into(),
                    ..Default::default()
                });
            }
            Options(options).in_order().unwrap()
        };
        let first = with(&[one, nine, two, three], &["a", "b"]);
        assert_eq!(first, with(&[three, one, two, nine], &["b", "a"]));
        assert_ne!(first, with(&[one, nine, two], &["a", "b"]));
        assert_ne!(first, with(&[one, nine, two, three], &["a", "c"]));
        let read = Options::read(&first).unwrap();
        assert_eq!(read.devices().unwrap().ids(), [0]);
        assert_eq!(read.in_order().unwrap(), first);
    }

    #[test]
    fn options_for_one_device_name_it() {
        let one = Options::read(&Options::for_one(3).write().unwrap()).unwrap();
        assert!(one.is_for_one() && one.is_assigned());
        assert_eq!(one.devices().unwrap().ids(), [3]);
        assert_eq!(one.on_device(0).devices().unwrap().ids(), [0]);
    }

    #[test]
    fn one_device_is_left_and_unknown_fields_stay() {
        let mut bytes = options(1, 4, Some(&[3, 1, 0, 2]))
            .0
            .write_to_bytes()
            .unwrap();
        // Field 900 with the value 7.
        bytes.extend([0xa0, 0x38, 7]);
        let one = Options::read(&bytes).unwrap();
        let one = one.for_device(2, &Layouts::default()).unwrap();
        let one = Options::read(&one).unwrap();
        assert!(one.is_for_one());
        assert_eq!(one.devices().unwrap().ids(), [2]);
        assert!(one.0.special_fields.unknown_fields().get(900).is_some());
        assert!(one.0.executable_build_options.run_backend_only);
    }
}
