//! Executables, loaded or not: what is in them, and copies of them.

use pjrt_sys::*;

use super::handle::{DeviceHandle, ExecutableHandle, FromRaw, LoadedHandle, Owned};
use crate::error::Error;
use crate::inner::call::{bytes, new_args, slice};
use crate::inner::layouts;

impl LoadedHandle {
    /// The first of the devices that it is loaded on.
    pub fn device(self) -> Result<Option<DeviceHandle>, Error> {
        let args = ask!(PJRT_LoadedExecutable_AddressableDevices {
            executable: self.raw()
        })?;
        // SAFETY: the list and its devices live as long as the executable.
        unsafe {
            let devices = slice(args.addressable_devices, args.num_addressable_devices);
            let first = devices.first();
            first
                .map(|&device| DeviceHandle::from_raw(device))
                .transpose()
        }
    }

    /// The executable behind it.
    pub fn executable(self) -> Result<Owned<ExecutableHandle>, Error> {
        let args = ask!(PJRT_LoadedExecutable_GetExecutable {
            loaded_executable: self.raw()
        })?;
        // SAFETY: the executable is the caller's.
        unsafe { Owned::new(args.executable) }
    }
}

/// A result of an executable.
pub struct Output {
    /// Of what.
    pub element_type: PJRT_Buffer_Type,
    /// How many.
    pub dims: Vec<i64>,
    /// The kind of its memory; none if the inner plugin does not say, as XLA:CPU.
    pub memory_kind: Option<Vec<u8>>,
    /// The order of its dimensions, the fastest varying first; empty if it is row-major.
    pub order: Vec<i64>,
}

impl ExecutableHandle {
    /// Its name; empty if the inner plugin does not know.
    pub fn name(self) -> Vec<u8> {
        let named = ask!(PJRT_Executable_Name {
            executable: self.raw()
        });
        // SAFETY: the name lives as long as the executable.
        named.map_or_else(
            |_| Vec::new(),
            |args| unsafe { bytes(args.executable_name, args.executable_name_size) }.to_vec(),
        )
    }

    /// Number of partitions.
    pub fn partitions(self) -> Result<usize, Error> {
        ask!(PJRT_Executable_NumPartitions {
            executable: self.raw()
        })
        .map(|args| args.num_partitions)
    }

    /// Number of replicas.
    pub fn replicas(self) -> Result<usize, Error> {
        ask!(PJRT_Executable_NumReplicas {
            executable: self.raw()
        })
        .map(|args| args.num_replicas)
    }

    /// Number of results.
    pub fn num_outputs(self) -> Result<usize, Error> {
        ask!(PJRT_Executable_NumOutputs {
            executable: self.raw()
        })
        .map(|args| args.num_outputs)
    }

    /// How many floating-point operations it takes; none if the inner plugin does not know.
    pub fn flops(self) -> Option<f32> {
        let cost = ask!(PJRT_Executable_GetCostAnalysis {
            executable: self.raw()
        })
        .ok()?;
        // SAFETY: the properties live as long as the executable; the value is read by its type.
        unsafe {
            slice(cost.properties, cost.num_properties)
                .iter()
                .find(|property| {
                    bytes(property.name, property.name_size) == b"flops"
                        && property.type_ == PJRT_NamedValue_kFloat
                })
                .map(|flops| flops.__bindgen_anon_1.float_value)
        }
    }

    /// The partitioned, optimized program.
    pub fn optimized_program(self) -> Result<Vec<u8>, Error> {
        let mut program = new_args::<PJRT_Program>();
        // The first call asks for the size, and the second fills that many bytes.
        ask!(PJRT_Executable_OptimizedProgram {
            executable: self.raw(),
            program: &mut program,
        })?;
        let mut code = vec![0u8; program.code_size];
        program.code = code.as_mut_ptr().cast();
        ask!(PJRT_Executable_OptimizedProgram {
            executable: self.raw(),
            program: &mut program,
        })?;
        Ok(code)
    }

    /// What it is serialized to.
    pub fn serialize(self) -> Result<Vec<u8>, Error> {
        let serialized = ask!(PJRT_Executable_Serialize {
            executable: self.raw()
        })?;
        // SAFETY: the bytes live until the deleter is called, which is once.
        unsafe {
            let copy = bytes(
                serialized.serialized_bytes,
                serialized.serialized_bytes_size,
            );
            let copy = copy.to_vec();
            if let Some(delete) = serialized.serialized_executable_deleter {
                delete(serialized.serialized_executable);
            }
            Ok(copy)
        }
    }

    /// Its results.
    pub fn outputs(self) -> Result<Vec<Output>, Error> {
        // XLA:CPU has no layouts for a program with a token.
        let mut orders = layouts::of_outputs(self).unwrap_or_default();
        let types = ask!(PJRT_Executable_OutputElementTypes {
            executable: self.raw()
        })?;
        let dims = ask!(PJRT_Executable_OutputDimensions {
            executable: self.raw()
        })?;
        let kinds = ask!(PJRT_Executable_OutputMemoryKinds {
            executable: self.raw()
        });
        // SAFETY: the lists live as long as the executable, and are as long as it says.
        unsafe {
            let kinds = kinds.map(|args| {
                let texts = slice(args.memory_kinds, args.num_outputs).iter();
                let sizes = slice(args.memory_kind_sizes, args.num_outputs);
                let kinds = texts.zip(sizes).map(|(&text, &size)| bytes(text, size));
                kinds.collect::<Vec<_>>()
            });
            let types = slice(types.output_types, types.num_output_types);
            let ranks = slice(dims.dim_sizes, dims.num_outputs);
            let mut dims = slice(dims.dims, ranks.iter().sum());
            if orders.len() != types.len() {
                orders = vec![Vec::new(); types.len()];
            }
            let mut outputs = Vec::with_capacity(types.len());
            for (index, order) in orders.into_iter().enumerate() {
                let (own, rest) = dims.split_at(ranks[index]);
                dims = rest;
                outputs.push(Output {
                    element_type: types[index],
                    dims: own.to_vec(),
                    memory_kind: kinds.as_ref().ok().map(|kinds| kinds[index].to_vec()),
                    order,
                });
            }
            Ok(outputs)
        }
    }
}
