"""Names in `/dev/shm`: what a killed rank left is swept, and only that."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import pytest
from jobs import MPIS, job

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
