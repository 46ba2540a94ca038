//! The instructions that concern several devices: what becomes of each, in one table.

use crate::proto::hlo::HloInstructionProto;
use crate::shape::TUPLE;
use crate::shape_rule::ShapeRule::{self, Blocks, Divided, Gathered, Number, Same, Scattered};

use Participants::{Groups, GroupsByFlag, Pairs, Partition, Replica};
use Treatment::{Call, Kept, Start, Unsupported, Wrapper};

/// What the names of the targets of collectives begin with.
pub const TARGET_PREFIX: &str = "mpi_cuda_collective_";

/// The target of the custom call with which each launch begins, without the prefix.
pub(crate) const BEGIN: &str = "begin";

/// The targets of the custom calls that start an all-reduce and that wait for it.
pub(crate) const START: &str = "all_reduce_start";
pub(crate) const END: &str = "all_reduce_done";

/// All instructions that are known here. Of two rows with an opcode the first one that fits counts.
#[rustfmt::skip]
static INSTRUCTIONS: &[Row] = &[
    //   opcode                  target                  participants  shapes     it reduces
    call("all-reduce",           "all_reduce",           GroupsByFlag, Same,      true),
    call("all-gather",           "all_gather",           GroupsByFlag, Gathered,  false),
    call("reduce-scatter",       "reduce_scatter",       GroupsByFlag, Scattered, true),
    call("all-to-all",           "all_to_all",           Groups,       Blocks,    false),
    call("all-to-all",           "all_to_all_array",     Groups,       Divided,   false),
    call("collective-permute",   "collective_permute",   Pairs,        Same,      false),
    call("collective-broadcast", "collective_broadcast", Groups,       Same,      false),
    call("partition-id",         "id",                   Partition,    Number,    false),
    call("replica-id",           "id",                   Replica,      Number,    false),
    // First halves of collectives in two: what they start, and whether operands are in the result.
    start("all-reduce-start", "all-reduce", false),
    start("all-gather-start", "all-gather", true),
    start("collective-permute-start", "collective-permute", true),
    row("async-start", Wrapper),
    // Second halves without a first.
    row("all-reduce-done", Unsupported),
    row("all-gather-done", Unsupported),
    row("collective-permute-done", Unsupported),
    // What no plugin at hand leaves in an optimized program, or what we cannot execute.
    row("all-to-all-start", Unsupported),
    row("ragged-all-to-all", Unsupported),
    row("recv", Unsupported),
    row("recv-done", Unsupported),
    row("send", Unsupported),
    row("send-done", Unsupported),
    // What is left of asynchronous calls has no collectives (`synchronous.rs`).
    row("async-update", Kept),
    row("async-done", Kept),
    row("custom-call", Kept),
];

/// What becomes of an instruction; none if it is not in the table.
pub(crate) fn treatment(instruction: &HloInstructionProto) -> Option<&'static Treatment> {
    let is_tuple = instruction.shape.get_or_default().element_type == TUPLE;
    let fits = |row: &&Row| row.opcode == instruction.opcode && (is_tuple || !row.needs_tuple());
    Some(&INSTRUCTIONS.iter().find(fits)?.treatment)
}

/// Whether an instruction is a collective as a whole, be it one that is refused.
pub(crate) fn is_collective(instruction: &HloInstructionProto) -> bool {
    match treatment(instruction) {
        Some(Call(form)) => form.communicates(),
        Some(Unsupported) => true,
        _ => false,
    }
}

/// The names of all handlers that rewritten programs need: their targets without [`TARGET_PREFIX`].
pub fn targets() -> Vec<&'static str> {
    let of = |row: &'static Row| match &row.treatment {
        Call(form) => Some(form.target),
        _ => None,
    };
    let mut all: Vec<_> = INSTRUCTIONS.iter().filter_map(of).collect();
    all.extend([BEGIN, START, END]);
    all.sort_unstable();
    all.dedup();
    all
}

struct Row {
    opcode: &'static str,
    treatment: Treatment,
}

