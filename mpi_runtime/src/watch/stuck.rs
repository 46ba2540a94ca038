//! Which ranks can never go on, from what each of them waits for.

#![forbid(unsafe_code)]

use mpi_shim_abi::{ANY, Kind, PROC_NULL};

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
                [wait] => Some(wait),
                _ => None,
            },
            _ => None,
        }
    }

    fn has_ended(&self) -> bool {
        matches!(self, Known::Ended(_))
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

/// A rank with an operation that can never end, whatever else this rank does, and the rank that has
/// ended without taking part. A receive gets an error then, and a message to itself may end it.
pub(super) fn bereft(ranks: &[Known]) -> Option<(i32, i32)> {
    let none = vec![false; ranks.len()];
    (0..).zip(ranks).find_map(|(rank, known)| {
        let Known::Told(state) = known else {
            return None;
        };
        let mut waits = state.waits.iter().filter(|wait| !wait.kind.receives());
        let other = waits.find_map(|wait| waits_in_vain(ranks, &none, rank, wait));
        other.map(|other| (rank, other))
    })
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
    waits_in_vain(ranks, stuck, rank as i32, ranks[rank].wait()?)
}

/// The same for one operation of `rank`.
fn waits_in_vain(ranks: &[Known], stuck: &[bool], rank: i32, wait: &Wait) -> Option<i32> {
    if wait.calls_user {
        // The others may have done their part, and gone on.
        return None;
    }
    let all = 0..ranks.len() as i32;
    let mut others = all.filter(|&other| other != rank && wait.has(other));
    if wait.kind.is_collective() {
        // Others may have done their part already, and whoever runs may still come.
        if ends_early(wait.kind) && !others.clone().all(|one| halts(ranks, stuck, one, wait)) {
            return None;
        }
        // One that never comes is enough.
        return others.find(|&other| never_comes(ranks, stuck, other, wait));
    }
    if wait.kind.receives() && wait.source != PROC_NULL {
        if wait.source != ANY {
            let never = never_sends(ranks, stuck, wait.source, rank, wait);
            return never.then_some(wait.source);
        }
        let first = others.clone().next()?;
        let never = others.all(|other| never_sends(ranks, stuck, other, rank, wait));
        return never.then_some(first);
    }
    if wait.kind.sends() && wait.dest != PROC_NULL {
        let never = never_receives(ranks, stuck, wait.dest, rank, wait);
        return never.then_some(wait.dest);
    }
    None
}

/// Whether a rank may end such a collective before all others have begun it: it has then done its
/// part.
fn ends_early(kind: Kind) -> bool {
    use Kind::{Bcast, Exscan, Gather, Reduce, Scan, Scatter};
    // In these a rank may have nobody to wait for.
    kind.has_counts()
        || kind.has_neighbors()
        || matches!(
            kind.started(),
            Bcast | Exscan | Gather | Reduce | Scan | Scatter
        )
}

fn of(ranks: &[Known], rank: i32) -> &Known {
    let place = usize::try_from(rank).ok();
    place
        .and_then(|place| ranks.get(place))
        .unwrap_or(&Known::Nothing)
}

/// Whether a rank does nothing any more on the communicator of `to`, but what is on its way: it has
/// ended, or is stuck.
fn halts(ranks: &[Known], stuck: &[bool], rank: i32, to: &Wait) -> bool {
    let known = of(ranks, rank);
    // On the user's own communicators mpi4py may communicate, whatever waits here.
    known.has_ended() || !is_users(to.comm) && stuck.get(rank as usize) == Some(&true)
}

/// What a rank that halts waits for, and the messages that it has started.
fn on_its_way(known: &Known) -> impl Iterator<Item = &Wait> {
    let state = match known {
        Known::Told(state) => Some(state),
        Known::Ended(_) | Known::Nothing => None,
    };
    state
        .into_iter()
        .flat_map(|state| state.waits.iter().chain(&state.background))
}

fn never_comes(ranks: &[Known], stuck: &[bool], rank: i32, to: &Wait) -> bool {
    let comes = |wait: &Wait| wait.kind.is_collective() && wait.comm == to.comm;
    let known = of(ranks, rank);
    halts(ranks, stuck, rank, to) && !has_begun(known, to) && !on_its_way(known).any(comes)
}

/// Whether a rank may have begun that collective, and so have done its part.
fn has_begun(known: &Known, collective: &Wait) -> bool {
    match known {
        Known::Told(state) if collective.number > 0 => {
            let begun = state.begun_on(collective.comm);
            begun.is_none_or(|begun| begun >= collective.number)
        }
        _ => false,
    }
}

fn never_sends(ranks: &[Known], stuck: &[bool], rank: i32, to: i32, receive: &Wait) -> bool {
    let sends = |wait: &Wait| wait.kind.sends() && wait.dest == to && receive.accepts(rank, wait);
    halts(ranks, stuck, rank, receive) && !on_its_way(of(ranks, rank)).any(sends)
}

fn never_receives(ranks: &[Known], stuck: &[bool], rank: i32, from: i32, send: &Wait) -> bool {
    let receives = |wait: &Wait| wait.accepts(from, send);
    halts(ranks, stuck, rank, send) && !on_its_way(of(ranks, rank)).any(receives)
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
mod tests;
