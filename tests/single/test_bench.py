"""The arithmetic, the command line and the tables of `python -m mpi_cuda bench`; no job runs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mpi_cuda as m
from mpi_cuda import _bench
from mpi_cuda._bench import gloo, operations, plan, plot, raw, record, text, timing
from mpi_cuda._bench.operations import OPERATIONS, Problem, problem
from mpi_cuda._bench.plan import Refused
from mpi_cuda._bench.record import Result, Row
from mpi_cuda._bench.timing import Timing

F32 = np.dtype(np.float32)
ABOUT = {"ranks": 4, "nodes": 1, "mpi": "MPI 4", "device": "cpu", "style": "mpi", "launch": "loop"}
ABOUT |= {"dtype": "float32", "repeat": 3}


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    _bench.add_arguments(parser)
    return parser.parse_args(words)


# nccl-tests' doc/PERFORMANCE.md: of 1 MiB in a millisecond on 4 ranks.
@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("allreduce", 1.5),
        ("allgather", 0.75),
        ("alltoall", 0.75),
        ("reduce_scatter", 0.75),
        ("gather", 0.75),
        ("scatter", 0.75),
        ("bcast", 1),
        ("reduce", 1),
        ("sendrecv", 1),
    ],
)
def test_bandwidths_are_those_of_nccl_tests(name: str, factor: float) -> None:
    algbw, busbw = problem(name, 1 << 20, F32, 4).rates(1e-3)
    assert algbw == pytest.approx((1 << 20) / 1e-3 / 1e9)
    assert busbw == pytest.approx(factor * algbw)
    assert set(OPERATIONS) >= {name} and len(OPERATIONS) == 9


def test_sizes_are_of_whole_arrays_and_counts_of_blocks() -> None:
    assert problem("allreduce", 1024, F32, 4).count == 256
    gathered = problem("allgather", 1024, F32, 4)
    assert (gathered.count, gathered.size) == (64, 1024)
    assert gathered.sent(1) == (64,) and gathered.got() == (4, 64)
    # Of three ranks each gets as much, and one element at least.
    odd = problem("alltoall", 1024, F32, 3)
    assert (odd.count, odd.size) == (85, 1020)
    assert problem("alltoall", 8, F32, 3).size == 12
    scattered = problem("scatter", 1024, F32, 4)
    assert (scattered.sent(0), scattered.sent(1), scattered.got()) == ((4, 64), (64,), (64,))


@pytest.mark.parametrize("ranks", [1, 3, 40])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_expected_is_what_numpy_makes_of_all_operands(name: str, ranks: int) -> None:
    one = Problem(name, 50, np.dtype(jnp.bfloat16), ranks)
    everybody = [one.operand(rank).astype(np.float64) for rank in range(ranks)]
    wanted: dict[str, Any] = {
        "allreduce": lambda rank: sum(everybody),
        "allgather": lambda rank: np.stack(everybody),
        "alltoall": lambda rank: np.stack([row[rank] for row in everybody]),
        "reduce_scatter": lambda rank: sum(row[rank] for row in everybody),
        "bcast": lambda rank: everybody[0],
        "reduce": lambda rank: None if rank else sum(everybody),
        "gather": lambda rank: None if rank else np.stack(everybody),
        "scatter": lambda rank: everybody[0][rank],
        "sendrecv": lambda rank: everybody[rank - 1],
    }
    for rank in {0, ranks // 2, ranks - 1}:
        expected, right = one.expected(rank), wanted[name](rank)
        assert (expected is None) == (right is None)
        if expected is not None:
            assert expected.shape == one.got() and expected.dtype == one.dtype
            np.testing.assert_array_equal(expected.astype(np.float64), right)
            assert one.wrong(rank, expected) == 0
            spoiled = expected.copy()
            spoiled.reshape(-1)[:2] += 1
            assert one.wrong(rank, spoiled) == 2
    # Ranks that were taken for each other are noticed.
    assert ranks == 1 or name in ("scatter",) or not np.array_equal(everybody[0], everybody[-1])


def test_a_command_line_is_read() -> None:
    words = "--operations allgather,bcast --min 4K --max 1MiB --factor 4 --dtype bfloat16 --check"
    wanted = plan.plan(arguments(*words.split(), "--against", "mpi,gloo"))
    assert wanted.operations == ("allgather", "bcast") and wanted.against == ("mpi", "gloo")
    assert wanted.sizes == (4096, 16384, 65536, 262144, 1048576)
    assert wanted.dtype.itemsize == 2 and wanted.check
    assert [one.size for one in wanted.problems("allgather", 3)][:2] == [4092, 16380]
    # Sizes that come to the same on so many ranks come once.
    few = plan.plan(arguments("--min", "8", "--max", "64", "--factor", "2"))
    assert [one.size for one in few.problems("alltoall", 16)] == [64]
    assert len(plan.plan(arguments()).operations) == 9
    assert plan.plan(arguments("--style", "native")).operations == (
        "allreduce",
        "allgather",
        "alltoall",
        "reduce_scatter",
        "sendrecv",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--operations allreduce,barrier", "--operations barrier is not measured: allreduce, "),
        ("--operations ,", "--operations names none"),
        ("--style native --operations bcast", "--style native has no bcast"),
        ("--min 6", "--min 6 is no multiple of 4 B, the size of float32"),
        ("--max 4097", "--max 4097 is no multiple of 4 B"),
        ("--min 1M --max 1K", "--min 1M is above --max 1K"),
        ("--min 0", "0 is no size: write bytes above 0, such as 8, 4K or 16M"),
        ("--max 4X", "4X is no size"),
        ("--factor 1", "--factor 1 is below 2"),
        ("--repeat 0", "--repeat 0 is below 1"),
        ("--iterations -1", "--iterations -1 is below 1"),
        ("--dtype float8", "--dtype float8 is not measured: float32, "),
        ("--against nccl", "--against nccl is not known: mpi, mpi4py, gloo are"),
        ("--against mpi4jax", "bench --compare ours.json theirs.json"),
        ("--only mpi4jax --against mpi", "--only mpi4jax measures that alone"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(words: str, said: str) -> None:
    with pytest.raises(Refused) as refusal:
        plan.plan(arguments(*words.split()))
    assert said in str(refusal.value)


def test_arrays_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_available", lambda: 24 << 20)
    wanted = plan.plan(arguments("--max", "4M", "--operations", "allreduce"))
    assert plan.why_not_memory(wanted, 2, 1) is None
    said = plan.why_not_memory(wanted, 2, 2)
    assert said is not None and "allreduce of 2 MiB needs about 16 MiB" in said, said
    assert "12 MiB are free for each of 2: pass a smaller --max" in said


def test_files_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    said = plan.why_not_files(arguments("--json", str(tmp_path / "no" / "a.json")))
    assert said == f"--json: No such file or directory: '{tmp_path}/no/a.json'"
    said = plan.why_not_files(arguments("--plot", str(tmp_path)))
    assert said == f"--plot: Is a directory: '{tmp_path}'"
    assert plan.why_not_files(arguments("--json", str(tmp_path / "a.json"))) is None


def test_mpi4jax_needs_the_cpu_and_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "set JAX_PLATFORMS=cpu" in (plan.why_not_mpi4jax("mpi_cuda") or "")
    assert "mpi4jax is not installed" in (plan.why_not_mpi4jax("cpu") or "")


def test_arrays_of_raw_mpi_begin_a_huge_page() -> None:
    found = raw.array((3, 1 << 19), F32)
    assert found.ctypes.data % raw.HUGE == 0 and found.shape == (3, 1 << 19) and not found.any()
    # Private memory, for which the kernel has noted the advice ("hg", proc(5)).
    lines = Path("/proc/self/smaps").read_text().splitlines()
    modes, inside = "", False
    for line in lines:
        if re.match("[0-9a-f]+-", line):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = start <= found.ctypes.data < end
            modes = line.split()[1] if inside else modes
        elif inside and line.startswith("VmFlags:"):
            assert modes == "rw-p" and "hg" in line.split(), (modes, line)
    assert modes


def test_mpi_itself_runs_and_refuses_by_name() -> None:
    # A job of one rank may be without MPI.
    assert m.COMM_WORLD.size == 1
    if why := raw.why_not_mpi(1):
        assert why == "there is no MPI in this job of one rank"
        return
    for name in OPERATIONS:
        runner = raw.Mpi(0).prepare(problem(name, 4096, F32, 1))
        assert runner.wrong() == 0 and 0 < runner.series(3) < 1
        runner.recv[...] = 0
        assert not runner.has_result or runner.problem.wrong(0, runner.recv)
    for name, dtype, said in (
        ("barrier", np.float32, "MPI's own barrier: barrier is not measured"),
        ("bcast", np.complex256, "MPI's own bcast: there is no dtype complex256"),
    ):
        arrays = raw.Mpi(0).prepare(problem("bcast", 64, np.dtype(dtype), 1))
        arrays.problem = dataclasses.replace(arrays.problem, name=name)
        with pytest.raises(RuntimeError, match=said):
            arrays.series(1)


def test_a_process_of_gloos_that_fails_is_told() -> None:
    said = gloo._run({"address": "127.0.0.1:1"})
    assert said == "its process ended with status 1: KeyError: 'rank'"


def test_children_of_gloo_have_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OMPI_COMM_WORLD_RANK",
        "PMI_RANK",
        "PMIX_RANK",
        "MPI_CUDA_DEVICE",
        "SLURM_NTASKS",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    own = gloo.environment()
    assert own["JAX_PLATFORMS"] == "cpu" and own["PYTHONPATH"].endswith(":/mine")
    assert not [name for name in own if "RANK" in name or name.startswith(("MPI_", "SLURM_"))]


class _Alone:
    """A job of one rank that notes its barriers."""

    rank, size = 0, 1

    def gather_numbers(self, own: list[float]) -> list[list[float]]:
        return [own]


class _Clock:
    """A library whose operations take as long as it is told."""

    name = "clock"

    def __init__(self, seconds: Iterator[float]) -> None:
        self.seconds, self.asked = seconds, []  # type: ignore[var-annotated]

    def has(self, name: str) -> bool:
        return name != "gather"

    def prepare(self, problem: Problem) -> _Clock:
        return self

    def series(self, times: int) -> float:
        self.asked.append(times)
        return next(self.seconds)

    def wrong(self) -> int:
        return 3


def test_the_time_is_the_median_of_series_that_count() -> None:
    # One, and others for their number; three that warm up; then those that count.
    single = [1e-3, 1, *[1e-4] * 9]
    how: dict[str, Any] = {"repeat": 3, "most": 700, "check": True}
    bcast = problem("bcast", 8, F32, 1)
    slow = _Clock(iter([*single, 5, 5, 5, 4e-5, 6e-5, 5e-5]))
    found = timing.measure([slow], bcast, _Alone(), **how)["clock"]
    # A series took so long that those after it are shorter.
    assert slow.asked == [1] * 11 + [100] + [1] * 3
    assert found.series == [[4e-5]] and found.wrong == 3
    assert timing.measure([slow], problem("gather", 8, F32, 1), _Alone(), **how) == {}
    # In a loop they are quicker than alone. That one waits for a core changes nothing.
    quick = _Clock(iter([*single, 1 / 51200, 5e-4, 2e-5, 4e-5, 6e-5, 5e-5]))
    how["check"] = False
    found = timing.measure([quick], bcast, _Alone(), **how)["clock"]
    assert quick.asked == [1] * 11 + [100] + [512] * 5
    assert found.time == 5e-5 and found.best == 4e-5 and found.wrong is None
    # Alone it took a launch to be begun.
    late = _Clock(iter([*[5e-2] * 3, 1 / 51200, *[2e-5] * 5]))
    timing.measure([late], bcast, _Alone(), **how)
    assert late.asked == [1] * 3 + [10] + [512] * 5
    # Of one that takes seconds there are few.
    long = _Clock(iter([2.0] * 6))
    found = timing.measure([long], bcast, _Alone(), **how)["clock"]
    assert long.asked == [1] * 6 and found.series == [[2.0]]


def test_the_slowest_rank_counts() -> None:
    one = Timing([[1.0, 2.0], [5.0, 3.0], [1.0, 9.0]], 10)
    assert one.time == 5.0 and one.best == 2.0 and one.by_rank == [1.0, 3.0]


def result(*names: str, wrong: int | None = 0) -> Result:
    rows = []
    for size in (8, 1 << 20):
        one = problem("allreduce", size, F32, 4)
        times = {
            name: Timing([[1e-6 * size * place] * 4] * 3, 7, wrong)
            for place, name in enumerate(names, 1)
        }
        rows.append(Row(one, times))
    return Result(names[0], ABOUT, rows, {})


def test_a_table_has_nccl_tests_columns_and_those_of_others() -> None:
    lines = text.table("allreduce", result("mpi_cuda", "mpi", wrong=2)).splitlines()
    columns = "size count type time best algbw busbw min median max #wrong mpi ratio"
    assert lines[1].split() == columns.split()
    cells = "8 2 float32 8.00 8.00 0.001 0.002 8.00 8.00 8.00 2 16.00 0.50"
    assert lines[3].split() == cells.split()
    assert lines[4].split()[3] == "1048576" and "2(n-1)/n" in lines[0]
    assert lines[5] == "  4 elements of mpi's results are wrong"
    unchecked = text.table("allreduce", result("mpi_cuda", wrong=None))
    assert "#wrong" not in unchecked and all(len(line) <= 100 for line in unchecked.splitlines())
    alone = Result("mpi_cuda", ABOUT | {"ranks": 1}, [], {"gloo": "it failed"})
    said = text.head(alone)
    assert "one rank has no peer" in said and "gloo is not measured: it failed" in said


def test_files_are_compared(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    ours.write_text(json.dumps(record.as_json(result("mpi_cuda"), 0)))
    other = record.as_json(result("first", "mpi4jax"), 0) | {"library": "mpi4jax"}
    other["rows"].pop()
    theirs.write_text(json.dumps(other))
    files = record.read([ours, theirs])
    assert files[0]["rows"][0]["libraries"]["mpi_cuda"]["busbw"] == pytest.approx(1.5e-3)
    lines = text.comparison([ours, theirs], files).splitlines()
    assert lines[3].split() == "size ours:mpi_cuda busbw ratio theirs:mpi4jax busbw ratio".split()
    assert lines[5].split() == "8 8.00 0.002 1.00 16.00 0.001 2.00".split()
    assert lines[6].split() == "1048576 1048576 0.002 1.00 - - -".split()
    theirs.write_text(json.dumps(other | {"ranks": 2}))
    with pytest.raises(Refused, match=r"has ranks 4, and .* 2: measure both alike"):
        record.read([ours, theirs])
    theirs.write_text("[]")
    with pytest.raises(Refused, match="is no file that `bench --json` has written"):
        record.read([theirs])
    with pytest.raises(Refused, match="No such file"):
        record.read([tmp_path / "none.json"])


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    plot.write(result("mpi_cuda", "mpi"), tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_every_operation_says_what_its_size_is() -> None:
    page = (next(p for p in Path(__file__).parents if (p / "versions.env").exists())) / "docs"
    said = (page / "bench.md").read_text()
    for name, row in operations.OPERATIONS.items():
        assert f"| `{name}` | {row.size_of} | `{row.factor_words}` |" in said, name
