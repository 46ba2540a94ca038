"""How a time is measured, and what becomes of the ranks' times.

There are several series of as many operations as fit into a hundredth of a second; one at least,
and `--iterations` at most. The ranks meet before each, in a barrier, and series of the libraries
that are compared alternate. Three series before them do not count: ranks that have just compiled
are not in step, and MPI maps memory of its own with the first messages. A series takes as long as
on the slowest rank. The time of an operation is the median of the series. Where they take long, as
on a machine that others use, there are fewer.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple, Protocol

from mpi_cuda._bench.operations import Problem

#: Seconds of a series.
BUDGET = 0.01
#: Series that do not count.
WARM_UP = 3
#: The most single operations that say how many a series has.
SINGLES = 10
#: Seconds for each library after which there are no more series of a size, but one at least.
MOST_SECONDS = 0.5


class Peers(Protocol):
    """The ranks of a job."""

    rank: int
    size: int

    def gather_numbers(self, own: list[float]) -> list[list[float]]:
        """What each rank passes; collective."""


class Runner(Protocol):
    """A problem that is ready to run; both are collective."""

    def series(self, times: int) -> float:
        """Runs so many operations; seconds of one on this rank."""

    def wrong(self) -> int:
        """Runs it once: how many elements of this rank's result are wrong."""


class Library(Protocol):
    """What is measured."""

    name: str

    def has(self, name: str) -> bool:
        """Whether it has that operation."""

    def prepare(self, problem: Problem, /) -> Runner:
        """Makes arrays, and compiles."""


class Timing(NamedTuple):
    """Of one library, in seconds for an operation."""

    #: By series and rank.
    series: list[list[float]]
    #: Operations in a series.
    times: int
    #: Wrong elements of all ranks; none if they were not looked at.
    wrong: int | None = None

    @property
    def time(self) -> float:
        """The median of the series, of which the slowest rank counts."""
        return statistics.median(map(max, self.series))

    @property
    def best(self) -> float:
        """The shortest series, which a busy machine disturbs least."""
        return min(map(max, self.series))

    @property
    def by_rank(self) -> list[float]:
        """Each rank's own median."""
        return [statistics.median(times) for times in zip(*self.series, strict=True)]


def measure(
    libraries: list[Library],
    problem: Problem,
    peers: Peers,
    *,
    repeat: int,
    most: int,
    check: bool,
) -> dict[str, Timing]:
    """Measures those that have the operation, in turn: so many series, of so many operations at
    most."""
    runners = {one.name: one.prepare(problem) for one in libraries if one.has(problem.name)}
    wrong = {
        name: sum(int(row[0]) for row in peers.gather_numbers([runner.wrong()])) if check else None
        for name, runner in runners.items()
    }
    found = {name: _Series(runner, peers, most) for name, runner in runners.items()}
    for _ in range(WARM_UP):
        for series in found.values():
            series.warm_up()
    for _ in range(repeat):
        for series in found.values():
            series.rows.append(series.run())
        # All ranks know the same.
        if sum(series.spent for series in found.values()) > MOST_SECONDS * len(found):
            break
    return {name: Timing(one.rows, one.times, wrong[name]) for name, one in found.items()}


class _Series:
    """Those of one library."""

    def __init__(self, runner: Runner, peers: Peers, most: int) -> None:
        self.runner, self.peers, self.most = runner, peers, most
        #: Seconds by series and rank.
        self.rows: list[list[float]] = []
        #: Seconds of all, on the slowest rank each.
        self.spent = 0.0
        self.times = 1
        slowest = max(self.run())
        # A rank that waits for a core for once, or gets its memory, says nothing of the operation.
        singles = max(1, min(SINGLES, int(10 * BUDGET / slowest))) if slowest > 0 else SINGLES
        own = min(runner.series(1) for _ in range(singles))
        alone = max(row[0] for row in peers.gather_numbers([own]))
        # A launch may cost more than the operation: a few of them say more.
        self._fit(min(alone, BUDGET / 10) if alone <= 10 * BUDGET else alone)
        #: The shortest series so far, for one operation on the slowest rank.
        self.shortest = math.inf

    def run(self) -> list[float]:
        """One, and what is a barrier to the next: the ranks tell each other their times."""
        own = self.runner.series(self.times)
        row = [one[0] for one in self.peers.gather_numbers([own])]
        self.spent += max(row) * self.times
        return row

    def warm_up(self) -> None:
        """One that does not count. From then on there are more operations if those of a series are
        quicker than single ones, and fewer if they are much slower."""
        slowest = max(self.run())
        is_first, self.shortest = self.shortest == math.inf, min(self.shortest, slowest)
        takes = self.times * self.shortest
        if takes < BUDGET / 2 or takes > (100 if is_first else 10) * BUDGET:
            self._fit(self.shortest)

    def _fit(self, seconds: float) -> None:
        """As many operations as a series has time for."""
        fits = int(BUDGET / seconds) if seconds > 0 else self.most
        self.times = max(1, min(self.most, fits))
