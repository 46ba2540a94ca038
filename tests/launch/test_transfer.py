"""Which way data of a device go, and what ranks must agree on for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jobs import MPIS, job, on_one

TRANSFER = """if True:
    import jax, jax.numpy as jnp, mpi_cuda as m
    y, _ = m.allreduce(jnp.ones(5000), m.SUM)
    assert y[-1] == 2
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_direct_transfer_without_a_cuda_aware_mpi_is_refused(mpi: str) -> None:
    name = {"openmpi": "Open MPI", "mpich": "MPICH"}[mpi]
    asked = [{"MPI_CUDA_TRANSFER": "direct"}, {"MPI4JAX_USE_CUDA_MPI": "1"}]
    for variable in asked if mpi == "openmpi" else asked[:1]:
        result = job(mpi, TRANSFER, MPI_CUDA_PRETEND_DEVICE="1", **variable)
        assert result.returncode != 0
        assert "direct transfer was asked for" in result.stderr, result.stderr
        assert name in result.stderr and "MPI_CUDA_TRANSFER=staged" in result.stderr
        # Memory of the host reaches every MPI.
        assert job(mpi, TRANSFER, **variable).returncode == 0


def test_the_transfer_that_is_used_is_said() -> None:
    said = {"MPI_CUDA_PRETEND_DEVICE": "1", "MPI_CUDA_LOG": "info"}
    for variable, why in (
        ({}, "has no CUDA support"),
        ({"MPI_CUDA_TRANSFER": "staged", "MPI4JAX_USE_CUDA_MPI": "1"}, "as asked for"),
        ({"MPI4JAX_USE_CUDA_MPI": "yes"}, "as asked for"),
    ):
        result = job("openmpi", TRANSFER, **said, **variable)
        assert result.returncode == 0, result.stderr
        words = rf"rank 1: mpi_cuda: transfer staged \(.*{why}\)"
        assert re.search(words, result.stderr), result.stderr
        assert ("is not understood" in result.stderr) == ("yes" in variable.values())
    assert "transfer" not in job("openmpi", TRANSFER, MPI_CUDA_LOG="info").stderr


def test_an_old_name_of_a_variable_is_read_with_a_warning() -> None:
    device = {"MPI_CUDA_PRETEND_DEVICE": "1", "MPI_CUDA_LOG": "info"}
    result = job("openmpi", TRANSFER, **device, MPI_CUDA_OUTBOX="0")
    assert result.returncode == 0, result.stderr
    warning = "MPI_CUDA_OUTBOX is now called MPI_CUDA_SHM_RING"
    assert result.stderr.count(warning) == 1, result.stderr
    assert "shares memory" not in result.stderr
    assert "shares memory" in job("openmpi", TRANSFER, **device).stderr


PROBE = """if True:
    import os, runpy, sys
    # As who calls it without: JAX is imported with the package, before the probe can say.
    os.environ.pop("JAX_PLATFORMS", None)
    sys.argv[1:] = ["probe"]
    runpy.run_module("mpi_cuda", run_name="__main__")
"""


@on_one("mpich")
def test_a_probe_lets_auto_transfer_directly(mpi: str, tmp_path: Path) -> None:
    device = {
        "MPI_CUDA_PRETEND_DEVICE": "aware",
        "MPI_CUDA_PROBE_DIR": str(tmp_path),
        "MPI_CUDA_LOG": "info",
    }

    def transfer() -> str:
        result = job(mpi, TRANSFER, **device)
        assert result.returncode == 0, result.stderr
        return re.findall(r"rank 1: mpi_cuda: transfer (.*)", result.stderr)[0]

    assert transfer().startswith("staged (direct is not proven with")
    result = job(mpi, PROBE, **device)
    assert result.returncode == 0 and "the arrays as they are" in result.stdout, result.stderr
    assert transfer().startswith("direct (it was tried with")
    # As if the job had died in it: not used, and the next probe tries the next way.
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace("\narrays", "\ntrying arrays"))
    assert re.match("staged .* did not end; run the probe again", transfer())
    result = job(mpi, PROBE, **device)
    assert result.returncode == 0 and "as they are" not in result.stdout, result.stdout
    assert transfer().startswith("direct, through copies on the device (it was tried")
    file.write_text(file.read_text().replace("\ncopies", "\ntrying copies"))
    assert job(mpi, PROBE, **device).returncode == 1
    assert "each job that tried it died" in transfer()


def test_a_probe_needs_a_device(tmp_path: Path) -> None:
    result = job("openmpi", PROBE, MPI_CUDA_PROBE_DIR=str(tmp_path))
    assert result.returncode != 0 and "MPI_CUDA_DEVICE=cuda" in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_ranks_with_and_without_a_device_are_refused() -> None:
    code = (
        "import os\nif os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    os.environ['MPI_CUDA_PRETEND_DEVICE'] = '1'\n"
        "import jax; jax.devices()"
    )
    result = job("openmpi", code)
    assert result.returncode != 0
    assert re.search(r"MPI_CUDA_DEVICE.* is 1 on rank 1", result.stderr), result.stderr


def test_ranks_whose_transfers_differ_are_refused(tmp_path: Path) -> None:
    code = (
        "import os\nif os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    os.environ['MPI_CUDA_TRANSFER'] = 'staged'\n"
        "import jax; jax.devices()"
    )
    device = {"MPI_CUDA_PRETEND_DEVICE": "aware", "MPI_CUDA_PROBE_DIR": str(tmp_path)}
    result = job("openmpi", code, MPI_CUDA_TRANSFER="direct", **device)
    assert result.returncode != 0
    assert re.search(r"MPI_CUDA_TRANSFER.* is 1 on rank 1", result.stderr), result.stderr


@on_one("mpich")
def test_chunks_that_differ_between_ranks_are_refused(mpi: str) -> None:
    code = (
        "import os\nrank = os.environ.get('OMPI_COMM_WORLD_RANK') or os.environ['PMI_RANK']\n"
        "os.environ['MPI_CUDA_CHUNK_BYTES'] = str(4096 * (1 + int(rank)))\n"
        "import jax; jax.devices()"
    )
    result = job(mpi, code, MPI_CUDA_PRETEND_DEVICE="1")
    assert result.returncode != 0
    assert "MPI_CUDA_CHUNK_BYTES is 8192 on rank 1" in result.stderr, result.stderr
    assert job(mpi, code).returncode == 0
