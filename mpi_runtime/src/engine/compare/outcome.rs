//! What follows from the records of a round, the same on all ranks, since all see the same ones:
//!
//! | current records | outcome |
//! | --- | --- |
//! | all are launches of the same sequence | nothing in these launches needs to be compared |
//! | launches of the same code with loops of other lengths | all ranks fail |
//! | one of a program for several devices, and a collective of another | all ranks fail |
//! | other launches, and operations | the launches are over; their operations are compared |
//! | the same operation everywhere | it may run |
//! | it, but in different loops of one program | all ranks fail |
//! | different operations, or a refused one | all ranks fail |
//! | collectives that programs have refused, and others of such a kind | all ranks fail |
//! | ... and none of such a kind | those are used up, and the others stay |

#![forbid(unsafe_code)]

use crate::engine::compare::record::Record;
use crate::node::board::RECORD;

pub(super) type Words = [u64; RECORD];

/// What follows from a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Same,
    Differ,
    /// Some ranks have launched a sequence, and some execute operations.
    LaunchesAreOver,
    /// What some programs have refused is nothing to the other ranks.
    UnlaunchedAreOver,
}

impl Outcome {
    /// Whether a record is used up by it.
    #[inline]
    pub(super) fn uses_up(self, record: &Words) -> bool {
        match self {
            Outcome::Same | Outcome::Differ => true,
            Outcome::LaunchesAreOver => Record::is_launch(record),
            Outcome::UnlaunchedAreOver => Record::is_unlaunched(record),
        }
    }
}

/// What follows when this rank's record is `own` and the others', of which not all are the same,
/// are `others`.
#[cold]
pub(super) fn outcome(own: &Words, others: impl Iterator<Item = Words> + Clone) -> Outcome {
    let all = || others.clone().chain([*own]);
    if all().any(|one| Record::is_unlaunched(&one)) {
        return outcome_of_unlaunched(all());
    }
    if all().any(|one| Record::is_program(&one)) {
        return Outcome::Differ;
    }
    let launches = || all().filter(Record::is_launch);
    // Few ranks differ, if any, so that this is quadratic does not matter.
    let clash = |one: Words| launches().any(|other| Record::clash(&one, &other));
    if launches().next().is_none() {
        let refused = all().any(|one| Record::is_refusal(&one));
        match !refused && Record::belong_together(own, all()) {
            true => Outcome::Same,
            false => Outcome::Differ,
        }
    } else if launches().any(clash) {
        Outcome::Differ
    } else {
        Outcome::LaunchesAreOver
    }
}

/// What follows where programs have refused collectives. Those are nothing to the others if none of
/// them does anything of such a kind.
fn outcome_of_unlaunched(all: impl Iterator<Item = Words> + Clone) -> Outcome {
    let kinds = |unlaunched: bool| {
        let some = all.clone();
        let some = some.filter(move |one| Record::is_unlaunched(one) == unlaunched);
        some.fold(0, |kinds, one| kinds | Record::kind_bit(&one))
    };
    if all.clone().all(|one| Record::is_unlaunched(&one)) {
        Outcome::Same
    } else if kinds(true) & kinds(false) != 0 {
        Outcome::Differ
    } else {
        Outcome::UnlaunchedAreOver
    }
}
