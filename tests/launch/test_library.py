"""Which MPI library a job uses: the launcher's, another one that is named, and none."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from jobs import MPIS, job, on_one

#: Where Debian has them.
NAMES = {"openmpi": "libmpi.so.40", "mpich": "libmpich.so.12"}
HELLO = "import jax.numpy as jnp, mpi_cuda as m; m.allreduce(jnp.float32(1), m.SUM)"
#: The MPIs in this process, by their files.
BOTH = """if True:
    from pathlib import Path
    FIRST
    import jax.numpy as jnp, mpi_cuda as m
    m.allreduce(jnp.float32(1), m.SUM)
    from mpi4py import MPI
    assert MPI.COMM_WORLD.allreduce(1) == 2
    lines = Path("/proc/self/maps").read_text().split()
    names = {Path(line).name for line in lines if "/libmpi" in line and "mpi_cuda" not in line}
    print(*sorted(name for name in names if ".so.40" in name or ".so.12" in name))
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_the_launchers_library_is_taken(mpi: str) -> None:
    result = job(mpi, HELLO, MPI_CUDA_LOG="info")
    assert result.returncode == 0, result.stderr
    assert f"/{NAMES[mpi]}" in result.stderr and "the launcher's" in result.stderr, result.stderr


@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize("first", ["pass", "from mpi4py import MPI"], ids=["later", "first"])
def test_mpi4py_uses_the_same_library(mpi: str, first: str) -> None:
    result = job(mpi, BOTH.replace("FIRST", first))
    assert result.returncode == 0, result.stderr
    # Each rank names one file; MPIs mix parts of the ranks' lines.
    assert result.stdout.count("libmpi") == 2, result.stdout
    assert result.stdout.count(NAMES[mpi]) == 2, result.stdout


@on_one("mpich")
def test_a_library_by_name_that_is_not_there_is_refused(mpi: str) -> None:
    result = job(mpi, HELLO, MPI_CUDA_LIBMPI="/nowhere/libmpi.so")
    assert result.returncode != 0
    said = "tried /nowhere/libmpi.so, named by MPI_CUDA_LIBMPI ("
    assert said in result.stderr and "No such file" in result.stderr, result.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_a_wish_for_another_mpi_than_the_launchers_is_told(mpi: str) -> None:
    """Also where the library is asked again, as for mpi4py: what it has opened is no conflict."""
    other = "mpich" if mpi == "openmpi" else "openmpi"
    result = job(mpi, BOTH.replace("FIRST", "pass"), MPI_CUDA_MPI=other)
    assert result.returncode == 0, result.stderr
    assert f"MPI_CUDA_MPI={other} is not followed, since the launcher" in result.stderr


@pytest.mark.parametrize(("mpi", "value"), [("mpich", "openmpi"), ("openmpi", "bogus")])
def test_an_abi_of_mpi4pys_that_is_not_the_launchers(mpi: str, value: str) -> None:
    """It is told, and mpi4py, which would load another MPI, is refused."""
    result = job(mpi, HELLO, MPI4PY_MPIABI=value)
    assert result.returncode == 0, result.stderr
    assert f"MPI4PY_MPIABI={value} is not followed" in result.stderr, result.stderr
    result = job(mpi, "from mpi4py import MPI", MPI4PY_MPIABI=value)
    assert result.returncode != 0
    assert f"MPI4PY_MPIABI={value} " in result.stderr, result.stderr
    assert "and the MPI of this process is" in result.stderr, result.stderr


@pytest.mark.parametrize("variable", ["MPI_CUDA_MPI=mpi_abi", "MPI4PY_MPIABI=mpi-abi"])
def test_a_wish_for_an_abi_that_is_not_there_is_named(variable: str) -> None:
    name, value = variable.split("=")
    result = job("mpich", HELLO, **{name: value})
    if result.returncode == 0:
        pytest.skip("this MPI has the ABI of the standard")
    assert f"Unset {variable}, which allows this ABI alone" in result.stderr, result.stderr
    assert "the launcher's MPI" in result.stderr, result.stderr
    result = job(None, HELLO, MPI_CUDA_MPI="mpi_abi")
    assert "no launcher has started" in result.stderr and "er's MPI" not in result.stderr, result


def test_another_file_than_the_launchers_is_told(tmp_path: Path) -> None:
    other = tmp_path / NAMES["mpich"]
    shutil.copy(next(Path("/usr/lib").glob(f"*/{NAMES['mpich']}")), other)
    result = job("mpich", HELLO, MPI_CUDA_LIBMPI=str(other))
    assert result.returncode == 0, result.stderr
    said = re.search(r"launcher belongs to (\S+), and its ranks use (\S+):", result.stderr)
    assert said and said[1].endswith(NAMES["mpich"]) and said[2] == str(other), result.stderr


def test_a_library_that_is_no_mpi_is_refused() -> None:
    result = job("mpich", HELLO, MPI_CUDA_LIBMPI="libc.so.6")
    assert result.returncode != 0 and "it is no MPI library" in result.stderr, result.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_the_library_of_another_launcher_is_refused_with_both(mpi: str) -> None:
    other = NAMES["mpich" if mpi == "openmpi" else "openmpi"]
    result = job(mpi, HELLO, MPI_CUDA_LIBMPI=other)
    assert result.returncode != 0
    assert "start the job with the launcher of that MPI" in result.stderr, result.stderr
