//! Which computations the token passes through, and how.

use std::collections::{HashMap, HashSet};

use crate::collective::Calls;
use crate::error::Refused;
use crate::module::Module;
use crate::proto::hlo::HloInstructionProto;
use crate::shape::{TOKEN, results};

/// How a computation with ordered calls gets and gives the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenPath {
    /// The program itself: it begins with a new token.
    Entry,
    /// Its one parameter and its result are paired with the token.
    Paired,
    /// Its one parameter is paired with the token, and nothing comes out: a loop's condition.
    Condition,
    /// One more parameter, and the result is paired with the token.
    Added,
}

/// Paths by computation.
pub(crate) type TokenPaths = HashMap<i64, TokenPath>;

/// The computations that have ordered calls, directly or not. What nothing calls is not executed,
/// and stays as it is but for its collectives.
pub(crate) fn find(module: &Module, calls: &Calls) -> Result<TokenPaths, Refused> {
    // A token is only needed where there is a collective to be ordered.
    if !calls.values().any(|call| call.is_ordered()) {
        return Ok(TokenPaths::new());
    }
    let mut search = Search {
        with_calls: with_calls(module, calls),
        paths: TokenPaths::new(),
    };
    while search.grow(module)? {}
    if search.with_calls.contains(&module.entry()) {
        search.paths.insert(module.entry(), TokenPath::Entry);
    }
    Ok(search.paths)
}

/// The computations that have ordered calls of their own.
fn with_calls(module: &Module, calls: &Calls) -> HashSet<i64> {
    let ordered = calls.iter().filter(|(_, call)| call.is_ordered());
    let mut found: HashSet<i64> = ordered.map(|(&(computation, _), _)| computation).collect();
    for computation in module.computations() {
        if computation.instructions.iter().any(has_token) {
            found.insert(computation.id);
        }
    }
    found
}

struct Search {
    /// Computations with ordered calls, as far as is known.
    with_calls: HashSet<i64>,
    paths: TokenPaths,
}

impl Search {
    /// Goes once through `module`; whether anything new was found.
    fn grow(&mut self, module: &Module) -> Result<bool, Refused> {
        let mut grown = false;
        for computation in module.computations() {
            for instruction in &computation.instructions {
                let called = &instruction.called_computation_ids;
                if called.iter().any(|id| self.with_calls.contains(id)) {
                    grown |= self.with_calls.insert(computation.id);
                    grown |= self.enter(instruction)?;
                }
            }
        }
        Ok(grown)
    }

    /// Notes how the token passes through what `instruction` calls; whether that is new.
    fn enter(&mut self, instruction: &HloInstructionProto) -> Result<bool, Refused> {
        let mut grown = false;
        for (position, &id) in instruction.called_computation_ids.iter().enumerate() {
            grown |= self.with_calls.insert(id);
            // A collective's own reduction has no calls; if it had, it would be refused here.
            let path = path(&instruction.opcode, position).ok_or_else(|| {
                let reason = "what it calls has collectives, or other ordered calls";
                Refused::instruction(instruction, reason)
            })?;
            let before = self.paths.insert(id, path);
            if before.is_some_and(|before| before != path) {
                let reason = "what it calls is also called in another way";
                return Err(Refused::instruction(instruction, reason));
            }
            grown |= before.is_none();
        }
        Ok(grown)
    }
}

/// How the token passes through the computation that an instruction calls in that position; none if
/// it cannot.
fn path(opcode: &str, position: usize) -> Option<TokenPath> {
    match (opcode, position) {
        // Body and condition (`HloInstruction::while_body`, index 0).
        ("while", 0) | ("conditional", _) => Some(TokenPath::Paired),
        ("while", _) => Some(TokenPath::Condition),
        ("call", _) => Some(TokenPath::Added),
        _ => None,
    }
}

/// Whether an instruction runs what it calls as a part of the program.
pub(crate) fn runs_what_it_calls(instruction: &HloInstructionProto) -> bool {
    path(&instruction.opcode, 0).is_some()
}

/// Whether a custom call has its place in the order already.
pub(crate) fn has_token(instruction: &HloInstructionProto) -> bool {
    let mut arrays = results(instruction).into_iter();
    instruction.opcode == "custom-call" && arrays.any(|shape| shape.element_type == TOKEN)
}
