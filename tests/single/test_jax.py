"""JAX on one rank, as on its CPU backend."""

from __future__ import annotations

import os
import subprocess
import sys

os.environ["JAX_PLATFORMS"] = "mpi_cuda"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpi_cuda as m
from mpi_cuda import notoken as nt

X = jnp.arange(6.0).reshape(2, 3)


def test_a_world_of_one() -> None:
    assert (jax.process_count(), jax.process_index(), len(jax.devices())) == (1, 0, 1)
    version = jax.devices()[0].client.platform_version
    # With "cuda" in it, JAX would take the backend for a GPU's.
    assert "MPI ranks" in version and "cuda" not in version.lower()


def test_transformations() -> None:
    np.testing.assert_allclose(jax.grad(lambda x: (x**3).sum())(X), 3 * X**2)
    np.testing.assert_allclose(jax.jit(jax.vmap(jnp.cumsum))(X), np.cumsum(X, 1))
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda i, c: c * 2, x))
    np.testing.assert_allclose(loop(X), X * 32)


def test_donation() -> None:
    x = jnp.ones(1000)
    y = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted() and float(y[0]) == 2


def test_random_numbers_and_fft() -> None:
    normal = jax.random.normal(jax.random.key(1), (1000,))
    assert abs(float(normal.mean())) < 0.2
    np.testing.assert_allclose(jnp.fft.fft(X), np.fft.fft(X), atol=1e-5)


@pytest.mark.parametrize("name", ["cholesky", "eigh", "svd", "qr", "inv", "det", "eigvals"])
def test_linear_algebra(name: str) -> None:
    matrix = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    matrix = matrix @ matrix.T + 5 * np.eye(5, dtype=np.float32)
    ours = jax.tree.leaves(getattr(jnp.linalg, name)(matrix))
    theirs = jax.tree.leaves(
        tuple(np.atleast_1d(getattr(np.linalg, name)(matrix)))
        if name in ("inv", "det", "cholesky")
        else tuple(getattr(np.linalg, name)(matrix))
    )
    if name == "eigvals":
        np.testing.assert_allclose(np.sort(ours[0].real), np.sort(theirs), rtol=1e-3)
    elif name in ("inv", "cholesky", "det"):
        np.testing.assert_allclose(ours[0], getattr(np.linalg, name)(matrix), rtol=1e-3, atol=1e-4)
    elif name == "eigh":
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-3)
    elif name == "svd":
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3)
    else:
        np.testing.assert_allclose(ours[0] @ ours[1], matrix, rtol=1e-3, atol=1e-4)


def test_operations_alone_in_the_world() -> None:
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(nt.allreduce(x, m.SUM), x)
    np.testing.assert_array_equal(nt.allgather(x), x[None])
    np.testing.assert_array_equal(nt.bcast(x, 0), x)
    np.testing.assert_array_equal(nt.sendrecv(x, x, 0, 0), x)
    nt.barrier()


def test_serialized_executables() -> None:
    from jax.experimental import serialize_executable

    compiled = jax.jit(lambda x: nt.allreduce(x * 2, m.SUM)).lower(X).compile()
    payload = serialize_executable.serialize(compiled)
    loaded = serialize_executable.deserialize_and_load(*payload)
    np.testing.assert_array_equal(loaded(X), X * 2)


def test_analyses() -> None:
    compiled = jax.jit(lambda x: x @ x.T).lower(X).compile()
    assert "dot" in compiled.as_text()
    assert compiled.memory_analysis().output_size_in_bytes == 16
    assert compiled.cost_analysis()["flops"] > 0


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MPI_CUDA", "JAX"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_installed_but_not_selected_changes_nothing() -> None:
    result = run(
        "import jax; print(jax.devices(), jax.default_backend()); "
        "print('mpi' in open('/proc/self/maps').read()); import sys; "
        "print([name for name in sys.modules if name.startswith('mpi_cuda.')])",
        JAX_PLATFORMS="cpu",
    )
    assert result.stdout == "[CpuDevice(id=0)] cpu\nFalse\n[]\n" and result.stderr == ""
    result = run("import jax; print(jax.devices()[0].client.platform_version)")
    assert "MPI ranks" not in result.stdout and result.returncode == 0


def test_selected_prints_nothing() -> None:
    code = "import jax; f = jax.jit(lambda x: x @ x.T + 1); f(jax.numpy.ones((9, 9)))"
    result = run(code, JAX_PLATFORMS="mpi_cuda")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_both_platforms() -> None:
    code = """if True:
        import jax, jax.numpy as jnp, numpy as np
        ours, cpu = jax.devices()[0], jax.devices("cpu")[0]
        assert "MPI ranks" in ours.client.platform_version
        assert "MPI ranks" not in cpu.client.platform_version
        for device in (ours, cpu):
            x = jax.device_put(np.eye(3, dtype=np.float32), device)
            print(float(jnp.linalg.eigh(x)[0].sum()))
            print(jax.pure_callback(lambda x: x + 1, jax.ShapeDtypeStruct((), x.dtype), x[0, 0]))
    """
    result = run(code, JAX_PLATFORMS="mpi_cuda,cpu")
    assert result.stdout == "3.0\n2.0\n3.0\n2.0\n", result.stderr


