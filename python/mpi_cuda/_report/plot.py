"""A picture of who waited for whom over time: a row for each rank, coloured by the rank that it
waited for."""

from __future__ import annotations

import collections
import importlib.util
from pathlib import Path

from mpi_cuda._report import findings
from mpi_cuda._report.job import Job
from mpi_cuda._report.record import Operation


def write(job: Job, path: Path) -> None:
    """Draws the picture.

    Raises:
      ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    origin = min((one.start for one in job.operations()), default=0.0)
    height = min(20.0, 1.5 + 0.4 * job.size)
    figure, axes = pyplot.subplots(figsize=(12, height), layout="constrained")
    colours = matplotlib.colormaps["tab10"]
    waited_for = _waited_for(job)
    for rank, record in job.records.items():
        spans = [
            (one.start - origin, _end(job, one) - one.start)
            for one in record.operations
            if one.kind != "begin"
        ]
        axes.broken_barh(spans, (rank - 0.4, 0.8), color="0.85")
    bars = collections.defaultdict(list)
    for rank, (operation, start, duration) in waited_for:
        bars[operation.rank, rank % 10].append((start - origin, duration))
    for (row, colour), spans in bars.items():
        axes.broken_barh(spans, (row - 0.4, 0.8), color=colours(colour))
    shown = sorted({rank for rank, _ in waited_for})
    handles = [
        Patch(color=colours(rank % 10), label=f"waits for rank {rank}") for rank in shown[:10]
    ]
    handles.append(Patch(color="0.85", label="in an operation"))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_yticks(range(job.size) if job.size <= 64 else [0, job.size - 1])
    axes.set_ylim(job.size - 0.5, -0.5)
    axes.set_xlabel("seconds")
    axes.set_ylabel("rank")
    axes.set_title("who waited for whom")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def _end(job: Job, operation: Operation) -> float:
    written = job.records[operation.rank].written
    return operation.end if operation.end is not None else max(written, operation.start)


def _waited_for(job: Job) -> list[tuple[int, tuple[Operation, float, float]]]:
    """Whom each operation waited for, from when, and how long."""
    found = []
    for matched in job.collectives:
        for operation in matched.by_rank.values():
            if operation.end is None:
                continue
            last = matched.last
            if matched.is_whole and operation.waited and last is not operation:
                waited = min(operation.waited, operation.end - operation.start)
                found.append((last.rank, (operation, operation.start, waited)))
    for send, receive in job.messages:
        if receive.waited:
            found.append((send.rank, (receive, receive.start, receive.waited)))
    for operation in job.operations():
        if operation.end is None:
            for rank in findings.waits_for(job, operation)[:1]:
                span = _end(job, operation) - operation.start
                found.append((rank, (operation, operation.start, span)))
    return found
