//! Which ranks can never go on, from what each of them waits for.

#![forbid(unsafe_code)]

use mpi_shim_abi::{ANY, PROC_NULL};

use crate::mpi::communicators::is_users;
use crate::watch::state::{State, Wait};

/// What is known of a rank.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Known {
    /// It has told, and has done nothing since.
    Told(State),
    /// It has ended, in words: it sends nothing and begins nothing any more.
    Ended(String),
    /// Nothing, so it may do anything.
    Nothing,
}

impl Known {
    /// What it waits for, if that keeps it from everything else.
    fn wait(&self) -> Option<&Wait> {
        match self {
            // Else another operation may still end what one of them waits for.
            Known::Told(state) if !state.others => match &state.waits[..] {
                // On the user's own communicators mpi4py may send, whatever else waits here.
                [wait] if !is_users(wait.comm) => Some(wait),
                _ => None,
            },
            _ => None,
        }
    }
}

/// For each rank that can never go on, a rank that it waits for in vain.
pub(super) fn stuck(ranks: &[Known]) -> Vec<(i32, i32)> {
    let mut stuck: Vec<bool> = ranks.iter().map(|rank| rank.wait().is_some()).collect();
    // Whoever may be helped by a rank that is not stuck is not stuck either.
    loop {
        let before = stuck.clone();
        for (rank, stays) in stuck.iter_mut().enumerate() {
            *stays &= in_vain(ranks, &before, rank).is_some();
        }
        if stuck == before {
            break;
        }
    }
    (0..ranks.len())
        .filter(|&rank| stuck[rank])
        .filter_map(|rank| Some((rank as i32, in_vain(ranks, &stuck, rank)?)))
        .collect()
}

/// A rank that waits in vain in comparing an operation with other nodes, and one that has executed
/// another in its place without comparing it.
pub(super) fn passed(ranks: &[Known]) -> Option<(i32, i32)> {
    let told = || {
        (0..).zip(ranks).filter_map(|(rank, known)| match known {
            Known::Told(state) => Some((rank, &state.compared)),
            _ => None,
        })
    };
    for (rank, own) in told() {
        for (place, one) in own.iter().enumerate().filter(|(_, one)| one.waits) {
            let mut others = told().filter(|(_, theirs)| {
                let theirs = theirs.get(place);
                theirs.is_some_and(|it| it.executed >= one.executed && it.begun < one.begun)
            });
            if let Some((other, _)) = others.next() {
                return Some((rank, other));
            }
        }
    }
    None
}

/// A rank that `rank` waits for in vain, if those that are `stuck` stay so.
fn in_vain(ranks: &[Known], stuck: &[bool], rank: usize) -> Option<i32> {
    let wait = ranks[rank].wait()?;
    let all = 0..ranks.len() as i32;
    let mut others = all.filter(|&other| other != rank as i32 && wait.has(other));
    if wait.kind.is_collective() {
        // One that never comes is enough.
        return others.find(|&other| never_comes(ranks, stuck, other, wait));
    }
    if wait.kind.receives() && wait.source != PROC_NULL {
        if wait.source != ANY {
            let never = never_sends(ranks, stuck, wait.source, rank as i32, wait);
            return never.then_some(wait.source);
        }
        let senders: Vec<i32> = others.collect();
        let never = |&other: &i32| never_sends(ranks, stuck, other, rank as i32, wait);
        return senders
            .iter()
            .all(never)
            .then(|| senders.first().copied())?;
    }
    if wait.kind.sends() && wait.dest != PROC_NULL {
        let never = never_receives(ranks, stuck, wait.dest, rank as i32, wait);
        return never.then_some(wait.dest);
    }
    None
}

fn of(ranks: &[Known], rank: i32) -> &Known {
    let place = usize::try_from(rank).ok();
    place
        .and_then(|place| ranks.get(place))
        .unwrap_or(&Known::Nothing)
}

/// Whether a rank has ended or is stuck, and in what.
fn halted<'a>(ranks: &'a [Known], stuck: &[bool], rank: i32) -> Option<Option<&'a Wait>> {
    match of(ranks, rank) {
        Known::Ended(_) => Some(None),
        known if stuck.get(rank as usize) == Some(&true) => Some(known.wait()),
        _ => None,
    }
}

fn never_comes(ranks: &[Known], stuck: &[bool], rank: i32, to: &Wait) -> bool {
    halted(ranks, stuck, rank).is_some_and(|wait| {
        wait.is_none_or(|wait| !wait.kind.is_collective() || wait.comm != to.comm)
    })
}

fn never_sends(ranks: &[Known], stuck: &[bool], rank: i32, to: i32, receive: &Wait) -> bool {
    halted(ranks, stuck, rank).is_some_and(|wait| {
        wait.is_none_or(|wait| {
            !(wait.kind.sends() && wait.dest == to && receive.accepts(rank, wait))
        })
    })
}

fn never_receives(ranks: &[Known], stuck: &[bool], rank: i32, from: i32, send: &Wait) -> bool {
    halted(ranks, stuck, rank).is_some_and(|wait| wait.is_none_or(|wait| !wait.accepts(from, send)))
}