def test_backends_of_others_need_not_be_like_ours() -> None:
    code = """if True:
        import jax, jax._src.xla_bridge as bridge
        class Other:
            platform = "other"
            def device_count(self): return 1
            def process_index(self): return 0
            def devices(self): return ["one"]
            local_devices = devices
        bridge.register_backend_factory("other", Other, priority=1)
        jax.config.update("jax_platforms", "other,mpi_cuda")
        print(type(bridge.get_backend("other")).__name__, len(jax.devices("cpu")))
    """
    result = run(code, JAX_PLATFORMS="mpi_cuda")
    assert result.stdout == "Other 1\n", result.stderr


def test_log_info_says_what_was_found() -> None:
    result = run("import jax; jax.devices()", JAX_PLATFORMS="mpi_cuda", MPI_CUDA_LOG="info")
    for text in ("rank 0 of 1", "device cpu", "PJRT 0.", "Open MPI", "multiple"):
        assert text in result.stderr, result.stderr


def test_without_any_mpi(tmp_path) -> None:
    """No shim that loads: a world of size 1, in which collectives work."""
    code = """if True:
        import shutil, sys, mpi_cuda._library as library
        from pathlib import Path
        folder = Path(FOLDER)
        shutil.copy(library.LIBRARY, folder)
        library.LIBRARY = folder / library.LIBRARY.name
        import jax, jax.numpy as jnp, mpi_cuda as m
        print(m.allreduce(jnp.ones(2), m.SUM)[0], jax.process_count())
        print(m.sendrecv(jnp.ones(2), jnp.ones(2), m.PROC_NULL, m.PROC_NULL)[0])
        coming, _ = m.irecv(jnp.ones(2), m.PROC_NULL)
        print(m.wait(m.isend(jnp.ones(2), m.PROC_NULL)[0])[0], m.wait(coming)[0])
        try:
            m.send(jnp.ones(2), 0).block_until_ready()
        except Exception as error:
            print("needs an MPI" in str(error))
    """.replace("FOLDER", repr(str(tmp_path)))
    result = run(code, JAX_PLATFORMS="mpi_cuda", MPI_CUDA_LOG="info")
    assert result.stdout == "[1. 1.] 1\n[0. 0.]\nNone [0. 0.]\nTrue\n", result.stderr
    assert "MPI no MPI" in result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MPI_CUDA_TOPOLOGY", "flat", "it takes: global, local"),
        ("MPI_CUDA_WARN_AFTER", "soon", "it takes: 60, seconds"),
        ("MPI_CUDA_INNER_PLUGIN", "/nowhere.so", "is not a file"),
        ("MPI_CUDA_DEVICE", "cuda", "MPI_CUDA_DEVICE=cuda, but"),
        ("XLA_FLAGS", "--xla_no_such_flag=1", "xla_no_such_flag"),
        ("MPI_CUDA_PART_BYTES", "63", "it takes: 1073741824, bytes from 64"),
        ("MPI_CUDA_PRETEND_SIZE", "1025", "above the limit of 1024"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(variable, value, expected) -> None:
    result = run("import jax; jax.devices()", JAX_PLATFORMS="mpi_cuda", **{variable: value})
    assert result.returncode == 1
    assert expected in result.stderr, result.stderr
    assert variable == "MPI_CUDA_PRETEND_SIZE" or variable in result.stderr


def test_known_xla_flags_pass() -> None:
    result = run(
        "import jax; print(jax.numpy.ones(2) + 1)",
        JAX_PLATFORMS="mpi_cuda",
        XLA_FLAGS="--xla_cpu_enable_fast_math=false",
    )
    assert result.returncode == 0, result.stderr


def test_a_world_of_256_is_affordable() -> None:
    code = """if True:
        import time, jax
        start = time.perf_counter()
        count = len(jax.devices())
        seconds = time.perf_counter() - start
        threads = [l for l in open('/proc/self/status') if l.startswith('Threads')][0].split()[1]
        assert float(jax.jit(lambda x: x + 1)(1.0)) == 2
        print(count, threads, seconds)
    """
    result = run(code, JAX_PLATFORMS="mpi_cuda", MPI_CUDA_PRETEND_SIZE="256")
    assert result.returncode == 0, result.stderr
    count, threads, _seconds = result.stdout.split()
    assert int(count) == 256 and int(threads) < 600
