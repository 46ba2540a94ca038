//! What ranks that differ are told.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::ranks::Ranks;

/// Different things that an error names.
const MOST: usize = 6;

/// What each rank does, in words, behind `what`: those that do the same are named together.
pub(super) fn differ(what: &str, mut all: Vec<(i32, String)>) -> String {
    all.sort_unstable();
    let mut by_words: BTreeMap<&str, Vec<i32>> = BTreeMap::new();
    for (rank, words) in &all {
        by_words.entry(words).or_default().push(*rank);
    }
    let mut groups: Vec<(Vec<i32>, &str)> = by_words
        .into_iter()
        .map(|(words, ranks)| (ranks, words))
        .collect();
    groups.sort_unstable();
    let left_out = groups.len().saturating_sub(MOST);
    groups.truncate(MOST);
    let mut text = what.to_owned();
    for (ranks, words) in groups {
        let who = if ranks.len() == 1 { "Rank" } else { "Ranks" };
        text += &format!(". {who} {}: {words}", Ranks(&ranks));
    }
    if left_out > 0 {
        text += &format!(". {left_out} more differ from all of these");
    }
    text + ". All ranks must run the same in the same order; look for what depends on the rank"
}

/// What is said once where a rank has waited in vain for another one, both by their numbers in the
/// world, on a communicator of the user's.
pub(super) fn not_compared(rank: usize, other: usize) -> String {
    format!(
        "rank {rank} has waited long for rank {other} in a collective on a communicator of the \
         program's own, where that rank may use mpi4py; collectives there are not compared between \
         ranks any more; without comm=, or with mpi_cuda.COMM_WORLD, they always are"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_do_the_same_are_named_together() {
        let does = |rank, words: &str| (rank, words.to_owned());
        let all = vec![does(2, "bcast"), does(0, "barrier"), does(1, "bcast")];
        let text = differ("the ranks differ", all);
        let start = "the ranks differ. Rank 0: barrier. Ranks 1-2: bcast. All ranks";
        assert!(text.starts_with(start), "{text}");
        let many = (0..9).map(|rank| (rank, format!("bcast {rank}"))).collect();
        assert!(differ("", many).contains(". 3 more differ from all of these."));
    }
}
