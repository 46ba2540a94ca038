//! Rewriting a partitioned HLO module so that this plugin executes its collectives: each becomes a
//! custom call, and one token passes through all of them and all other ordered calls.
//!
//! Pure: bytes in, bytes out, the same on every rank. Nothing here knows PJRT or MPI.
//! `docs/collectives.md` says why collectives are executed like that. The steps are those of
//! [`rewrite`], and what becomes of which instruction stands in one table (`instructions.rs`).

#![forbid(unsafe_code)]

mod chain;
mod collective;
mod device_list;
mod devices;
mod effects;
mod envelope;
mod error;
mod fold;
mod foreign;
mod instructions;
mod module;
mod options;
mod output;
mod parts;
mod places;
mod reduction;
mod replica_groups;
mod sequence;
mod shape;
mod shape_rule;
mod started;
mod synchronous;
#[cfg(test)]
mod tests;
mod tokens;
mod proto {
    #![allow(missing_docs, clippy::all, unused)]
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}

use std::collections::BTreeMap;

use protobuf::Message;

pub use devices::{DeviceTable, Devices};
pub use envelope::Envelope;
pub use error::Refused;
pub use foreign::program_of;
pub use instructions::{TARGET_PREFIX, targets};
pub use module::Layouts;
pub use options::Options;
pub use reduction::REDUCTIONS;
pub use started::Sizes;

use chain::Rewriting;
use module::Module;
use proto::hlo::{HloModuleProto, HloModuleProtoWithConfig};
use sequence::Sequence;

/// Rewrites a serialized `HloModuleProtoWithConfig`.
///
/// # Errors
/// If it is no module, or holds an instruction that cannot be executed.
pub fn rewrite(program: &[u8], devices: &Devices) -> Result<Rewritten, Refused> {
    rewrite_started(program, devices, None)
}

/// The same, with all-reduces of the `started` sizes that are started when their operands are
/// there, and waited for where they stood.
///
/// # Errors
/// Those of [`rewrite`].
pub fn rewrite_started(
    program: &[u8],
    devices: &Devices,
    started: Option<Sizes>,
) -> Result<Rewritten, Refused> {
    let mut module = Module::new(read(program)?)?;
    synchronous::join(&mut module)?;
    let mut calls = collective::recognise_all(&module, devices)?;
    let paths = tokens::find(&module, &calls)?;
    let folds = fold::find(&module, &calls)?;
    let sequence = Sequence::of(&module, &calls, devices)?;
    for (&instruction, call) in &mut calls {
        call.place = sequence.places.of(instruction);
    }
    let started = started.map(|sizes| started::find(&module, &calls, &paths, sizes));
    let rewriting = Rewriting {
        calls: &calls,
        paths: &paths,
        folds: &folds,
        started: &started.transpose()?.unwrap_or_default(),
        program: sequence.identity,
    };
    rewriting.module(&mut module)?;
    let tables = calls.into_values().map(|call| call.table);
    Ok(Rewritten {
        tables: tables.map(|table| (table.number(), table)).collect(),
        identity: sequence.identity,
        named_sequence: named(&module, sequence.hash),
        sequence: sequence.hash,
        summary: sequence.summary(),
        collectives: sequence.collectives,
        executed: sequence.executed,
        bytes: sequence.bytes,
        other_ordered: sequence.other_ordered,
        places: sequence.places.words(),
        layouts: module.layouts(),
        module: module.into_proto().write_to_bytes()?,
    })
}

