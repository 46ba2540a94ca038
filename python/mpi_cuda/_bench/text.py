"""The tables: those of nccl-tests, with the ranks' latencies as OSU's benchmarks have them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpi_cuda._bench.operations import OPERATIONS
from mpi_cuda._bench.record import Result, Row

#: Units of the columns.
US, GB = "(us)", "(GB/s)"


def head(result: Result) -> str:
    """What was measured, and what was not."""
    about = result.about
    style = {
        "mpi": "its own operations",
        "native": "JAX's collectives in shard_map",
    }.get(about["style"], "its own operations")
    launch = {
        "loop": "in a jitted loop",
        "once": "one jitted call after the other, each waited for",
    }[about["launch"]]
    lines = [
        f"mpi_cuda bench: {about['ranks']} rank(s) on {about['nodes']} node(s), {about['mpi']}",
        f"{result.own}: {style} on {about['device']}, {launch}",
        f"time: the median of {about['repeat']} series, of which the slowest rank counts; best: "
        "the shortest",
        "min, median, max: over the ranks, of which each has its median",
    ]
    if about["ranks"] == 1:
        lines.append("one rank has no peer: nothing is sent; use mpirun -n 2")
    lines += [f"{name} is not measured: {why}" for name, why in result.absent.items()]
    return "\n".join(lines)


def table(name: str, result: Result) -> str:
    """That of one operation."""
    rows = [row for row in result.rows if row.problem.name == name]
    others = list(dict.fromkeys(one for row in rows for one in row.timings if one != result.own))
    operation = OPERATIONS[name]
    checked = any(timing.wrong is not None for row in rows for timing in row.timings.values())
    columns = [
        ("size", "(B)", 11),
        ("count", "(elements)", 11),
        ("type", "", 8),
        ("time", US, 9),
        ("best", US, 9),
        ("algbw", GB, 7),
        ("busbw", GB, 7),
        ("min", US, 9),
        ("median", US, 9),
        ("max", US, 9),
    ]
    columns += [("#wrong", "", 6)] if checked else []
    for other in others:
        columns += [(other, US, 9), ("ratio", "", 6)]
    lines = [
        f"{name}: size of {operation.size_of}; busbw = algbw * {operation.factor_words}",
        _line([column[0] for column in columns], columns),
        _line([column[1] for column in columns], columns),
    ]
    lines += [_line(list(_cells(row, result.own, others, checked)), columns) for row in rows]
    for other in others:
        wrong = sum(row.timings[other].wrong or 0 for row in rows if other in row.timings)
        if wrong:
            lines.append(f"  {wrong} elements of {other}'s results are wrong")
    return "\n".join(lines)


def _line(cells: list[str], columns: list[tuple[str, str, int]]) -> str:
    padded = (f"{cell:>{column[2]}}" for cell, column in zip(cells, columns, strict=True))
    return " ".join(padded).rstrip()


def _cells(row: Row, own: str, others: list[str], checked: bool) -> Iterator[str]:
    problem, timing = row.problem, row.timings[own]
    yield from (str(problem.size), str(problem.count), problem.dtype.name)
    yield from (microseconds(timing.time), microseconds(timing.best))
    yield from (f"{rate:.3f}" for rate in problem.rates(timing.time))
    by_rank = timing.by_rank
    for seconds in (min(by_rank), statistics.median(by_rank), max(by_rank)):
        yield microseconds(seconds)
    if checked:
        yield str(timing.wrong)
    for other in others:
        if other not in row.timings:
            yield from ("-", "-")
            continue
        seconds = row.timings[other].time
        yield microseconds(seconds)
        yield f"{timing.time / seconds:.2f}" if seconds else "-"


def microseconds(seconds: float) -> str:
    """With as many digits as there is room for."""
    value = seconds * 1e6
    return f"{value:.2f}" if value < 10000 else f"{value:.0f}"


def comparison(paths: list[Path], files: list[dict[str, Any]]) -> str:
    """Files side by side: times, bus bandwidths, and the times' ratio to the first file's."""
    names = [f"{path.stem}:{one['library']}" for path, one in zip(paths, files, strict=True)]
    rows: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for number, one in enumerate(files):
        for row in one["rows"]:
            own = row["libraries"].get(one["library"])
            if own is not None:
                rows.setdefault((row["operation"], row["size"]), {})[number] = own
    first = files[0]
    lines = [
        f"{first['ranks']} rank(s), {first['dtype']}, {first['launch']}; ratio: the time to that "
        f"of {names[0]}"
    ]
    before = None
    width = max(14, *(len(name) + 2 for name in names))
    for (operation, size), by_file in rows.items():
        if operation != before:
            columns = "".join(f"{name:>{width}}{'busbw':>9}{'ratio':>8}" for name in names)
            units = "".join(f"{US:>{width}}{GB:>9}{'':>8}" for _ in names)
            lines += ["", operation, f"{'size':>12}{columns}", f"{'(B)':>12}{units}"]
            before = operation
        cells = f"{size:>12}"
        for number in range(len(files)):
            shown, start = by_file.get(number), by_file.get(0)
            if shown is None:
                cells += f"{'-':>{width}}{'-':>9}{'-':>8}"
                continue
            ratio = f"{shown['time'] / start['time']:.2f}" if start and start["time"] else "-"
            cells += f"{microseconds(shown['time']):>{width}}{shown['busbw']:>9.3f}{ratio:>8}"
        lines.append(cells)
    return "\n".join(line.rstrip() for line in lines)
