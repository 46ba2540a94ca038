"""One timeline of all ranks, in the format that Perfetto and `chrome://tracing` open: a process for
each rank, a track for each communicator, arrows for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpi_cuda._report.job import Job
from mpi_cuda._report.record import Operation, Record

#: The track of launches; those of communicators come after it.
LAUNCHES = 0


def write(job: Job, path: Path) -> None:
    """Writes the timeline."""
    events = list(_events(job))
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))


def _events(job: Job) -> Iterator[dict[str, Any]]:
    starts = [one.start for one in job.operations()]
    starts += [one.time for record in job.records.values() for one in record.launches]
    origin = min(starts, default=0.0)
    keys = {one.comm.key: one.comm.name for one in job.operations()}
    tracks = {key: track for track, key in enumerate(keys, LAUNCHES + 1)}
    for record in job.records.values():
        yield from _names(record, {LAUNCHES: "launches", **dict(enumerate(keys.values(), 1))})
        for launch in record.launches:
            yield {
                **_event("i", f"launch {launch.program}", record.rank, LAUNCHES),
                "ts": (launch.time - origin) * 1e6,
                "s": "t",
                "args": {"launch": launch.ticket, "line": launch.location},
            }
        for operation in record.operations:
            yield from _slices(operation, tracks[operation.comm.key], origin, record.written)
    for number, (send, receive) in enumerate(job.messages):
        for phase, one, moment in (("s", send, send.start), ("f", receive, receive.end)):
            if moment is None:
                continue
            yield {
                **_event(phase, "message", one.rank, tracks[one.comm.key]),
                "ts": (moment - origin) * 1e6,
                "id": number,
                "cat": "message",
                "bp": "e",
            }


def _event(phase: str, name: str, rank: int, track: int) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": rank, "tid": track, "ts": 0, "dur": 0}


def _names(record: Record, tracks: dict[int, str]) -> Iterator[dict[str, Any]]:
    rank = record.rank
    name = f"rank {rank} ({record.host})"
    yield {**_event("M", "process_name", rank, 0), "args": {"name": name}}
    yield {**_event("M", "process_sort_index", rank, 0), "args": {"sort_index": rank}}
    for track, name in tracks.items():
        yield {**_event("M", "thread_name", rank, track), "args": {"name": name}}


def _slices(
    operation: Operation, track: int, origin: float, written: float
) -> Iterator[dict[str, Any]]:
    end = operation.end if operation.end is not None else max(written, operation.start)
    start, duration = (operation.start - origin) * 1e6, (end - operation.start) * 1e6
    yield {
        **_event("X", operation.kind, operation.rank, track),
        "ts": start,
        "dur": duration,
        "cat": "failed" if operation.failed else "operation",
        "args": {
            "what": str(operation),
            "bytes": operation.bytes,
            "place": operation.position,
            "launch": operation.launch,
            "program": operation.program,
            "line": operation.location,
            "thread": operation.thread,
            "ended": operation.end is not None,
            "text": operation.text,
        },
    }
    if operation.waited:
        yield {
            **_event("X", "waits for others", operation.rank, track),
            "ts": start,
            "dur": min(operation.waited * 1e6, duration),
            "cat": "waiting",
        }
