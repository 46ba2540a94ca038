"""What the records of a job say: where its ranks diverged, who was slow, who waits for whom."""

from __future__ import annotations

import collections
import dataclasses

from mpi_cuda._report.job import SYNCHRONOUS, Job, Matched
from mpi_cuda._report.record import NOBODY, Operation


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first place of a communicator where its ranks did not do the same."""

    matched: Matched
    #: What each rank called there; None where it had come to its end.
    called: dict[int, Operation | None]
    #: The ranks that differ from most, if most agree.
    odd: frozenset[int]

    @property
    def start(self) -> float:
        """When the first rank came there."""
        return min(one.start for one in self.called.values() if one)


def divergences(job: Job) -> list[Divergence]:
    """The first of each communicator, in the order of their times.

    A rank that never came to where others are counts too, unless they all have ended well there:
    then its record forgot it.
    """
    first: dict[object, Divergence] = {}
    for matched in sorted(job.collectives, key=lambda one: one.position):
        key = matched.comm.key
        if key in first or not _is_seen_by_all(job, matched):
            continue
        if matched.is_whole and matched.agrees:
            continue
        called = {rank: matched.by_rank.get(rank) for rank in sorted(matched.members)}
        if any(called.values()) and len(called) > 1:
            first[key] = Divergence(matched, called, _odd(called))
    return sorted(first.values(), key=lambda one: one.start)


def _is_seen_by_all(job: Job, matched: Matched) -> bool:
    """Whether the records of all ranks tell whether they came to this place."""
    come = matched.by_rank.values()
    everybody_came = any(
        one.kind in SYNCHRONOUS and one.end is not None and not one.failed for one in come
    )
    first = min(one.start for one in come)
    for rank in matched.members - matched.by_rank.keys():
        record = job.records[rank]
        oldest = job.oldest.get((rank, matched.comm.key))
        was_forgotten = not record.is_whole and (oldest is None or matched.position < oldest)
        # A rank that was killed may have written its record a little before.
        is_older = record.written < first
        if was_forgotten or is_older or everybody_came:
            return False
    return True


def _odd(called: dict[int, Operation | None]) -> frozenset[int]:
    """The ranks that differ from more than half of all."""
    what = {rank: operation and operation.signature for rank, operation in called.items()}
    most, count = collections.Counter(what.values()).most_common(1)[0]
    if 2 * count <= len(what):
        return frozenset()
    return frozenset(rank for rank, signature in what.items() if signature != most)


def last_common(job: Job) -> Matched | None:
    """The last collective that all ranks in it have ended well."""
    ended = [
        matched
        for matched in job.collectives
        if matched.is_whole
        and matched.agrees
        and len(matched.members) > 1
        and all(one.end is not None and not one.failed for one in matched.by_rank.values())
    ]
    return max(ended, key=lambda matched: matched.last.start, default=None)


@dataclasses.dataclass
class Pace:
    """How one rank kept up."""

    #: Collectives to which it came last, and of how many.
    last: int = 0
    of: int = 0
    #: Seconds that the others waited for it, each counted once for all of them.
    delayed: float = 0.0
    #: Seconds that it waited for others itself.
    waited: float = 0.0


def paces(job: Job) -> dict[int, Pace]:
    """How each rank kept up in the collectives that synchronise."""
    found = {rank: Pace() for rank in job.records}
    for matched in job.collectives:
        operations = list(matched.by_rank.values())
        if not (matched.is_whole and matched.agrees and matched.synchronises):
            continue
        if len(operations) < 2:
            continue
        *_, before, last = sorted(operations, key=lambda one: one.start)
        found[last.rank].last += 1
        found[last.rank].delayed += last.start - before.start
        for operation in operations:
            found[operation.rank].of += 1
    for operation in job.operations():
        found[operation.rank].waited += operation.waited or 0.0
    return found


@dataclasses.dataclass
class Row:
    """A row of the table by operation."""

    what: str
    count: int = 0
    bytes: int = 0
    seconds: float = 0.0
    #: Seconds of those whose waiting is known, and how much of it was waiting.
    known: float = 0.0
    waited: float = 0.0
    failed: int = 0


def table(job: Job) -> list[Row]:
    """All operations that have ended, by what they are; the longest first."""
    rows: dict[str, Row] = {}
    for operation in job.operations():
        if operation.end is None:
            continue
        what = "begin" if operation.kind == "begin" else operation.kind
        what += f" {operation.reduction}" if operation.reduction else ""
        what += f" {operation.dtype}" if operation.dtype else ""
        what += f" on {operation.comm.name}"
        row = rows.setdefault(what, Row(what))
        seconds = operation.end - operation.start
        row.count += 1
        row.bytes += operation.bytes
        row.seconds += seconds
        row.failed += operation.failed
        if operation.waited is not None:
            row.known += seconds
            row.waited += min(operation.waited, seconds)
    return sorted(rows.values(), key=lambda row: -row.seconds)


def waits_for(job: Job, operation: Operation) -> list[int]:
    """The ranks that an operation without an end waits for, as far as that is known.

    A rank that has called something else at this place will not come.
    """
    if operation.collective:
        members = job.members[operation.comm.key]
        everybody = operation.comm.size == job.size
        absent = set(job.missing) if everybody else set()
        matched = job.at.get((operation.comm.key, operation.position))
        begun = {
            one.rank
            for one in (matched.by_rank.values() if matched else [])
            if one.signature == operation.signature
        }
        return sorted((members | absent) - begun - {operation.rank})
    peer = operation.source if "receives" in operation.traits else operation.peer
    world = job.world_rank(operation.comm, peer)
    return [] if world is None or world == NOBODY else [world]


def circle(job: Job) -> list[int]:
    """Ranks that wait for each other in a circle, if there are such."""
    arrows = {
        record.rank: sorted({rank for one in record.operations for rank in _open(job, one)})
        for record in job.records.values()
    }
    for start in arrows:
        way = [start]
        while len(way) <= len(arrows):
            # A rank that waits for several waits for each of them.
            further = [rank for rank in arrows.get(way[-1], ()) if rank != way[-1]]
            if not further:
                break
            again = next((rank for rank in further if rank in way), None)
            if again is not None:
                return way[way.index(again) :]
            way.append(further[0])
    return []


def _open(job: Job, operation: Operation) -> list[int]:
    return waits_for(job, operation) if operation.end is None else []
