"""Cores: which each rank may use, and how many threads XLA starts for them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping

from mpi_cuda._doctor import launched
from mpi_cuda._doctor.finding import Facts, Finding, note, problem

#: How launchers give each rank N cores of its own.
BIND = {
    "Open MPI's mpirun": "mpirun --map-by slot:PE=N --bind-to core",
    "srun": "srun -c N --cpu-bind=cores",
}
BIND_OTHERS = "mpirun -bind-to core:N"


def collect(about: dict[str, str]) -> Facts:
    """Facts of this process."""
    return {
        "host": launched.host(),
        "cores": sorted(os.sched_getaffinity(0)),
        "of": os.cpu_count(),
        "nproc": os.environ.get("NPROC"),
        "quota": _quota(),
        "launcher": "srun" if "SLURM_PROCID" in os.environ else about.get("launcher"),
        "oversubscribed": about.get("oversubscribed") == "1",
    }


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    """Lines of the report."""
    cores = facts["cores"]
    nproc = f", NPROC={facts['nproc']}" if facts["nproc"] else ""
    threads = f", XLA's threads: {facts['threads']}" if facts.get("threads") else ""
    quota = f", of which the cgroup gives {facts['quota']:g}" if facts["quota"] else ""
    yield "cores", f"{len(cores)} of {facts['of']} ({spans(cores)}){quota}{threads}{nproc}"


def check(facts: Facts) -> Iterator[Finding]:
    """Findings of one rank."""
    threads, cores = facts.get("threads") or 0, len(facts["cores"])
    if threads > cores:
        why = f"NPROC={facts['nproc']}" if facts["nproc"] else "it counts those of the node"
        yield note(
            f"XLA has {threads} threads, and the rank may use {cores} core(s) ({why})",
            f"set NPROC={cores}",
        )
    if facts["quota"] and facts["quota"] < cores:
        yield note(
            f"the rank sees {cores} cores, and its cgroup gives time for {facts['quota']:g}",
            f"set NPROC={max(1, int(facts['quota']))}, or give the container more",
        )


def check_job(ranks: Mapping[int, Facts]) -> Iterator[Finding]:
    """Findings of all ranks together."""
    nodes: dict[str, dict[int, Facts]] = defaultdict(dict)
    for rank, facts in ranks.items():
        nodes[facts["host"]][rank] = facts
    for host, here in nodes.items():
        yield from _check_node(host, here)


def _check_node(host: str, here: dict[int, Facts]) -> Iterator[Finding]:
    everything = {core for facts in here.values() for core in facts["cores"]}
    first = next(iter(here.values()))
    of, ranks = first["of"] or len(everything), tuple(here)
    bind = BIND.get(first["launcher"], BIND_OTHERS)
    own = f"let each have its own: {bind.replace('N', str(max(1, of // len(here))))}"
    if len(here) > len(everything):
        has_more = of > len(everything)
        free = f", and the node has {of}" if has_more else ""
        yield problem(
            f"{len(here)} ranks of {host} share {len(everything)} core(s){free}",
            own if has_more else "start fewer ranks",
            ranks,
        )
    elif sharing := _same_single_core(here):
        yield problem(
            f"{len(sharing)} ranks of {host} are bound to a core that another one is bound to too, "
            "and there are enough for all",
            own,
            sharing,
        )
    elif (threads := sum(map(_busy, here.values()))) > len(everything):
        each = len(everything) // len(here)
        yield note(
            f"the ranks of {host} share its {len(everything)} cores, and have {threads} threads of "
            "XLA's for them",
            f"let each have its own: {bind.replace('N', str(each))}, or set NPROC={each}",
            ranks,
        )


def _busy(facts: Facts) -> int:
    """As many of XLA's threads of a rank as can run at once."""
    return min(facts.get("threads") or 0, len(facts["cores"]))


def _same_single_core(here: dict[int, Facts]) -> tuple[int, ...]:
    """The ranks that share the one core that they have."""
    by_core: dict[int, list[int]] = defaultdict(list)
    for rank, facts in here.items():
        if len(facts["cores"]) == 1:
            by_core[facts["cores"][0]].append(rank)
    return tuple(rank for ranks in by_core.values() if len(ranks) > 1 for rank in ranks)


def spans(numbers: list[int]) -> str:
    """`0-3,8`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _quota() -> float | None:
    """The cores' worth of time that a container may use (cgroups(7)), if that is limited."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            limit, period = file.read().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None
