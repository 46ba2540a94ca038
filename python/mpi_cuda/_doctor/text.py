"""The report in words."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator

from mpi_cuda._doctor.exchange import LARGE, SMALL, Exchange
from mpi_cuda._doctor.finding import Finding
from mpi_cuda._doctor.job import SUBJECTS, Job
from mpi_cuda._report.job import ranks
from mpi_cuda._report.text import seconds, size

#: The most ranks whose times are shown one by one.
MATRIX = 8
#: The most rows of other tables.
ROWS = 20


def report(job: Job, findings: list[Finding]) -> str:
    """All of it."""
    parts = [_head(job), _facts(job), map(line, findings) if findings else iter(["no problems"])]
    if job.exchange is not None:
        parts.append(_exchange(job.exchange))
    elif len(job.ranks) == 1 and not job.failure:
        parts.append(iter(["one rank has nobody to exchange messages with: use mpirun -n 2"]))
    return "\n\n".join(text for part in parts if (text := "\n".join(part)))


def line(finding: Finding) -> str:
    """One finding on one line."""
    kind = "problem" if finding.is_problem else "note"
    who = f"{ranks(finding.ranks)}: " if finding.ranks else ""
    remedy = f". Remedy: {finding.remedy}" if finding.remedy else ""
    return f"{kind}: {who}{finding.text}{remedy}"


def _head(job: Job) -> Iterator[str]:
    if job.failure and len(job.ranks) == 1:
        rank, host = next(iter(job.ranks)), job.hosts[0]
        yield f"mpi_cuda doctor: rank {rank} on {host} could not join the job"
        return
    nodes = len(set(job.hosts))
    yield f"mpi_cuda doctor: {len(job.ranks)} rank(s) on {nodes} node(s)"


def _facts(job: Job) -> Iterator[str]:
    """What all ranks that know it say alike is told once."""
    lines: dict[tuple[str, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, facts in job.ranks.items():
        for name, subject in SUBJECTS.items():
            label, continued = "", 0
            for own, words in subject.describe(facts[name]):
                label, continued = (own, 0) if own else (label, continued + 1)
                lines[label, continued][words].append(rank)
    for (label, continued), by_words in lines.items():
        shown = "" if continued else label
        for words, whose in by_words.items():
            who = f"{ranks(whose)}: " if len(by_words) > 1 else ""
            yield f"  {shown:14}{who}{words}"
            shown = ""


def _exchange(exchange: Exchange) -> Iterator[str]:
    yield f"messages of {SMALL} B, and of {size(LARGE)}, one at a time (medians, and the slowest):"
    yield from _by_node(exchange)
    count = len(exchange.hosts)
    if 2 < count <= MATRIX:
        small = [[seconds(time) for time in row] for row in exchange.small]
        large = [[_rate(time) for time in row] for row in exchange.large]
        for what, cells in ((f"{SMALL} B", small), (size(LARGE), large)):
            yield f"  {what} by rank:"
            yield "    " + "".join(f"{peer:>12}" for peer in range(count))
            for rank, row in enumerate(cells):
                shown = [cell if peer != rank else "-" for peer, cell in enumerate(row)]
                yield f"{rank:4}" + "".join(f"{cell:>12}" for cell in shown)
    elif count > MATRIX:
        yield "  the slowest pairs of ranks:"
        for low, high in sorted(exchange.pairs(), key=lambda p: -exchange.small[p[0]][p[1]])[:5]:
            yield f"    {low} and {high}: {seconds(exchange.small[low][high])} for {SMALL} B"
        for low, high in sorted(exchange.pairs(), key=lambda p: -exchange.large[p[0]][p[1]])[:5]:
            yield f"    {low} and {high}: {_rate(exchange.large[low][high])} for {size(LARGE)}"
    if exchange.program is not None:
        yield f"  a call of a compiled allreduce of 8 B from Python: {seconds(exchange.program)}"


def _by_node(exchange: Exchange) -> Iterator[str]:
    rows = []
    for (one, other), pairs in exchange.by_node().items():
        small = [exchange.small[low][high] for low, high in pairs]
        large = [exchange.large[low][high] for low, high in pairs]
        where = f"within {one}" if one == other else f"{one} and {other}"
        rows.append((where, len(pairs), small, large))
    if not rows:
        return
    width = max(len(row[0]) for row in rows)
    head = f"{'pairs':>6}  {f'{SMALL} B':>9}  {'slowest':>9}  {size(LARGE):>10}  {'slowest':>10}"
    yield f"  {'':{width}}  {head}"
    for where, count, small, large in sorted(rows, key=lambda row: -max(row[2]))[:ROWS]:
        yield (
            f"  {where:{width}}  {count:6}  {seconds(statistics.median(small)):>9}  "
            f"{seconds(max(small)):>9}  {_rate(statistics.median(large)):>10}  "
            f"{_rate(max(large)):>10}"
        )
    if len(rows) > ROWS:
        yield f"  and {len(rows) - ROWS} more, which are faster"


def _rate(time: float) -> str:
    if not time:
        return "-"
    rate = LARGE / time
    return f"{rate / 1e9:.3g} GB/s" if rate >= 1e8 else f"{rate / 1e6:.3g} MB/s"
