"""A plugin of pytest: jaxDecomp's tests on ranks, in place of the eight devices of one process.

The first rank writes what became of each test into the file JAXDECOMP_OUTCOMES, a line for each:
"passed test_fft.py::TestFFTs::test_jax_fft[...]".
"""

from __future__ import annotations

import os
import sys


def of_launcher(*names: str) -> int:
    """What MPICH's launcher or Open MPI's says of this process."""
    return next(int(os.environ[name]) for name in names if name in os.environ)


rank = of_launcher("PMI_RANK", "OMPI_COMM_WORLD_RANK")
size = of_launcher("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
if os.environ["JAXDECOMP_BACKEND"] == "gloo":
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{29761 + size}", size, rank)
else:
    os.environ["JAX_PLATFORMS"] = "mpi_cuda"


def asserting(compare):
    """What fails where `compare` returns false."""

    def check(*arguments, **options):
        assert compare(*arguments, **options)

    return check


def pytest_sessionstart():
    # pytest loads conftest.py anew, whoever has imported it. It would ask for eight devices.
    conftest = sys.modules["conftest"]
    conftest.setup_done = True
    # They say whether it is so, and do not fail.
    for name in ("assert_allclose", "assert_array_equal"):
        setattr(conftest, name, asserting(getattr(conftest, name)))


def pytest_collection_finish():
    import jax

    print(f"{jax.device_count()} devices of {jax.devices()[0].platform}, {size} ranks")
    if jax.device_count() != size:
        raise SystemExit("the tests are not on a device for each rank")


def pytest_runtest_logreport(report):
    # A test that is skipped has no call, and one whose preparation fails neither.
    if rank == 0 and (report.when == "call" or report.outcome != "passed"):
        with open(os.environ["JAXDECOMP_OUTCOMES"], "a") as file:
            file.write(f"{report.outcome} {report.nodeid}\n")
