"""A rank's part of `orbax`: runs a file of Orbax' tests, as Orbax does, with pytest.

Arguments: the file, where rank N writes what it prints (with .N at the end), and perhaps --as-is.

Each rank removes the folder of a test at its end, which is the folder of the other rank too. Some
tests end with an error that a rank finds by reading there: a rank that comes late finds nothing,
has no error, and waits for the other one for ever. So folders stay, but with --as-is.
"""

from __future__ import annotations

import os
import socket
import sys

import jax
import pytest
from absl.testing import absltest

file, log, *options = sys.argv[1:]


def own_rank() -> int:
    if jax.config.jax_platforms == "cpu":
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        port = world.bcast(free_port() if world.rank == 0 else None)
        jax.distributed.initialize(f"localhost:{port}", world.size, world.rank)
    return jax.process_index()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    rank = own_rank()
    written = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    if "--as-is" not in options:
        absltest.TestCase.tempfile_cleanup = absltest.TempFileCleanup.OFF
    # A failure is seen in the log. It must not end the other rank.
    pytest.main(
        [
            *("-v", "--tb=short", "--color=no", "-p", "no:cacheprovider"),
            *("--import-mode=importlib", "-o", "faulthandler_timeout=60", file),
        ]
    )
