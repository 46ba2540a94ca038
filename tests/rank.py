"""Runs pytest on this rank: `mpirun -n N python tests/rank.py ARGUMENTS`.

All ranks run the same tests. Rank 0 reports; another rank shows its output only if it fails. A
failure ends the job at once, since the other ranks would wait for this one.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys

import pytest

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0")


def main() -> int:
    # Stacks of a hang go to the real standard error (conftest.py), and so do the library's reports,
    # which would be lost with a rank that ends by its time limit.
    os.environ["TEST_STDERR"] = str(os.dup(2))
    arguments = ["-x", "-q", "--color=no", "--capture=sys", "-p", "no:cacheprovider"]
    arguments += sys.argv[1:]
    if RANK == 0:
        return pytest.main(arguments)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = pytest.main([*arguments, "-p", "no:faulthandler"])
    if status:
        print(f"rank {RANK} failed:\n{output.getvalue()}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
