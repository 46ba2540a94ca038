//! What instructions do with memory, as far as it is known here.

use crate::instructions::{self, Treatment};
use crate::module::Module;
use crate::proto::hlo::HloInstructionProto;

use Effect::{Fresh, Harmless, InPlace, NoMemory};

/// What an instruction does with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// It neither writes into the memory of an operand nor has a part of it as its result.
    Fresh,
    /// It does not write into memory that there was before.
    Harmless,
    /// It neither reads nor writes memory.
    NoMemory,
    /// In a fusion it may write in place.
    InPlace,
}

/// Instructions of which the effect is known, beside collectives, which are harmless.
static EFFECTS: &[(&str, Effect)] = &[
    ("add", Fresh),
    ("bitcast", NoMemory),
    ("broadcast", Fresh),
    ("call", InPlace),
    ("concatenate", Fresh),
    ("constant", NoMemory),
    ("convert", Fresh),
    ("copy", Fresh),
    ("custom-call", InPlace),
    ("dot", Fresh),
    ("dynamic-update-slice", InPlace),
    ("fusion", Fresh),
    ("get-tuple-element", NoMemory),
    ("iota", Harmless),
    ("multiply", Fresh),
    ("parameter", NoMemory),
    ("reduce", Fresh),
    ("reverse", Fresh),
    ("scatter", InPlace),
    ("slice", Fresh),
    ("subtract", Fresh),
    ("transpose", Fresh),
    ("tuple", NoMemory),
    ("while", InPlace),
];

fn effect(instruction: &HloInstructionProto) -> Option<Effect> {
    if let Some(Treatment::Call(_)) = instructions::treatment(instruction) {
        return Some(Harmless);
    }
    let row = EFFECTS.iter().find(|row| row.0 == instruction.opcode)?;
    Some(row.1)
}

/// Whether an instruction neither reads nor writes memory.
pub(crate) fn has_no_memory(instruction: &HloInstructionProto) -> bool {
    effect(instruction) == Some(NoMemory)
}

/// Whether an instruction neither writes into the memory of an operand nor has a part of it as its
/// result.
pub(crate) fn is_fresh(module: &Module, instruction: &HloInstructionProto) -> bool {
    let is_fusion = instruction.opcode == "fusion";
    effect(instruction) == Some(Fresh) && !(is_fusion && writes_in_place(module, instruction))
}

/// Whether an instruction does not write into memory that there was before.
pub(crate) fn is_harmless(module: &Module, instruction: &HloInstructionProto) -> bool {
    matches!(effect(instruction), Some(Harmless | NoMemory)) || is_fresh(module, instruction)
}

fn writes_in_place(module: &Module, fusion: &HloInstructionProto) -> bool {
    fusion.called_computation_ids.iter().any(|&id| {
        let Ok(computation) = module.computation(id) else {
            return true;
        };
        let mut inside = computation.instructions.iter();
        // A fusion in a fusion may do anything.
        inside.any(|i| i.opcode == "fusion" || effect(i) == Some(InPlace))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn named(opcode: &str) -> HloInstructionProto {
        HloInstructionProto {
            opcode: opcode.into(),
            ..Default::default()
        }
    }

    #[test]
    fn every_instruction_has_one_effect() {
        let opcodes: HashSet<_> = EFFECTS.iter().map(|row| row.0).collect();
        assert_eq!(opcodes.len(), EFFECTS.len());
        for &(opcode, expected) in EFFECTS {
            assert_eq!(effect(&named(opcode)), Some(expected), "{opcode}");
        }
    }

    #[test]
    fn collectives_are_harmless_and_what_is_not_known_is_not() {
        assert_eq!(effect(&named("all-reduce")), Some(Harmless));
        assert_eq!(effect(&named("partition-id")), Some(Harmless));
        assert_eq!(effect(&named("sort")), None);
    }
}
