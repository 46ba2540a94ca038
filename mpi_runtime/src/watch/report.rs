//! What is said of a job that waits.

#![forbid(unsafe_code)]

use std::fmt::Write as _;

use crate::ranks::Ranks;
use crate::watch::stuck::{Known, bereft, circle, passed, stuck};

/// Ranks of which more than a line is said.
const MOST: usize = 32;

/// Why the job can never go on, if that is proven.
pub(super) fn verdict(ranks: &[Known]) -> Option<String> {
    if let Some((rank, other)) = passed(ranks) {
        return Some(format!(
            "the ranks execute different operations: rank {rank} compares one with other nodes \
             that rank {other} does not know, since it has executed another in its place"
        ));
    }
    let (stuck, bereft) = (stuck(ranks), bereft(ranks));
    if let Some(circle) = circle(&stuck) {
        let names: Vec<String> = circle.iter().map(i32::to_string).collect();
        let words = names.join(" waits for ");
        return Some(format!("deadlock: {words} waits for {}", circle[0]));
    }
    let ended = |&(rank, of): &(i32, i32)| match ranks.get(of as usize) {
        Some(Known::Ended(words)) => Some(format!("rank {rank} waits in vain: rank {of} {words}")),
        _ => None,
    };
    let mut in_vain = stuck.iter().chain(bereft.iter());
    in_vain.find_map(ended).or_else(|| {
        let (first, for_whom) = stuck.first()?;
        Some(format!(
            "deadlock: {first} waits for {for_whom}, which cannot go on"
        ))
    })
}

/// What each rank does, a line for each; ranks that do the same share one.
pub(super) fn lines(ranks: &[Known]) -> String {
    let mut groups: Vec<(String, Vec<i32>)> = Vec::new();
    for (rank, known) in ranks.iter().enumerate() {
        for words in words(known) {
            match groups.iter_mut().find(|group| group.0 == words) {
                Some(group) => group.1.push(rank as i32),
                None => groups.push((words, vec![rank as i32])),
            }
        }
    }
    let left_out = groups.len().saturating_sub(MOST);
    let mut text = String::new();
    for (words, ranks) in groups.iter().take(MOST) {
        let (who, is) = match ranks.len() {
            1 => ("rank", "is"),
            _ => ("ranks", "are"),
        };
        let words = words.replacen("{is}", is, 1);
        // Writing to a string cannot fail.
        let _ = write!(text, "\n  {who} {} {words}", Ranks(ranks));
    }
    if left_out > 0 {
        let _ = write!(text, "\n  {left_out} more that differ from these");
    }
    text
}

fn words(known: &Known) -> Vec<String> {
    match known {
        Known::Ended(words) => vec![words.clone()],
        Known::Nothing => vec!["{is} on another node, or stopped, or tells nothing".into()],
        Known::Told(state) => {
            let waits = state.waits.iter();
            let mut all: Vec<String> = waits
                .map(|wait| {
                    let seconds = wait.milliseconds / 1000;
                    format!("{{is}} waiting in {} for {seconds} s", wait.words)
                })
                .collect();
            match (all.last_mut(), state.place.is_empty()) {
                (Some(_), true) => {}
                (Some(last), false) => *last += &format!(" ({})", state.place),
                (None, true) => all.push("{is} at work".into()),
                (None, false) => all.push(format!("{{is}} {}", state.place)),
            }
            all
        }
    }
}

#[cfg(test)]
mod tests {
    use mpi_shim_abi::{Kind, PROC_NULL};

    use super::*;
    use crate::watch::state::{State, Wait};

    fn receives(source: i32) -> Known {
        let wait = Wait {
            kind: Kind::Recv,
            comm: 0,
            members: Vec::new(),
            source,
            dest: PROC_NULL,
            send_tag: 0,
            recv_tag: 0,
            milliseconds: 5400,
            calls_user: false,
            number: 0,
            words: format!("recv from rank {source}"),
        };
        Known::Told(State {
            waits: vec![wait],
            place: "in Python: train.py:3".into(),
            ..State::default()
        })
    }

    #[test]
    fn a_circle_is_named() {
        let ranks = [receives(1), receives(2), receives(0)];
        let verdict = verdict(&ranks).unwrap();
        assert_eq!(verdict, "deadlock: 0 waits for 1 waits for 2 waits for 0");
        let text = lines(&ranks);
        let first = "rank 0 is waiting in recv from rank 1 for 5 s (in Python: train.py:3)\n";
        assert!(text.contains(first), "{text}");
    }

    #[test]
    fn ranks_that_do_the_same_share_a_line() {
        let ranks = [
            receives(3),
            receives(3),
            Known::Nothing,
            Known::Ended("has died".into()),
        ];
        let text = lines(&ranks);
        assert!(
            text.contains("\n  ranks 0-1 are waiting in recv from rank 3 for 5 s"),
            "{text}"
        );
        assert!(text.contains("\n  rank 3 has died"), "{text}");
        let verdict = verdict(&ranks).unwrap();
        assert_eq!(verdict, "rank 0 waits in vain: rank 3 has died");
    }
}
