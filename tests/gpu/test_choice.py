"""Which device is taken and how it is shared, where a GPU is simulated (`scripts/test gpu`)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    "SIMULATED_GPU" not in os.environ, reason="it is for tests/gpu/simulator/run"
)

REPORT = """
import jax, os
own = jax.local_devices()[0]
limit = own.memory_stats()["bytes_limit"]
# At once, since ranks write into each other's lines.
os.write(1, f"platform {own.platform} of {len(jax.devices())} limit {limit}\\n".encode())
assert jax.devices("gpu") == jax.devices() and jax.devices("cpu")[0].platform == "cpu"
"""


def run(code: str, ranks: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    """`code` on so many ranks."""
    environment = {**os.environ, "JAX_PLATFORMS": "mpi_cuda", **variables}
    environment.pop("MPI_CUDA_RANK_PROCESS", None)
    launch = ["mpirun.openmpi", "-n", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [*launch, sys.executable, "-c", code],
        env=environment,
        text=True,
        capture_output=True,
        timeout=80,
    )


def test_auto_takes_the_gpu_and_says_why() -> None:
    done = run(REPORT, MPI_CUDA_DEVICE="auto", MPI_CUDA_LOG="info")
    assert done.returncode == 0, done.stderr
    assert "platform gpu of 1" in done.stdout
    assert "device cuda (" in done.stderr and "xla_cuda_plugin.so" in done.stderr


def test_auto_takes_the_cpu_where_no_device_is_left() -> None:
    done = run(
        "import jax; print(jax.local_devices()[0].platform)",
        MPI_CUDA_DEVICE="auto",
        MPI_CUDA_LOG="info",
        SIMULATOR_DEVICES="0",
    )
    assert done.stdout == "cpu\n", done.stderr
    assert "device cpu (" in done.stderr


@pytest.mark.parametrize("visible", [{}, {"SIMULATOR_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "1"}])
def test_ranks_share_a_gpu_and_say_so(visible: dict[str, str]) -> None:
    done = run(REPORT, 2, **visible)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("platform gpu of 2") == 2
    assert "2 ranks of this node share 1 GPU(s), so none takes its memory" in done.stderr


def test_each_rank_has_a_gpu_of_its_own_if_there_are_enough() -> None:
    done = run(REPORT, 2, SIMULATOR_DEVICES="2", MPI_CUDA_LOG="info")
    assert done.returncode == 0, done.stderr
    assert "share" not in done.stderr.replace("shares memory", "")
    for rank in range(2):
        assert f"rank {rank}: mpi_cuda: CUDA client with" in done.stderr
        assert f'("visible_devices", List([{rank}]))' in done.stderr


@pytest.mark.parametrize("fraction", ["0.25", "0.5"])
def test_jaxs_options_of_memory(fraction: str) -> None:
    done = run(REPORT, XLA_PYTHON_CLIENT_MEM_FRACTION=fraction, SIMULATOR_MEMORY=str(8 << 30))
    assert done.returncode == 0, done.stderr
    limit = int(done.stdout.split("limit ")[1].split()[0])
    assert limit == pytest.approx(float(fraction) * (8 << 30), rel=0.1)


def test_direct_transfer_is_refused_by_name() -> None:
    done = run("import jax; jax.devices()", 2, MPI_CUDA_TRANSFER="direct")
    assert done.returncode != 0
    assert "direct transfer was asked for" in done.stderr
    assert "Open MPI" in done.stderr and "has no CUDA support" in done.stderr
    assert "MPI_CUDA_TRANSFER=staged" in done.stderr


def test_auto_is_staged_where_mpi_knows_no_cuda() -> None:
    done = run("import jax; jax.devices()", 2, MPI_CUDA_TRANSFER="auto", MPI_CUDA_LOG="info")
    assert done.returncode == 0, done.stderr
    assert "transfer staged (" in done.stderr


def test_the_remedy_is_for_whoever_forgot_the_platform() -> None:
    code = "import mpi_cuda as m; from mpi_cuda import notoken as nt; nt.allreduce(1.0, m.SUM)"
    done = run(code, JAX_PLATFORMS="cpu")
    assert "compiled for cpu: start with JAX_PLATFORMS=mpi_cuda" in done.stderr


def test_operations_in_callbacks_are_refused_by_name() -> None:
    done = run("""if True:
        import jax, jax.numpy as jnp, numpy as np, mpi_cuda as m
        from mpi_cuda import notoken as nt
        x = jax.device_put(jnp.ones(3), jax.local_devices()[0])
        total = jax.jit(lambda x: nt.allreduce(x, m.SUM))
        total(x)
        def of(array):
            def callback(_):
                return np.asarray(total(array()))
            return jax.jit(lambda x: jax.pure_callback(callback, x, x))
        for call in (of(lambda: x), of(lambda: jnp.ones(3))):
            try:
                print(call(x))
            except Exception as error:
                print(str(error))
    """)
    assert "call operations outside of callbacks" in done.stdout, done.stdout + done.stderr
    assert "call no operation inside of a host callback" in done.stdout
