"""What is in the installed wheel, and what is said where something is missing; run by
`tests/wheel/run`, in the environment that it makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points, files, metadata
from pathlib import Path

import pytest

MPI = os.environ["WHEEL_MPI"]
SITE = Path(next(path for path in sys.path if path.endswith("site-packages")))
PREFIX = str(Path(sys.prefix).resolve())
HELLO = "import jax.numpy as jnp, mpi_cuda as m; print(m.allreduce(jnp.float32(1), m.SUM)[0])"


def ranks(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [f"mpirun.{MPI}", "-n", "2", sys.executable, "-c", code]
    env = os.environ | variables
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=80)


@contextmanager
def without(path: Path) -> Iterator[None]:
    """As if a file or folder of the environment had not been installed."""
    away = path.with_name(f"{path.name}.away")
    path.rename(away)
    try:
        yield
    finally:
        away.rename(path)


def test_what_is_installed_alone() -> None:
    names = {str(file) for file in files("mpi_cuda") or []}
    modules = {"mpi_cuda_plugin.py", "mpi_cuda_startup.py", "mpi_cuda_torch.py"}
    assert modules | {"mpi_cuda_startup.pth"} <= names
    libraries = {name for name in names if ".so" in name}
    shims = {f"mpi_cuda/lib/libmpi_cuda_shim_{abi}.so" for abi in ("openmpi", "mpich", "mpi_abi")}
    assert libraries == shims | {
        "mpi_cuda/lib/libpjrt_mpi_cuda.so",
        "mpi_cuda/lib/mpi4py/libmpi.so.12",
    }
    for package in ("", "_bridge/", "_jax_patches/", "_report/", "experimental/"):
        assert f"mpi_cuda/{package}__init__.py" in names, package
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert metadata("mpi_cuda")["License-Expression"] == "Apache-2.0"
    found = [point.value for point in entry_points(group="jax_plugins", name="mpi_cuda")]
    assert found == ["mpi_cuda_plugin"]
    extras = set(metadata("mpi_cuda").get_all("Provides-Extra") or [])
    assert extras >= {"cpu", "cuda12", "cuda13", "mpi4py", "openmpi", "mpich"}


@pytest.mark.parametrize("mpi", [MPI])
def test_everything_is_of_the_environment(mpi: str) -> None:
    code = f"""if True:
        {HELLO}
        from mpi4py import MPI
        assert MPI.COMM_WORLD.allreduce(1) == 2
        maps = set(open("/proc/self/maps").read().split())
        named = [file for file in maps if "mpi" in file.rpartition("/")[2] and ".so" in file]
        print(*("foreign:" + file for file in named if not file.startswith({PREFIX!r})))
    """
    result = ranks(code, MPI_CUDA_LOG="info")
    assert result.returncode == 0, result.stderr
    # Lines of two ranks may run into each other.
    assert result.stdout.count("2.0") == 2, result.stdout
    assert "the launcher's" in result.stderr, result.stderr


@pytest.mark.parametrize("mpi", [MPI])
def test_a_missing_shim_is_named(mpi: str) -> None:
    name = f"libmpi_cuda_shim_{mpi}.so"
    with without(SITE / "mpi_cuda" / "lib" / name):
        result = ranks(HELLO)
    assert result.returncode != 0
    assert name in result.stderr and "install mpi_cuda again" in result.stderr, result.stderr


@pytest.mark.parametrize("mpi", [MPI])
def test_jax_without_a_cpu_plugin_is_told_which_wheel(mpi: str) -> None:
    with without(SITE / "xla_plugins"):
        result = ranks(HELLO)
    assert result.returncode != 0
    assert "or xla-cpu-pjrt, or set MPI_CUDA_INNER_PLUGIN" in result.stderr, result.stderr


@pytest.mark.parametrize("mpi", [MPI])
def test_the_package_without_jax_says_so(mpi: str) -> None:
    with without(SITE / "jax"):
        result = ranks("import mpi_cuda")
    assert result.returncode != 0 and "pip install jax" in result.stderr, result.stderr


def test_a_package_without_libraries_is_refused_alone() -> None:
    """Where nothing can build them."""
    bare = Path(__file__).parents[1] / "bare"
    (bare.parent / "Cargo.toml").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(bare), str(bare)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=80)
    said = result.stdout + result.stderr
    assert result.returncode != 0 and not list(bare.glob("*.whl")), said
    assert "libpjrt_mpi_cuda.so" in said and "there is no cargo (Rust, https://rustup.rs)" in said
    assert "scripts/wheel" in said, said
