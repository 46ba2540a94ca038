"""What was measured, as JSON has it: written by `--json`, and read again by `--compare`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from mpi_cuda._bench.operations import Problem
from mpi_cuda._bench.plan import Refused
from mpi_cuda._bench.timing import Timing

#: Of the file.
VERSION = 1
#: What must be the same in files that are compared.
ALIKE = ("ranks", "dtype", "launch")


class Row(NamedTuple):
    """A problem, and each library's time."""

    problem: Problem
    timings: dict[str, Timing]


class Result(NamedTuple):
    """All of a job."""

    #: `mpi_cuda`, or what was measured alone.
    own: str
    #: What the job is like: `ranks`, `nodes`, `mpi`, `device`, `style`, `launch`, `dtype`,
    #: `repeat`, and the versions of `mpi_cuda` and `jax`.
    about: dict[str, Any]
    rows: list[Row]
    #: Libraries that were not measured, and why.
    absent: dict[str, str]

    @property
    def wrong(self) -> int:
        """Wrong elements of all libraries."""
        return sum(timing.wrong or 0 for row in self.rows for timing in row.timings.values())


def as_json(result: Result, status: int) -> dict[str, Any]:
    """For programs. Times are in seconds, bandwidths in GB/s (10^9 bytes)."""
    return {
        "bench": VERSION,
        "status": status,
        "library": result.own,
        **result.about,
        "absent": result.absent,
        "rows": [
            {
                "operation": row.problem.name,
                "size": row.problem.size,
                "count": row.problem.count,
                "libraries": {
                    name: _timing(row.problem, timing) for name, timing in row.timings.items()
                },
            }
            for row in result.rows
        ],
    }


def _timing(problem: Problem, timing: Timing) -> dict[str, Any]:
    algbw, busbw = problem.rates(timing.time)
    by_rank = timing.by_rank
    return {
        "time": timing.time,
        "best": timing.best,
        "algbw": algbw,
        "busbw": busbw,
        "min": min(by_rank),
        "median": statistics.median(by_rank),
        "max": max(by_rank),
        "operations_in_a_series": timing.times,
        "series_by_rank": timing.series,
        "wrong": timing.wrong,
    }


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """Files that can be compared.

    Raises:
      Refused: they are none of ours, or of jobs that differ.
    """
    found = []
    for path in paths:
        try:
            one = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise Refused(f"--compare {path}: {error}") from None
        if not isinstance(one, dict) or one.get("bench") != VERSION or not one.get("rows"):
            raise Refused(f"--compare {path} is no file that `bench --json` has written")
        found.append(one)
    for path, one in zip(paths[1:], found[1:], strict=True):
        for name in ALIKE:
            if one.get(name) != found[0].get(name):
                raise Refused(
                    f"--compare: {paths[0]} has {name} {found[0].get(name)}, and {path} "
                    f"{one.get(name)}: measure both alike"
                )
    return found
