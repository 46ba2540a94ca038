"""The package as it is installed: what the start of Python does, and what is said where it cannot
run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "versions.env").exists())
SELECTING = ("JAX_PLATFORMS", "MPI_CUDA", "OMPI_", "PMI")


def python(code: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(SELECTING)}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, env=own | variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("variables", "loaded"),
    [
        ({}, ""),
        ({"JAX_PLATFORMS": "cpu"}, ""),
        ({"JAX_PLATFORMS": "mpi_cuda"}, "mpi_cuda_startup"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi_cuda_startup"),
        ({"PMI_SIZE": "2"}, "mpi_cuda_startup"),
        ({"PMIX_RANK": "0"}, "mpi_cuda_startup"),
        ({"PMIX_RANK": "0", "JAX_PLATFORMS": "mpi_cuda", "MPI_CUDA_STARTUP": "0"}, ""),
    ],
)
def test_what_the_start_of_python_loads(variables: dict[str, str], loaded: str) -> None:
    """Nothing of ours where neither a launcher nor the platform says that we are wanted; never
    JAX, numpy or the package."""
    names = ("mpi_cuda", "mpi_cuda_startup", "jax", "numpy")
    code = f"""if True:
        import site, sys
        site.addsitedir({str(ROOT / "python")!r})
        print(*(module for module in sys.modules if module.split(".")[0] in {names}))
    """
    # Without what the environment itself has Python load.
    result = python(code, "-S", **variables)
    assert result.stdout.strip() == loaded and result.stderr == "", result


def test_without_jax_the_remedy_is_said() -> None:
    result = python("import sys; sys.modules['jax'] = None; import mpi_cuda")
    assert result.returncode != 0
    assert "mpi_cuda needs JAX" in result.stderr and "pip install jax" in result.stderr, result


def test_a_file_that_hides_jax_is_named(tmp_path) -> None:
    (tmp_path / "jax.py").write_text("")
    result = python("import mpi_cuda", PYTHONPATH=f"{tmp_path}:{ROOT / 'python'}")
    assert f"{tmp_path}/jax.py, which is not JAX and hides it" in result.stderr, result


def test_a_library_that_cannot_be_loaded_is_told_with_the_systems_it_is_for(tmp_path) -> None:
    code = f"""if True:
        from pathlib import Path
        from mpi_cuda import _library
        _library.LIBRARY = Path({str(tmp_path / "libpjrt_mpi_cuda.so")!r})
        SYSTEM
        _library.load()
    """
    (tmp_path / "libpjrt_mpi_cuda.so").write_bytes(b"\x7fELF of another system")
    result = python(code.replace("SYSTEM", "pass"))
    assert "cannot be loaded" in result.stderr and "glibc 2.28" in result.stderr, result.stderr
    # Python on musl knows no version of glibc.
    result = python(code.replace("SYSTEM", "_library.platform.libc_ver = lambda: ('', '')"))
    assert "such as musl" in result.stderr, result.stderr
    whole = (ROOT / "python/mpi_cuda/lib/libpjrt_mpi_cuda.so").read_bytes()
    for length, said in ((4096, "has 4096 bytes of"), (100, "has 100 bytes of"), (0, "is empty")):
        (tmp_path / "libpjrt_mpi_cuda.so").write_bytes(whole[:length])
        result = python(code.replace("SYSTEM", "pass"))
        assert said in result.stderr and "install the wheel" in result.stderr, result.stderr
    # This one has no functions at all.
    other = (ROOT / "python/mpi_cuda/lib/mpi4py/libmpi.so.12").read_bytes()
    (tmp_path / "libpjrt_mpi_cuda.so").write_bytes(other)
    result = python(code.replace("SYSTEM", "pass"))
    assert "it is another version's than the Python part" in result.stderr, result.stderr
    (tmp_path / "libpjrt_mpi_cuda.so").unlink()
    result = python(code.replace("SYSTEM", "pass"))
    assert "is missing, or its folder cannot be read: install" in result.stderr, result.stderr


def test_a_platform_that_is_almost_ours_is_told() -> None:
    result = python("import jax; jax.devices()", JAX_PLATFORMS="mpicuda")
    assert "JAX knows no platform mpicuda: set JAX_PLATFORMS=mpi_cuda" in result.stderr, result
    result = python("import jax; jax.devices()", JAX_PLATFORMS="mpi_cuda, cpu")
    assert "in ' cpu': set JAX_PLATFORMS=mpi_cuda,cpu" in result.stderr, result


def test_the_package_has_the_licence() -> None:
    assert (ROOT / "python/LICENSE").read_text() == (ROOT / "LICENSE").read_text()