/// The ranks around the circle that begins at the first of them, if they wait for each other in
/// one.
pub(super) fn circle(stuck: &[(i32, i32)]) -> Option<Vec<i32>> {
    let next = |rank: i32| stuck.iter().find(|row| row.0 == rank).map(|row| row.1);
    let mut path = vec![stuck.first()?.0];
    loop {
        let rank = next(*path.last()?)?;
        if let Some(start) = path.iter().position(|&seen| seen == rank) {
            let mut circle = path.split_off(start);
            // From the lowest rank on, whoever was looked at first.
            let lowest = circle.iter().enumerate().min_by_key(|(_, rank)| **rank)?.0;
            circle.rotate_left(lowest);
            return Some(circle);
        }
        path.push(rank);
    }
}

#[cfg(test)]
mod tests {
    use mpi_shim_abi::Kind;

    use super::*;

    fn wait(kind: Kind, source: i32, dest: i32) -> Wait {
        Wait {
            kind,
            comm: 0,
            members: Vec::new(),
            source,
            dest,
            send_tag: 0,
            recv_tag: 0,
            milliseconds: 5000,
            words: String::new(),
        }
    }

    fn told(waits: Vec<Wait>) -> Known {
        Known::Told(State {
            waits,
            ..State::default()
        })
    }

    fn recv(source: i32) -> Known {
        told(vec![wait(Kind::Recv, source, PROC_NULL)])
    }

    fn send(dest: i32) -> Known {
        told(vec![wait(Kind::Send, PROC_NULL, dest)])
    }

    fn collective(kind: Kind) -> Known {
        told(vec![wait(kind, PROC_NULL, PROC_NULL)])
    }

    fn ended() -> Known {
        Known::Ended("has ended".into())
    }

    fn of(ranks: &[Known]) -> Vec<i32> {
        stuck(ranks).into_iter().map(|(rank, _)| rank).collect()
    }

    #[test]
    fn circles_of_receives_are_stuck() {
        let three = [recv(1), recv(2), recv(0)];
        assert_eq!(stuck(&three), [(0, 1), (1, 2), (2, 0)]);
        assert_eq!(circle(&stuck(&three)), Some(vec![0, 1, 2]));
        assert_eq!(of(&[recv(1), recv(0), recv(1)]), [0, 1, 2]);
        assert_eq!(
            circle(&stuck(&[recv(2), recv(2), recv(1)])),
            Some(vec![1, 2])
        );
    }

    #[test]
    fn who_may_be_helped_is_not_stuck() {
        // A rank that computes may send to everybody.
        assert!(of(&[recv(1), told(vec![])]).is_empty());
        assert!(of(&[recv(1), recv(2), told(vec![])]).is_empty());
        assert!(of(&[recv(1), Known::Nothing]).is_empty());
        // A message that is on its way.
        assert!(of(&[recv(1), send(0)]).is_empty());
        assert!(of(&[recv(ANY), send(0), recv(0)]).is_empty());
        assert!(of(&[collective(Kind::Allreduce), collective(Kind::Allreduce)]).is_empty());
        // mpi4py may send there.
        let mut users = wait(Kind::Recv, 1, PROC_NULL);
        users.comm = 1 << 61;
        assert!(of(&[told(vec![users]), recv(0)]).is_empty());
        // One of two threads may go on.
        let mut two = wait(Kind::Recv, 1, PROC_NULL);
        two.comm = 1;
        let both = told(vec![two, wait(Kind::Recv, 1, PROC_NULL)]);
        assert!(of(&[both, recv(0)]).is_empty());
    }

    #[test]
    fn who_waits_for_one_that_has_ended_is_stuck() {
        assert_eq!(stuck(&[recv(1), ended()]), [(0, 1)]);
        assert_eq!(of(&[send(1), ended()]), [0]);
        assert_eq!(of(&[recv(ANY), ended(), ended()]), [0]);
        assert_eq!(of(&[collective(Kind::Barrier), told(vec![]), ended()]), [0]);
        assert_eq!(circle(&stuck(&[recv(1), ended()])), None);
    }

    #[test]
    fn who_compares_what_another_has_not_compared_waits_in_vain() {
        let rank = |executed, begun, waits| {
            Known::Told(State {
                compared: vec![(0, 0, false).into(), (executed, begun, waits).into()],
                ..State::default()
            })
        };
        let compares = || rank(9, 3, true);
        assert_eq!(passed(&[rank(9, 2, false), compares()]), Some((1, 0)));
        assert_eq!(
            passed(&[compares(), Known::Nothing, rank(12, 2, false)]),
            Some((0, 2))
        );
        // It may still come, or has come.
        for other in [
            rank(8, 2, false),
            rank(9, 3, true),
            rank(9, 3, false),
            compares(),
        ] {
            assert_eq!(passed(&[compares(), other]), None);
        }
    }

    #[test]
    fn what_does_not_match_is_stuck() {
        assert_eq!(of(&[collective(Kind::Barrier), recv(0)]), [0, 1]);
        assert_eq!(of(&[send(1), send(0)]), [0, 1]);
        let mut tag = wait(Kind::Recv, 1, PROC_NULL);
        tag.recv_tag = 3;
        assert_eq!(of(&[told(vec![tag.clone()]), send(0)]), [0, 1]);
        tag.recv_tag = ANY;
        assert!(of(&[told(vec![tag]), send(0)]).is_empty());
    }
}
