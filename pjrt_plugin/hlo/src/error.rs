//! The error of this crate.

use crate::proto::hlo::HloInstructionProto;

/// Why a module cannot be rewritten.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The bytes are no module.
    #[error("the inner plugin's optimized program cannot be read: {0}")]
    Unreadable(#[from] protobuf::Error),
    /// The module is inconsistent.
    #[error("the inner plugin's optimized program is inconsistent: {0}")]
    Inconsistent(String),
    /// An instruction that we do not know how to execute.
    #[error("{instruction} ({opcode}) cannot run over MPI: {reason}")]
    Instruction {
        /// Its name.
        instruction: String,
        /// Its opcode.
        opcode: String,
        /// Why.
        reason: String,
    },
}

impl Refused {
    /// `instruction` cannot be executed.
    pub(crate) fn instruction(
        instruction: &HloInstructionProto,
        reason: impl Into<String>,
    ) -> Refused {
        Refused::Instruction {
            instruction: instruction.name.clone(),
            opcode: instruction.opcode.clone(),
            reason: reason.into(),
        }
    }

    /// The module contradicts itself.
    pub(crate) fn inconsistent(reason: impl Into<String>) -> Refused {
        Refused::Inconsistent(reason.into())
    }
}
