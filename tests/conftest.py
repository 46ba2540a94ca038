"""Every test has a time limit; a hang prints the stacks of all threads of every rank."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest

# What tests share says as much as they do when it fails.
pytest.register_assert_rewrite("collectives_support", "jobs")

LIMIT = float(os.environ.get("TEST_TIMEOUT", "90"))
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "not_on_gpu(reason): of what is different on GPUs")
    config.addinivalue_line(
        "markers", "rule: of a rule of JAX's, for derivatives or batches, whatever the MPI"
    )


@pytest.fixture(autouse=True)
def not_on_gpu(request: pytest.FixtureRequest) -> None:
    """Skips a test marked so where the ranks have GPUs."""
    marker = request.node.get_closest_marker("not_on_gpu")
    if marker is None:
        return
    from mpi_cuda import _library

    if _library.load().mpi_cuda_on_gpu():
        pytest.skip(marker.args[0])


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    stderr = int(os.environ.get("TEST_STDERR", "2"))
    # One rank after the other, since their lines would mix. Who reads them ends the job (rank.py).
    alone = stderr == 2
    faulthandler.dump_traceback_later(LIMIT + RANK, exit=alone, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
