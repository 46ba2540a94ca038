"""What the ranks of a job leave in `MPI_CUDA_RECORD_DIR`, and what the report makes of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import environment, job, on_one, twice

from mpi_cuda._report import record

START = """if True:
    import os, signal, sys, time, jax, jax.numpy as jnp, mpi_cuda as m
    from mpi_cuda import notoken as nt
    rank, size = m.COMM_WORLD.rank, m.COMM_WORLD.size
    step = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    x = jnp.ones(3)
    for _ in range(4):
        x = step(x) / size
    x.block_until_ready()
"""
on_ranks = pytest.mark.parametrize(("mpi", "ranks"), [("openmpi", 2), ("mpich", 3)])


def lines(*own: str) -> str:
    """A program, whose first own line is number 10."""
    return START + "".join(f"    {line}\n" for line in own)


def report(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "mpi_cuda", "report", str(folder), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def reported(mpi: str, folder: Path, *own: str, ranks: int = 2) -> str:
    """What is reported of a job that fails."""
    result = job(mpi, lines(*own), ranks=ranks, MPI_CUDA_RECORD_DIR=str(folder))
    assert result.returncode != 0
    return report(folder)


def records(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def names(ranks: int) -> list[str]:
    return [f"rank-{rank:05}.record" for rank in range(ranks)]


def of_rank(text: str, rank: int) -> str:
    """What is said of a rank at the end."""
    end = text.split("at the end:")[1].split("\n\n")[0]
    return end.split(f"\n  rank {rank} ")[1].split("\n  rank ")[0]


@on_ranks
def test_a_rank_that_raises_and_one_that_waits(mpi: str, ranks: int, tmp_path: Path) -> None:
    code = lines(
        "if rank == 1:",
        "    raise ValueError('boom')",
        "nt.recv(x, 1).block_until_ready()",
    )
    result = job(mpi, code, ranks=ranks, MPI_CUDA_RECORD_DIR=str(tmp_path))
    assert result.returncode != 0
    assert records(tmp_path) == names(ranks)
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o600 for name in names(ranks))
    text = report(tmp_path)
    assert f"{ranks} ranks on 1 node(s)" in text and "no rank diverged" in text
    ending = of_rank(text, 1).splitlines()[0]
    assert "ended the job with status 1" in ending
    assert ending.endswith("ValueError: boom (<string>:11)"), text
    for rank in {*range(ranks)} - {1}:
        said = of_rank(text, rank)
        assert "in recv of 3 float32 from rank 1 with any tag, waiting for rank 1" in said, text
        assert "<string>:12" in said, text
    assert "last collective that all its ranks have ended: allreduce of 3 float32 with SUM" in text
    assert "(its collective 4), in jit__lambda" in text and "<string>:8" in text


@on_ranks
def test_a_segmentation_fault(mpi: str, ranks: int, tmp_path: Path) -> None:
    code = lines(
        "import ctypes, faulthandler",
        "faulthandler.enable()",
        "if rank == size - 1:",
        "    ctypes.string_at(0)",
        "step(x).block_until_ready()",
    )
    result = job(mpi, code, ranks=ranks, MPI_CUDA_RECORD_DIR=str(tmp_path))
    assert result.returncode != 0
    # Python's own handler has had the signal too.
    assert "Fatal Python error: Segmentation fault" in result.stderr
    text = report(tmp_path)
    assert "was ended by SIGSEGV" in of_rank(text, ranks - 1), text
    waiting = of_rank(text, 0)
    # It waits, or has been told that the other has died.
    assert f"rank {ranks - 1}" in waiting and "<string>:14" in waiting, text
    assert f"rank {ranks - 1}: never came there; its last was 4" in text


@on_one("mpich")
def test_a_rank_that_is_killed(mpi: str, tmp_path: Path) -> None:
    text = reported(
        mpi,
        tmp_path,
        "time.sleep(0.5)",
        "if rank == 1:",
        "    os.kill(os.getpid(), signal.SIGKILL)",
        "step(x).block_until_ready()",
    )
    assert "was killed, or ended without a word" in of_rank(text, 1), text
    assert "the last was allreduce of 3 float32 with SUM" in of_rank(text, 1)


@on_one("openmpi")
def test_the_end_of_an_operation_is_written_though_none_follows(mpi: str, tmp_path: Path) -> None:
    """The record is written while rank 1 waits in its last operation, and once more after it."""
    text = reported(
        mpi,
        tmp_path,
        "time.sleep(0.7 if rank == 0 else 0)",
        "step(x).block_until_ready()",
        "time.sleep(0.5)",
        "if rank == 1:",
        "    os.kill(os.getpid(), signal.SIGKILL)",
        "step(x).block_until_ready()",
    )
    assert "in no operation for" in of_rank(text, 1), text
    assert "(its collective 5)" in of_rank(text, 1), text


@on_ranks
def test_the_first_divergence_is_named(mpi: str, ranks: int, tmp_path: Path) -> None:
    """A reduction that differs; whoever refuses it, or nobody, the record has it."""
    text = reported(
        mpi,
        tmp_path,
        "y = nt.allreduce(x, m.MAX if rank == 1 else m.SUM)",
        "try: y.block_until_ready()",
        "except Exception: pass",
        "os.kill(os.getpid(), signal.SIGUSR1)",
        "time.sleep(0.3)",
        "os._exit(3)",
        ranks=ranks,
    )
    who = "rank 1" if ranks > 2 else "the ranks"
    place = "collective 5 on the default communicator"
    assert f"{who} diverged first at {place}:" in text, text
    assert "  rank 0: allreduce of 3 float32 with SUM" in text
    assert "  rank 1: allreduce of 3 float32 with MAX" in text
    assert "<string>:10" in text.split("rank 1: allreduce")[1].splitlines()[0]


@on_one("mpich")
def test_a_job_that_hangs_is_asked(mpi: str, tmp_path: Path) -> None:
    """By SIGUSR1; and the file is there anyway."""
    code = lines(
        "if rank == 0:",
        "    request, token = m.irecv(x, 1, tag=9)",
        "    m.wait(request, token=token)[0].block_until_ready()",
        "if rank == 1:",
        "    nt.recv(x, 2).block_until_ready()",
        "time.sleep(60)",
    )
    process = subprocess.Popen(
        [f"mpirun.{mpi}", "-n", "3", sys.executable, "-c", code],
        env=environment(MPI_CUDA_RECORD_DIR=str(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not all((tmp_path / name).exists() for name in names(3)):
            time.sleep(0.1)
        time.sleep(4)
        # What the rank would write without the signal, it writes every 2 s.
        asked = [0, 0, 0]
        for _ in range(5):
            for rank, name in enumerate(names(3)):
                before = (tmp_path / name).stat().st_mtime
                os.kill(record.read(tmp_path / name).pid, signal.SIGUSR1)
                time.sleep(0.1)
                asked[rank] += (tmp_path / name).stat().st_mtime > before
        text = report(tmp_path)
    finally:
        process.kill()
        process.wait()
    assert "is running" in of_rank(text, 0), text
    assert "in wait of 3 float32 from rank 1 with tag 9, waiting for rank 1" in of_rank(text, 0)
    assert "in recv of 3 float32 from rank 2 with any tag" in of_rank(text, 1)
    assert "in no operation for" in of_rank(text, 2)
    assert asked == [5, 5, 5]


@on_one("mpich")
def test_a_deadlock_that_ends_the_job(mpi: str, tmp_path: Path) -> None:
    waits = "nt.recv(x, (rank + 1) % size).block_until_ready()"
    text = reported(mpi, tmp_path, waits, ranks=3)
    assert re.search(r"ended the job with status \d+ at [\d:.]+: deadlock: ", text), text
    assert "\ndeadlock: 0 waits for 1 waits for 2 waits for 0" in text, text


@on_one("mpich")
def test_a_job_that_ends_well_leaves_what_it_was_asked_to(mpi: str, tmp_path: Path) -> None:
    own = tmp_path / "own.record"
    code = lines(f"if rank == 0: m.write_record({str(own)!r})")
    folder = tmp_path / "folder"
    assert job(mpi, code, MPI_CUDA_RECORD_DIR=str(folder)).returncode == 0
    assert records(folder) == [] and own.stat().st_size == 1 << 18
    own.unlink()
    keep = {"MPI_CUDA_RECORD_DIR": str(folder), "MPI_CUDA_RECORD": "always"}
    assert job(mpi, lines("m.notoken.barrier()"), **keep).returncode == 0
    text = report(folder)
    assert "ended well" in of_rank(text, 0) and "ended well" in of_rank(text, 1)
    assert "allreduce SUM float32 on the default communicator" in text
    # Nobody asked.
    assert job(mpi, lines()).returncode == 0
    error = job(mpi, lines("m.write_record()"))
    assert error.returncode != 0 and "MPI_CUDA_RECORD_DIR" in error.stderr


NATIVE = lines(
    "import numpy as np",
    "from jax.sharding import Mesh, NamedSharding, PartitionSpec as P",
    "rows = NamedSharding(Mesh(np.array(jax.devices()), 'i'), P('i'))",
    "x = jax.make_array_from_callback((12,), rows, lambda _: np.ones(12 // size, np.float32))",
    "total = jax.jit(lambda x: x.sum())",
    "for _ in range(5):",
    "    time.sleep(0.2 * (rank == 1))",
    "    total(x).block_until_ready()",
    "    if rank == 0: nt.send(jnp.ones(4), 1, tag=3)",
    "    if rank == 1: nt.recv(jnp.ones(4), 0, tag=3)",
    "nt.barrier()",
)


@on_ranks
def test_a_timeline_and_a_picture(mpi: str, ranks: int, tmp_path: Path) -> None:
    folder, trace, plot = tmp_path / "records", tmp_path / "trace.json", tmp_path / "plot.png"
    keep = {"MPI_CUDA_RECORD_DIR": str(folder), "MPI_CUDA_RECORD": "always"}
    result = job(mpi, NATIVE, ranks=ranks, **keep)
    assert result.returncode == 0, result.stderr
    text = report(folder, "--trace", str(trace), "--plot", str(plot))
    assert "no rank diverged" in text
    assert "begin on all ranks" in text
    assert f"allreduce SUM float32 on the ranks 0-{ranks - 1}" in text
    slowest = text.split("who was slow")[1].splitlines()[2].split()
    assert slowest[0] == "1" and int(slowest[1]) >= 4, text
    assert plot.read_bytes().startswith(b"\x89PNG")
    events = json.loads(trace.read_text())["traceEvents"]
    for event in events:
        assert event["ts"] >= 0 and event["dur"] >= 0, event
        assert event["pid"] in range(ranks) and isinstance(event["tid"], int), event
    slices = [event for event in events if event["ph"] == "X"]
    kinds = {event["name"] for event in slices}
    assert {"allreduce", "begin", "send", "recv", "barrier", "waits for others"} <= kinds
    assert any("<string>:17" in event.get("args", {}).get("line", "") for event in slices)
    arrows = [event["id"] for event in events if event["ph"] in "sf"]
    assert len(arrows) == 10 and len(set(arrows)) == 5


def test_the_file_is_whole_from_the_start(tmp_path: Path) -> None:
    code = """if True:
        import os, mpi_cuda as m
        m.COMM_WORLD.rank
        os._exit(3)
    """
    job(None, code, MPI_CUDA_RECORD_DIR=str(tmp_path))
    text = report(tmp_path)
    assert "was killed, or ended without a word" in of_rank(text, 0)
    assert "had begun no operation" in of_rank(text, 0)


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = job("mpich", lines("print('done')"), MPI_CUDA_RECORD_DIR=str(tmp_path / "file"))
    assert result.returncode == 0 and twice("done", result)
    assert "no record is written, since MPI_CUDA_RECORD_DIR=" in result.stderr


def test_nothing_to_report(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mpi_cuda", "report", str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1 and "no rank has left a record in" in result.stderr
