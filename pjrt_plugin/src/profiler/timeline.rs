//! Operations as timelines: a line for each communicator, an event for each operation, and within
//! it when it waited for other ranks and when it moved data.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use mpi_runtime::Kind;
use mpi_runtime::engine::recorder::profiled::{
    Elements, Owner, Profiled, ProfiledOperation, Span, said_of_lost,
};
use mpi_runtime::mpi::communicators::Communicator;
use mpi_runtime::ranks::Ranks;
use xspace::{Event, HOST_PLANE, PlaneWriter, Value};

use crate::error::Error;

/// The numbers of our lines begin here. Those of threads are lower (`pid_max` in proc(5)).
const FIRST_LINE: i64 = 0x4d50_0000;
/// Waits with no more nanoseconds between them are one: for one rank after the other.
const TOGETHER: u64 = 2000;

/// Serializes what `rank` has done. `communicator` knows those that exist, by number.
pub fn serialize(
    seen: &Profiled,
    rank: i32,
    communicator: impl Fn(i64) -> Option<Communicator>,
) -> Result<Vec<u8>, Error> {
    let mut plane = PlaneWriter::new(HOST_PLANE, seen.start);
    let mut by_comm: BTreeMap<i64, Vec<&ProfiledOperation>> = BTreeMap::new();
    for operation in &seen.operations {
        by_comm.entry(operation.comm).or_default().push(operation);
    }
    let mut next_line = FIRST_LINE;
    for (number, mut operations) in by_comm {
        operations.sort_by_key(|one| one.time.start);
        let comm = communicator(number);
        let name = match operations.iter().find(|one| !one.comm_name.is_empty()) {
            Some(named) => named.comm_name.clone(),
            None => comm.map_or_else(|| format!("communicator {number}"), |c| c.name.to_owned()),
        };
        let ranks = comm.map(|comm| ranks_of(comm, rank));
        let mut lanes: Vec<(usize, u64)> = Vec::new();
        for operation in operations {
            // Events of a line must not overlap; those of several threads may.
            let free = lanes.iter().position(|lane| lane.1 <= operation.time.start);
            let lane = free.unwrap_or_else(|| {
                let also = match lanes.len() {
                    0 => String::new(),
                    others => format!(" ({})", others + 1),
                };
                let name = format!("MPI rank {rank}: {name}{also}");
                lanes.push((plane.line(next_line, name), 0));
                next_line += 1;
                lanes.len() - 1
            });
            lanes[lane].1 = operation.time.end;
            add(&mut plane, lanes[lane].0, operation, ranks.as_deref());
        }
    }
    let warnings = said_of_lost(seen.lost);
    let warnings = warnings.map(|said| format!("{}{said}", crate::error::PREFIX));
    plane
        .finish(warnings.into_iter().collect())
        .map_err(|error| Error::internal(format!("the profile cannot be serialized: {error}")))
}

/// The members in the world of a communicator of `rank`'s, in words.
fn ranks_of(comm: Communicator, rank: i32) -> String {
    match comm.members {
        [] if comm.size == 1 => rank.to_string(),
        [] => format!("0-{}", comm.size - 1),
        members => Ranks(members).to_string(),
    }
}

fn add(plane: &mut PlaneWriter, line: usize, operation: &ProfiledOperation, ranks: Option<&str>) {
    let Span { start, end } = operation.time;
    let waits = together(&operation.waits, operation.time);
    plane.event(
        line,
        Event {
            name: &name(operation),
            start,
            end,
            stats: stats(operation, &waits, ranks),
        },
    );
    let mut within = |name, Span { start, end }| {
        let stats = Vec::new();
        let event = Event {
            name,
            start,
            end,
            stats,
        };
        plane.event(line, event);
    };
    for wait in &waits {
        within("waiting", *wait);
    }
    if let Some(met) = operation.met.filter(|_| operation.kind.is_some()) {
        let start = waits.last().map_or(start, |wait| wait.end);
        let start = start.max(met.min(end)).max(operation.time.start);
        within("moving", Span { start, end });
    }
}

/// The waits of an operation, in order and within it.
fn together(waits: &[Span], time: Span) -> Vec<Span> {
    let mut merged: Vec<Span> = Vec::new();
    for wait in waits {
        let start = wait.start.clamp(time.start, time.end);
        let end = wait.end.clamp(start, time.end);
        match merged.last_mut() {
            Some(last) if start <= last.end.saturating_add(TOGETHER) => {
                last.end = last.end.max(end);
            }
            _ => merged.push(Span { start, end }),
        }
    }
    merged
}

