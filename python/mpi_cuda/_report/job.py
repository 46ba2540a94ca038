"""The records of all ranks of a job: their clocks, and which operations belong together."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

from mpi_cuda._report.record import ALL_RANKS, Comm, Operation, Record, read

#: No rank returns from these before every rank has begun.
SYNCHRONOUS = frozenset({"allgather", "allreduce", "alltoall", "barrier", "reduce_scatter"})

CommKey = tuple[int, str]


@dataclasses.dataclass
class Matched:
    """A collective of several ranks: what each of them called at the same place."""

    comm: Comm
    position: int
    by_rank: dict[int, Operation]
    #: Ranks of the communicator that have a record.
    members: frozenset[int]

    @property
    def is_whole(self) -> bool:
        """Whether all have begun."""
        return self.by_rank.keys() == self.members

    @property
    def agrees(self) -> bool:
        """Whether all have called the same."""
        return len({operation.signature for operation in self.by_rank.values()}) == 1

    @property
    def synchronises(self) -> bool:
        """Whether the ranks waited for the last of them: by its nature, or as they measured."""
        operations = self.by_rank.values()
        return any(one.kind in SYNCHRONOUS or one.waited for one in operations)

    @property
    def last(self) -> Operation:
        """That of the rank that came last."""
        return max(self.by_rank.values(), key=lambda operation: operation.start)


@dataclasses.dataclass
class Job:
    """The records of a job."""

    records: dict[int, Record]
    #: Files that are none of this job's, and why.
    notes: list[str] = dataclasses.field(default_factory=list)
    #: Ranks whose records cannot be read, and why.
    broken: dict[int, str] = dataclasses.field(default_factory=dict)
    #: How far the clock of a node was set, and how far that may be wrong; seconds.
    clocks: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._world: dict[tuple[CommKey, int], int] = {}
        self.members: dict[CommKey, frozenset[int]] = {}
        seen: dict[CommKey, set[int]] = collections.defaultdict(set)
        sizes: dict[CommKey, int] = {}
        for operation in self.operations():
            comm = operation.comm
            seen[comm.key].add(operation.rank)
            sizes[comm.key] = comm.size
            self._world[comm.key, comm.rank] = operation.rank
        for key, ranks in seen.items():
            # All ranks take part in what has their number, whether they have called it or not.
            is_everybody = sizes[key] == self.size or key[0] in ALL_RANKS
            self.members[key] = frozenset(self.records if is_everybody else ranks)
        self.collectives = self._match()
        #: The first place that a rank still knows, by rank and communicator.
        self.oldest: dict[tuple[int, CommKey], int] = {}
        for operation in self.operations():
            if operation.collective:
                place = operation.rank, operation.comm.key
                before = self.oldest.get(place, operation.position)
                self.oldest[place] = min(before, operation.position)
        self.at = {(one.comm.key, one.position): one for one in self.collectives}
        self.messages = list(self._match_messages())
        self._fill_waiting()

    @property
    def size(self) -> int:
        """Number of ranks, with or without a record."""
        return max(record.size for record in self.records.values())

    @property
    def missing(self) -> list[int]:
        """Ranks without a record."""
        return [rank for rank in range(self.size) if rank not in self.records]

    def operations(self) -> Iterator[Operation]:
        """Of all ranks."""
        for record in self.records.values():
            yield from record.operations

    def world_rank(self, comm: Comm, rank: int | None) -> int | None:
        """The rank in the world of a rank of a communicator, if it is known."""
        if rank is None or comm.number in ALL_RANKS:
            return rank
        return self._world.get((comm.key, rank))

    def _match(self) -> list[Matched]:
        found: dict[tuple[CommKey, int], dict[int, Operation]] = collections.defaultdict(dict)
        for operation in self.operations():
            if operation.collective and operation.comm.is_shared and operation.position:
                found[operation.comm.key, operation.position][operation.rank] = operation
        matched = []
        for (key, position), by_rank in found.items():
            comm = next(iter(by_rank.values())).comm
            matched.append(Matched(comm, position, by_rank, self.members[key]))
        return sorted(matched, key=lambda one: min(o.start for o in one.by_rank.values()))

    def _fill_waiting(self) -> None:
        """What the ranks did not measure themselves: until the last had begun."""
        for matched in self.collectives:
            if not (matched.is_whole and matched.agrees):
                continue
            last = matched.last.start
            for operation in matched.by_rank.values():
                if operation.waited is None and operation.kind in SYNCHRONOUS:
                    until = last if operation.end is None else min(last, operation.end)
                    operation.waited = max(0.0, until - operation.start)
        for send, receive in self.messages:
            if receive.waited is None and receive.end is not None:
                until = min(send.start, receive.end)
                receive.waited = max(0.0, until - receive.start)

    def _match_messages(self) -> Iterator[tuple[Operation, Operation]]:
        """What was sent and where it was received, if nothing of either rank is forgotten."""
        # By communicator, sender and receiver; then by tag.
        sent: dict[tuple[object, ...], dict[int, collections.deque[Operation]]] = {}
        whole = [record for record in self.records.values() if record.is_whole]
        operations = [operation for record in whole for operation in record.operations]
        for operation in operations:
            if operation.starts_message and not operation.failed:
                to = self.world_rank(operation.comm, operation.peer)
                way = sent.setdefault((operation.comm.key, operation.rank, to), {})
                way.setdefault(operation.send_tag, collections.deque()).append(operation)
        for operation in operations:
            source = self.world_rank(operation.comm, operation.source)
            if not operation.ends_message or operation.failed or source is None:
                continue
            way = sent.get((operation.comm.key, source, operation.rank), {})
            waiting = [
                queue for tag, queue in way.items() if queue and operation.recv_tag in (None, tag)
            ]
            if waiting:
                yield min(waiting, key=lambda queue: queue[0].number).popleft(), operation


def load(folder: Path) -> Job:
    """Reads the records of a folder; of several jobs, the last.

    Raises:
      ValueError: there is none.
    """
    jobs: dict[int, dict[int, Record]] = collections.defaultdict(dict)
    notes = []
    broken: dict[int, str] = {}
    for path in sorted(folder.glob("*.record")):
        digits = path.stem.removeprefix("rank-")
        try:
            record = read(path)
            if digits.isdecimal() and int(digits) != record.rank:
                raise ValueError(f"it is broken: it says that it is of rank {record.rank}")
        except (OSError, ValueError) as error:
            notes.append(f"{path.name} cannot be read: {error}")
            if digits.isdecimal():
                broken[int(digits)] = str(error)
            continue
        jobs[record.job][record.rank] = record
    if not jobs:
        raise ValueError(
            f"no rank has left a record in {folder}: run the job with MPI_CUDA_RECORD_DIR={folder}"
            + "".join(f"; {note}" for note in notes)
        )
    last = max(jobs)
    others = sorted(rank for job, records in jobs.items() if job != last for rank in records)
    if others:
        notes.append(f"the records of {ranks(others)} are of an earlier job, and not looked at")
    records = dict(sorted(jobs[last].items()))
    clocks = align(records)
    return Job(records, notes, broken, clocks)


def align(records: dict[int, Record]) -> dict[str, tuple[float, float]]:
    """Sets the clocks of all nodes to that of the first rank's: how far each was set, and how far
    that may be wrong.

    A collective that synchronises says of two nodes: none of its ranks on the one has ended before
    a rank on the other has begun. That bounds how far their clocks are apart. A clock within the
    bounds is left alone; another is set to their middle.
    """
    reference = next(iter(records.values())).host
    starts: dict[tuple[object, ...], dict[str, tuple[float, float]]]
    starts = collections.defaultdict(dict)
    for record in records.values():
        for operation in record.operations:
            if operation.kind not in SYNCHRONOUS or not operation.comm.is_shared:
                continue
            place = (operation.comm.key, operation.position, operation.signature)
            end = operation.end if operation.end is not None else float("inf")
            before = starts[place].get(record.host, (float("-inf"), float("inf")))
            starts[place][record.host] = max(before[0], operation.start), min(before[1], end)
    clocks = {}
    for host in {record.host for record in records.values()} - {reference}:
        both = [one for one in starts.values() if host in one and reference in one]
        low = max((one[reference][0] - one[host][1] for one in both), default=float("-inf"))
        high = min((one[reference][1] - one[host][0] for one in both), default=float("inf"))
        shift = 0.0 if low <= 0 <= high else (low + high) / 2
        clocks[host] = shift, abs(high - low) / 2
    for record in records.values():
        if shift := clocks.get(record.host, (0.0, 0.0))[0]:
            record.shift(shift)
    return clocks


def ranks(numbers: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    numbers = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {words}" if len(numbers) == 1 else f"ranks {words}"
