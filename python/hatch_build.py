"""Puts the libraries into the wheel, and what they are built from into the sdist.

The libraries are those that were built in place, or those of `MPI_CUDA_BUILD_LIBRARIES`, a folder;
if there are none, they are built. A wheel has all of them or is refused. Its tag is this machine's,
or that of the glibc which `MPI_CUDA_BUILD_GLIBC` names and `scripts/wheel` checks.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARIES = (
    "libpjrt_mpi_cuda.so",
    "libmpi_cuda_shim_openmpi.so",
    "libmpi_cuda_shim_mpich.so",
    "libmpi_cuda_shim_mpi_abi.so",
    "mpi4py/libmpi.so.12",
)
#: Beside them where `scripts/wheel` has written it.
THIRD_PARTY = "THIRD_PARTY_LICENSES"
#: What the libraries are built from, below the repository's root, which is the sdist's too.
SOURCES = (
    "Cargo.lock",
    "Cargo.toml",
    "include",
    "mpi_runtime",
    "pjrt_plugin",
    "pjrt_sys",
    "scripts/build_libraries",
    "scripts/header_mpicc",
    "versions.env",
)
#: The headers of XLA: the variable by which the build finds each, its package, and its place there.
HEADERS = (
    ("MPI_CUDA_PJRT_HEADER", "xla_plugins.xla_cpu_pjrt", "include/pjrt_c_api.h"),
    ("MPI_CUDA_FFI_HEADER", "jaxlib", "include/xla/ffi/api/c_api.h"),
)
START_UP = "mpi_cuda_startup.pth"
REMEDY = (
    "a wheel that scripts/wheel has made needs none of this, and scripts/setup prepares a checkout "
    "of Debian's and installs the package in place"
)


class Libraries(BuildHookInterface):
    """The build hook that hatchling calls."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Packages with headers, where the libraries must be built."""
        if self.target_name != "wheel" or not self._missing():
            return []
        self._need_tools()
        versions = (self._sources() / "versions.env").read_text()
        wanted = {"jaxlib": "JAX_VERSION", "xla-cpu-pjrt": "XLA_CPU_PJRT_VERSION"}
        pinned = dict(re.findall(r"^(\w+)=(\S+)$", versions, re.MULTILINE))
        return ["pip", *(f"{name}=={pinned[version]}" for name, version in wanted.items())]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the files to the wheel or sdist that is about to be made."""
        included: dict[str, str] = build_data["force_include"]
        if self.target_name == "sdist":
            included.update({str(self._sources() / name): name for name in SOURCES})
            return
        if self._missing():
            self._build()
        if version == "editable":
            build_data["force_include_editable"] = {str(Path(self.root, START_UP)): START_UP}
            return
        folder = self._libraries()
        there = [name for name in (*LIBRARIES, THIRD_PARTY) if (folder / name).is_file()]
        included.update({str(folder / name): f"mpi_cuda/lib/{name}" for name in there})
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"

    def _sources(self) -> Path:
        """The repository's root, one above this folder, or the sdist's, which is this folder."""
        own = Path(self.root)
        return own if (own / "Cargo.toml").is_file() else own.parent

    def _libraries(self) -> Path:
        folder = os.environ.get("MPI_CUDA_BUILD_LIBRARIES")
        return Path(folder) if folder else Path(self.root, "mpi_cuda", "lib")

    def _missing(self) -> list[str]:
        return [name for name in LIBRARIES if not (self._libraries() / name).is_file()]

    def _need_tools(self) -> None:
        missing = ", ".join(self._missing())
        if os.environ.get("MPI_CUDA_BUILD_LIBRARIES"):
            self._refuse(f"{self._libraries()}, MPI_CUDA_BUILD_LIBRARIES, lacks {missing}")
        if not (self._sources() / "Cargo.toml").is_file():
            self._refuse(f"{missing} is not built, and the sources in Rust are not here")
        tools = {"cargo": "Rust, https://rustup.rs", "cc": "a C compiler"}
        lacking = [f"{tool} ({what})" for tool, what in tools.items() if shutil.which(tool) is None]
        if lacking:
            self._refuse(
                f"{missing} must be built first. That takes Rust, a C compiler and libclang "
                f"(Debian: gcc, libclang-dev), and there is no {' and no '.join(lacking)}"
            )

    def _build(self) -> None:
        self._need_tools()
        found = {variable: _file_of(package, name) for variable, package, name in HEADERS}
        environment = os.environ | {name: str(path) for name, path in found.items() if path}
        environment["PYTHON"] = sys.executable
        script = self._sources() / "scripts" / "build_libraries"
        result = subprocess.run(["bash", str(script), str(self._libraries())], env=environment)
        if result.returncode:
            self._refuse("the libraries could not be built, see above")

    def _refuse(self, reason: str) -> None:
        self.app.abort(f"mpi_cuda: {reason}; {REMEDY} (docs/installation.md)")


def _platform() -> str:
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    glibc = os.environ.get("MPI_CUDA_BUILD_GLIBC")
    if not glibc:
        return machine
    return machine.replace("linux", f"manylinux_{glibc.replace('.', '_')}")


def _file_of(package: str, name: str) -> Path | None:
    """A file in a package that is installed, without importing it. `_library.py` has the same: the
    package that is about to be built cannot be imported here."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).with_name(name.split("/")[0]) / Path(*name.split("/")[1:])
