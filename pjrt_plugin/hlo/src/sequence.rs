//! The sequence of collectives of a program: in words, and as numbers that ranks compare.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::collective::{self, Calls};
use crate::devices::Devices;
use crate::error::Refused;
use crate::module::Module;
use crate::places::{Place, Places};
use crate::proto::hlo::HloInstructionProto;
use crate::shape::{self, results};
use crate::tokens::{has_token, runs_what_it_calls};

/// Characters of the summary.
const LONGEST_SUMMARY: usize = 400;
/// What the names of our operations' targets begin with (`include/mpi_cuda.h`).
const OPERATIONS: &str = "mpi_cuda_";

/// What a program does in order.
#[derive(Default)]
pub(crate) struct Sequence {
    /// All of it in words.
    words: String,
    /// Hash of the words and the devices.
    pub(crate) hash: u64,
    /// Hash of the program, the same on all ranks that have it, each time that it is compiled.
    pub(crate) identity: i64,
    /// Number of collective instructions.
    pub(crate) collectives: usize,
    /// Number of other custom calls that have a token.
    pub(crate) other_ordered: usize,
    /// Collectives executed, as far as loops tell how often they run.
    pub(crate) executed: u64,
    /// Bytes that those move.
    pub(crate) bytes: u64,
    /// Where each collective stands.
    pub(crate) places: Places,
}

impl Sequence {
    /// The sequence of a module before its collectives are replaced by `calls`.
    pub(crate) fn of(
        module: &Module,
        calls: &Calls,
        devices: &Devices,
    ) -> Result<Sequence, Refused> {
        let mut sequence = Sequence::default();
        let start = Around {
            depth: 0,
            runs: 1,
            place: Place::default(),
        };
        sequence.add_computation(module, module.entry(), calls, start)?;
        let mut hasher = DefaultHasher::new();
        (devices.ids(), &sequence.words).hash(&mut hasher);
        sequence.hash = hasher.finish();
        sequence.identity = identity(module, sequence.hash);
        sequence.places.name(sequence.hash);
        Ok(sequence)
    }

    /// The words; many are cut.
    pub(crate) fn summary(&self) -> String {
        match self.words.char_indices().nth(LONGEST_SUMMARY) {
            Some((end, _)) => format!("{} ...", &self.words[..end]),
            None => self.words.clone(),
        }
    }

    /// Adds what a computation does, with what it calls.
    fn add_computation(
        &mut self,
        module: &Module,
        computation: i64,
        calls: &Calls,
        around: Around,
    ) -> Result<(), Refused> {
        if around.depth > module.computations().len() {
            return Err(Refused::inconsistent("a computation calls itself"));
        }
        for instruction in module.ordered(computation)? {
            if let Some(call) = calls.get(&(computation, instruction.id)) {
                if call.is_ordered() {
                    self.add(&collective::describe(&instruction, call));
                    self.collectives += 1;
                    let bytes = shape::bytes(&instruction).saturating_mul(around.runs);
                    self.executed = self.executed.saturating_add(around.runs);
                    self.bytes = self.bytes.saturating_add(bytes);
                    self.places.add((computation, instruction.id), around.place);
                }
                continue;
            }
            if has_token(&instruction) {
                self.add(&instruction.custom_call_target);
                self.other_ordered += 1;
            } else if instruction.custom_call_target.starts_with(OPERATIONS) && !calls.is_empty() {
                let reason = "it has no XLA token, so it has no order beside collectives";
                return Err(Refused::instruction(&instruction, reason));
            }
            if runs_what_it_calls(&instruction) {
                self.add_called(module, &instruction, calls, around)?;
            }
        }
        Ok(())
    }

    /// Adds what an instruction calls, if that does anything.
    fn add_called(
        &mut self,
        module: &Module,
        instruction: &HloInstructionProto,
        calls: &Calls,
        around: Around,
    ) -> Result<(), Refused> {
        let before = self.words.len();
        let runs = runs(instruction);
        self.add(&instruction.opcode);
        if instruction.opcode == "while" {
            self.words += &runs.map_or(String::new(), |runs| format!(" {runs} times"));
        }
        self.words += " {";
        let inside = self.words.len();
        let inner = Around {
            depth: around.depth + 1,
            runs: around.runs.saturating_mul(runs.unwrap_or(u64::MAX)),
            place: match instruction.opcode.as_str() {
                "while" => self.places.in_loop(around.place, runs.is_some()),
                "conditional" => around.place.in_branch(),
                _ => around.place,
            },
        };
        for &called in &instruction.called_computation_ids {
            self.add_computation(module, called, calls, inner)?;
        }
        if self.words.len() == inside {
            self.words.truncate(before);
        } else {
            self.words += "}";
        }
        Ok(())
    }

    fn add(&mut self, text: &str) {
        if !self.words.is_empty() {
            self.words += "; ";
        }
        self.words += text;
    }
}

/// What is around a computation in the program.
#[derive(Clone, Copy)]
struct Around {
    /// Calls inside each other.
    depth: usize,
    /// How often the computation runs.
    runs: u64,
    place: Place,
}

/// Of `WhileLoopBackendConfig` as JSON.
const KNOWN_TRIP_COUNT: &str = "\"known_trip_count\":{\"n\":\"";

/// How often what an instruction calls runs, if it says so.
pub fn runs(instruction: &HloInstructionProto) -> Option<u64> {
    if instruction.opcode != "while" {
        return Some(1);
    }
    let config = String::from_utf8_lossy(&instruction.backend_config);
    let (_, rest) = config.split_once(KNOWN_TRIP_COUNT)?;
    rest.split('"').next()?.parse().ok()
}

/// The backend configuration of a loop that says so.
pub fn known_trip_count(runs: u64) -> String {
    format!("{{{KNOWN_TRIP_COUNT}{runs}\"}}}}")
}

fn identity(module: &Module, sequence: u64) -> i64 {
    let mut hasher = DefaultHasher::new();
    sequence.hash(&mut hasher);
    for computation in module.computations() {
        computation.instructions.len().hash(&mut hasher);
        for instruction in &computation.instructions {
            instruction.opcode.hash(&mut hasher);
            instruction.custom_call_target.hash(&mut hasher);
            for shape in results(instruction) {
                (shape.element_type, &shape.dimensions).hash(&mut hasher);
            }
        }
    }
    hasher.finish() as i64
}