impl Row {
    fn needs_tuple(&self) -> bool {
        matches!(&self.treatment, Call(form) if form.shapes == Blocks)
    }
}

/// What becomes of an instruction.
#[derive(Debug)]
pub(crate) enum Treatment {
    /// A custom call takes its place.
    Call(Form),
    /// It starts a collective, which takes its place (`synchronous.rs`).
    Start {
        /// The opcode of the collective.
        whole: &'static str,
        /// Its result is a tuple of the collective's operands and results.
        with_operands: bool,
    },
    /// It starts what its computation does. If that is a collective, it takes its place.
    Wrapper,
    /// It is refused by name.
    Unsupported,
    /// It stays as it is.
    Kept,
}

/// A custom call and what its instruction must be like.
#[derive(Debug)]
pub(crate) struct Form {
    /// The name of the handler: the target without the prefix.
    pub(crate) target: &'static str,
    pub(crate) participants: Participants,
    pub(crate) shapes: ShapeRule,
    /// Its computation is a reduction.
    pub(crate) reduces: bool,
}

impl Form {
    /// Whether devices exchange data, so that the call takes part in the order.
    pub(crate) fn communicates(&self) -> bool {
        !matches!(self.participants, Partition | Replica)
    }
}

/// How an instruction names the devices that take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Participants {
    /// By groups. `channel_id` and `use_global_device_ids` say what their ids are.
    GroupsByFlag,
    /// By groups. `channel_id` alone says what their ids are.
    Groups,
    /// By pairs of a source and a target. `channel_id` says what their ids are.
    Pairs,
    /// Not at all: each device has the number of its partition.
    Partition,
    /// Not at all: each device has the number of its replica.
    Replica,
}

const fn row(opcode: &'static str, treatment: Treatment) -> Row {
    Row { opcode, treatment }
}

const fn call(
    opcode: &'static str,
    target: &'static str,
    participants: Participants,
    shapes: ShapeRule,
    reduces: bool,
) -> Row {
    let form = Form {
        target,
        participants,
        shapes,
        reduces,
    };
    row(opcode, Call(form))
}

const fn start(opcode: &'static str, whole: &'static str, with_operands: bool) -> Row {
    let start = Start {
        whole,
        with_operands,
    };
    row(opcode, start)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::shape::tuple;

    fn named(opcode: &str) -> HloInstructionProto {
        HloInstructionProto {
            opcode: opcode.into(),
            ..Default::default()
        }
    }

    #[test]
    fn what_starts_a_collective_starts_one_that_is_called() {
        for row in INSTRUCTIONS {
            if let Start { whole, .. } = row.treatment {
                assert_eq!(row.opcode, format!("{whole}-start"));
                assert!(matches!(treatment(&named(whole)), Some(Call(_))), "{whole}");
            }
        }
    }

    #[test]
    fn every_row_can_be_reached() {
        let mut reached = HashSet::new();
        for row in INSTRUCTIONS {
            let mut instruction = named(row.opcode);
            for _ in 0..2 {
                reached.insert(std::ptr::from_ref(treatment(&instruction).unwrap()));
                instruction.shape = Some(tuple(vec![])).into();
            }
        }
        assert_eq!(reached.len(), INSTRUCTIONS.len());
    }

    #[test]
    fn targets_are_named_once() {
        let targets = targets();
        let different: HashSet<_> = targets.iter().collect();
        assert_eq!(different.len(), targets.len());
        assert!(targets.contains(&"begin") && targets.contains(&"all_to_all_array"));
    }

    #[test]
    fn numbers_of_a_device_are_no_collectives() {
        for (opcode, expected) in [
            ("all-reduce", true),
            ("ragged-all-to-all", true),
            ("send", true),
            ("partition-id", false),
            ("async-start", false),
            ("custom-call", false),
            ("add", false),
        ] {
            assert_eq!(is_collective(&named(opcode)), expected, "{opcode}");
        }
    }
}
