"""What is known of the job: each rank's facts by subject, and what was found."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from mpi_cuda._doctor import cores, exchange, gpus, memory, mpi, network, plugin, software
from mpi_cuda._doctor.exchange import Exchange
from mpi_cuda._doctor.finding import Facts, Finding, of_error


class Subject(Protocol):
    """One file of this package each."""

    def collect(self, about: dict[str, str], /) -> Facts:
        """What this process knows, and the library says in `about`."""

    def describe(self, facts: Facts, /) -> Iterator[tuple[str, str]]:
        """Lines of the report: a label, and words. No label continues the line before."""

    def check(self, facts: Facts, /) -> Iterator[Finding]:
        """Findings of one rank."""


#: In the order of the report.
SUBJECTS: dict[str, Subject] = {
    "software": software,
    "plugin": plugin,
    "mpi": mpi,
    "network": network,
    "cores": cores,
    "memory": memory,
    "gpus": gpus,
}


class Job(NamedTuple):
    """One that runs, or one process that could not join."""

    #: Facts of each rank by subject.
    ranks: dict[int, dict[str, Facts]]
    exchange: Exchange | None = None
    #: Why this process has not joined.
    failure: str | None = None

    @property
    def hosts(self) -> list[str]:
        """The node of each rank."""
        return [facts["cores"]["host"] for facts in self.ranks.values()]

    def findings(self) -> list[Finding]:
        """Problems first; what several ranks say is said once."""
        by_words: dict[Finding, set[int]] = defaultdict(set)
        for rank, facts in self.ranks.items():
            for name, subject in SUBJECTS.items():
                for finding in subject.check(facts[name]):
                    by_words[finding].add(rank)
        merged = [one._replace(ranks=tuple(sorted(ranks))) for one, ranks in by_words.items()]
        if len(self.ranks) > 1:
            merged += cores.check_job({rank: one["cores"] for rank, one in self.ranks.items()})
            merged += gpus.check_job({rank: one["gpus"] for rank, one in self.ranks.items()})
        # Where ranks share cores, some wait for their turn whatever the MPI does.
        shared = any(one["cores"]["oversubscribed"] for one in self.ranks.values())
        if self.exchange is not None and not shared:
            merged += exchange.check(self.exchange)
        # Of all ranks nobody needs be named.
        everybody = len(self.ranks)
        merged = [one._replace(ranks=()) if len(one.ranks) == everybody else one for one in merged]
        # That of joining is among the facts of `mpi`.
        if self.failure and len(self.ranks) > 1:
            merged.append(of_error(self.failure))
        return sorted(merged, key=lambda finding: not finding.is_problem)


def collect(about: dict[str, str], mpi4py: Facts | None, failure: str | None) -> dict[str, Facts]:
    """Facts of this process by subject."""
    facts = {name: subject.collect(about) for name, subject in SUBJECTS.items()}
    facts["mpi"]["mpi4py"] = mpi4py
    facts["mpi"]["error"] = failure
    facts["mpi"]["pid"] = os.getpid()
    return facts
