"""The report in words."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator

from mpi_cuda._report import findings
from mpi_cuda._report.job import Job, ranks
from mpi_cuda._report.record import Operation, Record

#: Rows of the table by operation.
ROWS = 20


def report(job: Job) -> str:
    """All of it."""
    parts = [_head, _divergence, _last_common, _at_the_end, _paces, _table]
    return "\n\n".join(text for part in parts if (text := "\n".join(part(job))))


def _head(job: Job) -> Iterator[str]:
    first = next(iter(job.records.values()))
    hosts = {record.host for record in job.records.values()}
    library, command = first.library.split(",")[0], " ".join(first.command.split())
    yield f"{job.size} ranks on {len(hosts)} node(s), {library}: {command[:80]}"
    if missing := [rank for rank in job.missing if rank not in job.broken]:
        yield f"{ranks(missing)} left no record here"
    yield from job.notes
    for host, (shift, doubt) in sorted(job.clocks.items()):
        if shift:
            yield (
                f"the clock of {host} was set by {seconds(shift)}, to within {seconds(doubt)}: no "
                "rank ends a collective before all have begun it"
            )
    forgotten = [record.rank for record in job.records.values() if not record.is_whole]
    if forgotten:
        some = job.records[forgotten[0]]
        yield (
            f"of {ranks(forgotten)} only the last operations are known (of rank {some.rank} "
            f"{len(some.operations)} of {some.total})"
        )


def _divergence(job: Job) -> Iterator[str]:
    found = findings.divergences(job)
    if not found:
        yield "no rank diverged: the collectives that the records have are the same on all ranks"
    for number, divergence in enumerate(found):
        matched = divergence.matched
        who = ranks(divergence.odd) if divergence.odd else "the ranks"
        also = "also" if number else "first"
        place = f"collective {matched.position} on {matched.comm.name}"
        yield f"{who} diverged {also} at {place}:"
        for rank, operation in divergence.called.items():
            yield f"  rank {rank}: {_called(job, divergence, rank, operation)}"


def _called(
    job: Job, divergence: findings.Divergence, rank: int, operation: Operation | None
) -> str:
    if operation is not None:
        ended = "" if operation.end is not None else ", and waits in it"
        failed = ", which failed" if operation.failed else ""
        return f"{operation}{_line(operation)}{failed}{ended}"
    key = divergence.matched.comm.key
    before = [one for one in job.records[rank].operations if one.collective and one.comm.key == key]
    if not before:
        return "has called none there"
    return f"never came there; its last was {before[-1].position}: {before[-1]}{_line(before[-1])}"


def _line(operation: Operation) -> str:
    program = f" in {operation.program}" if operation.program else ""
    return f"{program} ({operation.location})" if operation.location else program


def _last_common(job: Job) -> Iterator[str]:
    matched = findings.last_common(job)
    if matched is not None:
        one = matched.last
        yield (
            f"the last collective that all its ranks have ended: {one} {one.place}, at "
            f"{clock(one.end or one.start)}"
        )


def _at_the_end(job: Job) -> Iterator[str]:
    yield "at the end:"
    for rank in range(job.size):
        record = job.records.get(rank)
        if rank in job.broken and record is None:
            yield f"  the record of rank {rank} cannot be read: {job.broken[rank]}"
            continue
        if record is None:
            yield f"  rank {rank} left no record: it ended well, or on a node with another folder"
            continue
        yield f"  rank {rank} {_ending(record)}"
        for line in _doing(job, record):
            yield f"    {line}"
        for failed in [one for one in record.operations if one.failed][-1:]:
            yield f"    its last error: {failed.text}"
    circle = findings.circle(job)
    if circle:
        words = " waits for ".join(str(rank) for rank in [*circle, circle[0]])
        yield f"deadlock: {words}"


def _ending(record: Record) -> str:
    when = clock(record.written)
    if record.reason == "abort":
        why = f": {record.why}" if record.why else ""
        return f"ended the job with status {record.code} at {when}{why}"
    if record.reason == "signal":
        return f"was ended by {_signal_name(record.code)} at {when}"
    if record.reason == "end":
        return f"ended well at {when}"
    if _lives(record):
        return "is running"
    if record.reason == "request":
        return f"was asked for its record at {when}"
    return f"was killed, or ended without a word, after {when}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _lives(record: Record) -> bool:
    """Whether its process is there, if that can be seen from here."""
    if record.host != socket.gethostname():
        return False
    try:
        with open(f"/proc/{record.pid}/cmdline", "rb") as file:
            command = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return False
    return command[:300] == record.command


def _doing(job: Job, record: Record) -> Iterator[str]:
    running = [one for one in record.operations if one.end is None]
    for operation in running:
        others = findings.waits_for(job, operation)
        waits = f", waiting for {ranks(others)}" if others else ""
        yield f"for {seconds(record.written - operation.start)} in {operation}{waits}"
        yield f"  {operation.place}"
    if running:
        return
    if not record.operations:
        yield "had begun no operation"
        return
    last = max(record.operations, key=lambda one: one.end or 0)
    pause = record.written - (last.end or last.start)
    yield f"in no operation for {seconds(pause)}; the last was {last}"
    yield f"  {last.place}"
    later = [one for one in record.launches if one.time > (last.end or last.start)]
    if later:
        first = min(later, key=lambda one: one.time)
        line = f" ({first.location})" if first.location else ""
        yield f"{len(later)} launches had not begun, the first of {first.program}{line}"


def _paces(job: Job) -> Iterator[str]:
    paces = findings.paces(job)
    if not any(pace.of for pace in paces.values()):
        return
    yield "who was slow (collectives that synchronise; the slowest first):"
    yield "  rank  came last        the others waited for it  it waited itself"
    slowest = sorted(paces.items(), key=lambda item: -item[1].delayed)
    for rank, pace in slowest[:ROWS]:
        last = f"{pace.last} of {pace.of}"
        yield f"  {rank:4}  {last:15}  {seconds(pace.delayed):24}  {seconds(pace.waited)}"
    if len(slowest) > ROWS:
        yield f"  and {len(slowest) - ROWS} more"


def _table(job: Job) -> Iterator[str]:
    rows = findings.table(job)
    if not rows:
        return
    width = max(len(row.what) for row in rows[:ROWS])
    yield "by operation, all ranks together:"
    yield f"  {'':{width}}  {'count':>7}  {'bytes':>9}  {'time':>9}  {'mean':>9}  waiting  failed"
    for row in rows[:ROWS]:
        waiting = f"{row.waited / row.known:.0%}" if row.known else "?"
        times = f"{seconds(row.seconds):>9}  {seconds(row.seconds / row.count):>9}"
        yield (
            f"  {row.what:{width}}  {row.count:7}  {size(row.bytes):>9}  {times}  {waiting:>7}"
            f"  {row.failed or '':>6}"
        ).rstrip()
    if len(rows) > ROWS:
        yield f"  and {len(rows) - ROWS} more"


def clock(moment: float) -> str:
    """The time of day."""
    part = f"{moment % 1:.3f}"[1:]
    return time.strftime("%H:%M:%S", time.localtime(moment)) + (part if part[0] == "." else "")


def seconds(duration: float) -> str:
    """A duration, short."""
    size_ = abs(duration)
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if size_ >= unit:
            return f"{duration / unit:.3g} {name}" if size_ < 1000 * unit else f"{duration:.0f} s"
    return f"{duration * 1e9:.0f} ns"


def size(count: int) -> str:
    """A number of bytes, short."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"
