"""Runs pytest on this rank: `mpirun -n N python tests/rank.py ARGUMENTS`.

All ranks run the same tests. Rank 0 reports; another rank shows its output only if it fails. A
failure ends the job at once, since the other ranks would wait for this one.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0")
RANKS = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or "1")


def main() -> int:
    # Stacks of a hang go to the real standard error (conftest.py), and so do the library's reports,
    # which would be lost with a rank that ends by its time limit.
    os.environ["TEST_STDERR"] = str(told_whole())
    os.environ.setdefault("MPI_CUDA_WARN_AFTER", "40")
    arguments = ["-x", "-q", "--color=no", "--capture=sys", "-p", "no:cacheprovider"]
    arguments += sys.argv[1:]
    output = io.StringIO()
    shown = contextlib.redirect_stdout(output) if RANK else contextlib.nullcontext()
    own = ["-p", "no:faulthandler"] if RANK else []
    # One line for all: JAX's programs say where they were made, and ranks share those that are the
    # same.
    with shown:
        status = pytest.main([*arguments, *own])
    if status and RANK:
        print(f"rank {RANK} failed:\n{output.getvalue()}", flush=True)
    return status


def told_whole() -> int:
    """Where the stacks of a hang are to be written. Another process reads them, adds where each
    thread is in the kernel, and ends this rank, once all ranks have written theirs."""
    rank, (read, write) = os.getpid(), os.pipe()
    if os.fork():
        os.close(read)
        return write
    os.close(write)
    stacks = b""
    while os.getppid() == rank:
        # Nothing more comes for a second: they are whole.
        if select.select([read], [], [], 1)[0] and (new := os.read(read, 1 << 16)):
            stacks += new
        elif stacks:
            os.write(2, b"rank %d\n%s%s\n" % (RANK, stacks, in_the_kernel(rank).encode()))
            time.sleep(RANKS - RANK)
            os.kill(rank, signal.SIGKILL)
            break
    os._exit(0)


def in_the_kernel(process: int) -> str:
    """A line for each thread: its name, its state, and the system call that it is in."""
    lines = []
    for thread in sorted(Path(f"/proc/{process}/task").iterdir()):
        with contextlib.suppress(OSError):
            name, state = (thread / "stat").read_text().partition("(")[2].rsplit(")", 1)
            call = (thread / "syscall").read_text().split()[:3]
            lines.append(f"thread {thread.name} {name}: {state[1]}, {' '.join(call)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
