"""Names in `/dev/shm`: what a killed rank left is swept, and only that."""

from __future__ import annotations

import os
import re
import secrets
import time
from pathlib import Path

import pytest
from jobs import MPIS, in_turn, job, twice

FOLDER = Path("/dev/shm")


def left_behind(age: float = 3600, owner: int | None = None) -> Path:
    """A segment that no process holds."""
    path = FOLDER / f"mpi_cuda.{secrets.token_hex(8)}.0"
    path.touch(0o600)
    os.utime(path, (time.time() - age,) * 2)
    if owner is not None:
        os.chown(path, owner, -1)
    return path


@pytest.mark.parametrize("mpi", MPIS)
def test_the_next_start_sweeps_what_a_killed_rank_left(mpi: str) -> None:
    left, young = left_behind(), left_behind(age=0)
    others = left_behind(owner=65534) if os.geteuid() == 0 else None
    before = set(FOLDER.glob("mpi_cuda.*")) - {left}
    try:
        result = job(mpi, "import jax; jax.devices()")
        assert result.returncode == 0, result.stderr
        assert not left.exists() and young.exists()
        assert others is None or others.exists()
        # Other jobs of this machine may be starting; their names go too.
        deadline = time.monotonic() + 20
        while set(FOLDER.glob("mpi_cuda.*")) - before:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for path in filter(None, [young, others]):
            path.unlink()


ALLREDUCE = """if True:
    import resource, sys
    import jax, jax.numpy as jnp, mpi_cuda as m
    from mpi_cuda import notoken as nt
    jax.devices()
    rank, limit = m.COMM_WORLD.rank, sys.argv[1]
    x = jnp.arange(1000.0) + rank
    x.block_until_ready()
    step = jax.jit(lambda x: nt.allreduce(x, m.SUM)).lower(x).compile()
    # What Python loads at the first operation is loaded.
    jax.block_until_ready(nt.scan(x, m.SUM))
    if limit == "room" and rank == 0:
        # Python ignores the signal of this limit.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
    if limit == "files" and rank == 1:
        many = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, many[1]))
    for _ in range(3):
        y = step(x).block_until_ready()
    if limit == "files" and rank == 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, many)
    assert (y == 2 * jnp.arange(1000.0) + 1).all()
    print("right")
"""
BY = re.compile(r"allreduce of float32\[1000\].* done by (.*) in ")


@pytest.mark.parametrize(("mpi", "setting"), in_turn("1", "0"))
def test_what_executes_a_collective_is_logged(mpi: str, setting: str) -> None:
    result = job(mpi, ALLREDUCE, "", MPI_CUDA_LOG="debug", MPI_CUDA_SHM_COLLECTIVES=setting)
    assert result.returncode == 0 and twice("right", result), result.stderr
    found = BY.findall(result.stderr)
    assert len(found) == 6
    assert (set(found) == {"shared memory"}) == (setting == "1"), found


EXCHANGE = """if True:
    import sys
    import jax, jax.numpy as jnp, mpi_cuda as m
    from mpi_cuda import notoken as nt
    rank, length = m.COMM_WORLD.rank, int(sys.argv[1])
    x = jnp.arange(length) + rank
    assert (nt.sendrecv(x, x, 1 - rank, 1 - rank) == jnp.arange(length) + 1 - rank).all()
    print("right")
"""


@pytest.mark.parametrize(
    ("mpi", "setting", "length"), in_turn(("1", "4"), ("1", "5000"), ("0", "4"))
)
def test_what_sends_a_message_is_logged(mpi: str, setting: str, length: str) -> None:
    """Which way a short one goes depends on what is in its way, so the log names both."""
    result = job(mpi, EXCHANGE, length, MPI_CUDA_LOG="debug", MPI_CUDA_SHM_MESSAGES=setting)
    assert result.returncode == 0 and twice("right", result), result.stderr
    found = re.findall(r"sendrecv of .* done by (.*) in ", result.stderr)
    assert len(found) == 2
    is_short = setting == "1" and length == "4"
    assert all(("shared memory or" in by) == is_short for by in found), found


ALL = """if True:
    import jax.numpy as jnp, mpi_cuda as m
    from mpi_cuda import notoken as nt
    rank = m.COMM_WORLD.rank
    x = jnp.arange(200.0).reshape(2, 100)
    nt.barrier()
    for operation in [nt.allgather, nt.alltoall]:
        operation(x)
    for operation in [nt.bcast, nt.gather]:
        operation(x, 0)
    nt.scatter(x if rank == 0 else x[0], 0)
    nt.reduce(x, m.SUM, 0)
    nt.reduce_scatter(x, m.SUM)
    # MPI's own: another collective, another dtype, nothing at all, and what is faster there.
    nt.scan(x, m.SUM)
    nt.reduce(x.astype("int8"), m.SUM, 0)
    nt.allgather(x[:0])
    nt.bcast(x[0, :2], 0).block_until_ready()
    print("right")
"""
LINE = re.compile(r"launch \d+: (\w+(?: of \w+\[[\d,]*\])?).* done by (.*) in ")


@pytest.mark.parametrize("mpi", MPIS)
def test_what_goes_through_shared_memory(mpi: str) -> None:
    result = job(mpi, ALL, MPI_CUDA_LOG="debug")
    assert result.returncode == 0 and twice("right", result), result.stderr
    by = dict(LINE.findall(result.stderr))
    x = "of float32[2,100]"
    moved = {f"allgather {x}", f"alltoall {x}", f"bcast {x}", f"gather {x}", "barrier"}
    scattered = {name for name in by if name.startswith("scatter of")}
    reduced = {f"reduce {x}", f"reduce_scatter {x}"}
    shared = {name for name, found in by.items() if found == "shared memory"}
    assert shared == moved | scattered | reduced, by
    assert {f"scan {x}", "reduce of int8[2,100]", "allgather of float32[0,100]"} < set(by), by


@pytest.mark.parametrize(("mpi", "limit"), in_turn("room", "files"))
def test_a_rank_that_has_no_memory_for_collectives_takes_all_to_mpi(mpi: str, limit: str) -> None:
    result = job(mpi, ALLREDUCE, limit, MPI_CUDA_LOG="debug")
    assert result.returncode == 0 and twice("right", result), result.stderr
    found = BY.findall(result.stderr)
    assert len(found) == 6 and "shared memory" not in found, found