/// Whose it is, and what: `mpi_cuda.allreduce`, `xla.all-reduce`.
fn name(operation: &ProfiledOperation) -> String {
    let Some(kind) = operation.kind else {
        return "xla.begin".into();
    };
    match operation.owner {
        Owner::User => format!("mpi_cuda.{}", kind.name()),
        Owner::Mpi4jax => format!("mpi4jax.{}", kind.name()),
        Owner::Xla => format!("xla.{}", hlo_name(kind)),
    }
}

/// The instruction of XLA's that is executed as that (`ffi/collectives.rs`).
fn hlo_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Allreduce => "all-reduce",
        Kind::Allgather => "all-gather",
        Kind::ReduceScatter => "reduce-scatter",
        Kind::Alltoall => "all-to-all",
        Kind::Bcast => "collective-broadcast",
        // Also a step of an all-to-all whose blocks are arrays of their own.
        Kind::Sendrecv => "collective-permute",
        other => other.name(),
    }
}

fn stats(
    operation: &ProfiledOperation,
    waits: &[Span],
    ranks: Option<&str>,
) -> Vec<(&'static str, Value)> {
    let mut stats = Vec::new();
    let number = |number: u64| Value::Number(number as i64);
    let mut elements = |of: Option<Elements>, names: [&'static str; 3]| {
        if let Some(of) = of {
            stats.push((names[0], number(of.bytes())));
            stats.push((names[1], number(of.count)));
            stats.push((names[2], Value::Text(of.dtype.name().to_owned())));
        }
    };
    let (first, second) = match (operation.operand, operation.result) {
        (None, only) | (only, None) => (only, None),
        (operand, result) => (operand, result.filter(|result| Some(*result) != operand)),
    };
    elements(first, ["bytes", "count", "dtype"]);
    elements(second, ["result_bytes", "result_count", "result_dtype"]);
    if operation.met.is_some() || !waits.is_empty() {
        let waited = waits.iter().map(|wait| wait.end - wait.start);
        stats.push(("waiting_ns", number(waited.sum())));
    }
    if let Some((rank, size)) = operation.comm_rank {
        if rank >= 0 {
            stats.push(("rank", Value::Number(rank.into())));
        }
        stats.push(("size", Value::Number(size.into())));
    }
    for (name, value) in [
        ("root", operation.root),
        ("send_tag", operation.dest.as_ref().map(|dest| dest.1)),
    ] {
        stats.extend(value.map(|value| (name, Value::Number(value.into()))));
    }
    let (source, recv_tag) = operation.source.clone().unzip();
    for (name, value) in [
        ("reduction", operation.reduction.map(str::to_owned)),
        ("ends", operation.ends.map(|kind| kind.name().to_owned())),
        ("dest", operation.dest.as_ref().map(|dest| dest.0.clone())),
        ("source", source),
        ("recv_tag", recv_tag),
        ("communicator", Some(operation.comm_name.clone())),
        ("ranks", ranks.map(str::to_owned)),
        ("program", Some(operation.program.clone())),
        ("line", Some(operation.location.clone())),
        ("collectives", Some(operation.summary.clone())),
        ("error", Some(operation.error.clone())),
    ] {
        let value = value.filter(|value| !value.is_empty());
        stats.extend(value.map(|value| (name, Value::Text(value))));
    }
    if !operation.ended {
        stats.push(("ended", Value::Text("not before the profile did".into())));
    }
    for (name, value) in [
        ("place", operation.position),
        ("launch", operation.launch.into()),
        ("thread", operation.thread.into()),
    ] {
        stats.push((name, number(value)));
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn span(start: u64, end: u64) -> Span {
        Span { start, end }
    }

    #[test]
    fn waits_for_one_rank_after_the_other_are_one() {
        let time = span(100, 900_000);
        let waits = [span(50, 1000), span(1500, 3000), span(800_000, 1_000_000)];
        let merged = together(&waits, time);
        assert_eq!(merged, [span(100, 3000), span(800_000, 900_000)]);
        assert_eq!(together(&[], time), []);
    }

    #[test]
    fn every_collective_of_xlas_has_its_name() {
        let targets = hlo_rewrite::targets();
        for kind in [
            Kind::Allreduce,
            Kind::Allgather,
            Kind::ReduceScatter,
            Kind::Alltoall,
            Kind::Bcast,
            Kind::Sendrecv,
        ] {
            let name = hlo_name(kind).replace('-', "_");
            assert!(targets.contains(&name.as_str()), "{name} of {targets:?}");
        }
    }
}