/// By FNV-1a, which is the same in every process (Fowler, Noll and Vo, 1991).
fn named(module: &Module, sequence: u64) -> u64 {
    let bytes = module.name().bytes().chain(sequence.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A rewritten module.
#[derive(Debug)]
pub struct Rewritten {
    /// The `HloModuleProto`, for one device.
    pub module: Vec<u8>,
    /// What its custom calls refer to.
    pub tables: BTreeMap<i64, DeviceTable>,
    /// Hash of everything but names, places in the source and values of constants. It names the
    /// program, even if it was compiled again.
    pub identity: i64,
    /// Hash of the sequence of collectives and of the module's name. Programs of different threads
    /// are matched between ranks by it.
    pub named_sequence: u64,
    /// Hash of the sequence of collectives; equal programs have equal ones in every process.
    pub sequence: u64,
    /// The sequence in words, for people; long ones are cut.
    pub summary: String,
    /// Number of collective instructions.
    pub collectives: usize,
    /// Collectives that a launch executes, if loops say how often they run; else very many.
    pub executed: u64,
    /// Bytes of their results.
    pub bytes: u64,
    /// Other custom calls that take part in the order.
    pub other_ordered: usize,
    /// Where its collectives stand, in words, by the numbers that their custom calls have. None if
    /// all ranks that run it execute the same sequence of them.
    pub places: BTreeMap<i64, String>,
    /// Layouts of the parameters and the result, which the second compilation must keep.
    pub layouts: Layouts,
}

/// The serialized `HloModuleProto` in a serialized `HloModuleProtoWithConfig`.
///
/// # Errors
/// If there is none.
pub fn module_of(program: &[u8]) -> Result<Vec<u8>, Refused> {
    Ok(read(program)?.write_to_bytes()?)
}

/// The layouts of a serialized `HloModuleProtoWithConfig` as it is.
///
/// # Errors
/// If it is no module.
pub fn layouts_of(program: &[u8]) -> Result<Layouts, Refused> {
    Ok(Module::new(read(program)?)?.layouts())
}

/// The parameters that a launch of a serialized `HloModuleProtoWithConfig` donates, in order: those
/// whose memory a result may take (`xla/pjrt/utils.cc`, `ComputeParametersThatMustBeDonated`).
///
/// # Errors
/// If it is no module.
pub fn donated_parameters(program: &[u8]) -> Result<Vec<usize>, Refused> {
    let module = read(program)?;
    let entries = module
        .input_output_alias
        .iter()
        .flat_map(|all| &all.entries);
    let numbers = entries.map(|entry| match entry.parameter_shape_index.first() {
        // All parameters are in one tuple.
        Some(&index) => index,
        None => entry.parameter_number,
    });
    let mut numbers: Vec<usize> = numbers
        .filter_map(|number| number.try_into().ok())
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// The integers that custom calls of a serialized `HloModuleProtoWithConfig` have as attribute
/// `name`, in order: of those whose target is `meant`, which has the value of one without it.
///
/// # Errors
/// If it is no module.
pub fn attributes(
    program: &[u8],
    name: &str,
    meant: impl Fn(&str) -> Option<i64>,
) -> Result<Vec<i64>, Refused> {
    let module = read(program)?;
    let computations = module.computations.iter();
    let mut values: Vec<i64> = computations
        .flat_map(|computation| &computation.instructions)
        .filter_map(|instruction| {
            let default = meant(&instruction.custom_call_target)?;
            let config = String::from_utf8_lossy(&instruction.backend_config);
            Some(integer(&config, name).unwrap_or(default))
        })
        .collect();
    values.sort_unstable();
    values.dedup();
    Ok(values)
}

/// Reads `name = N : i64` out of the attributes of a custom call.
fn integer(attributes: &str, name: &str) -> Option<i64> {
    attributes.split(['{', ',']).find_map(|attribute| {
        let (key, value) = attribute.split_once('=')?;
        let number = value.split(':').next()?.trim();
        (key.trim() == name).then(|| number.parse().ok())?
    })
}

/// A serialized `HloModuleProto` as a serialized `HloModuleProtoWithConfig`, with an empty
/// configuration.
///
/// # Errors
/// If it is no module.
pub fn with_config(module: &[u8]) -> Result<Vec<u8>, Refused> {
    let both = HloModuleProtoWithConfig {
        hlo_module: Some(HloModuleProto::parse_from_bytes(module)?).into(),
        ..Default::default()
    };
    Ok(both.write_to_bytes()?)
}

fn read(program: &[u8]) -> Result<HloModuleProto, Refused> {
    HloModuleProtoWithConfig::parse_from_bytes(program)?
        .hlo_module
        .into_option()
        .ok_or_else(|| Refused::inconsistent("it has no module"))
}
