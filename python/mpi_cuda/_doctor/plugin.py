"""The library, the XLA plugin in it, the shims, and whether JAX's backend starts."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mpi_cuda
from mpi_cuda import _library
from mpi_cuda._doctor.finding import Facts, Finding, note, of_error, problem
from mpi_cuda._report.text import seconds, size

ABIS = ("openmpi", "mpich", "mpi_abi")


def start_backend() -> Facts:
    """Makes JAX's client of this rank: where the devices are, or what went wrong."""
    before, start = _threads(), time.perf_counter()
    try:
        import jax

        # JAX has read its variables when this package was imported.
        jax.config.update("jax_platforms", "mpi_cuda")
        devices, own = jax.devices(), jax.local_devices()[0]
        if not _library.is_ours(own.client):
            return {"error": "JAX has started another backend than mpi_cuda"}
    except Exception as error:
        return {"error": " ".join(str(error).split())}
    added = _threads() - before
    return {
        "devices": len(devices),
        "kind": own.device_kind,
        "seconds": time.perf_counter() - start,
        "threads": added.total(),
        "xla_threads": added.get("tf_XLAEigen", 0),
    }


def _threads() -> Counter[str]:
    """The threads of this process, by their names."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:
            continue
    return Counter(names)


def collect(about: dict[str, str]) -> Facts:
    """Facts of this process."""
    folder = os.environ.get("MPI_CUDA_SHIM_DIR") or str(_library.FOLDER)
    inner = about.get("plugin")
    return {
        "library": str(_library.LIBRARY),
        "library_bytes": _bytes(_library.LIBRARY),
        "inner": inner,
        "inner_version": about.get("plugin_version"),
        "inner_package": _package_of(Path(inner)) if inner else None,
        "error": about.get("plugin_error"),
        "version": about.get("version"),
        "shim_folder": folder,
        "shims": {abi: _shim(abi, folder) for abi in ABIS},
        "abi": about.get("mpi_abi"),
    }


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    """Lines of the report."""
    bytes_ = facts["library_bytes"]
    yield "library", facts["library"] + (", missing" if bytes_ is None else f", {size(bytes_)}")
    if facts["inner"]:
        of = f"{facts['inner_package']}, " if facts["inner_package"] else ""
        yield "XLA plugin", f"{facts['inner']} ({of}PJRT {facts['inner_version']})"
    there = [abi for abi, file in facts["shims"].items() if file]
    yield "shims", f"{', '.join(there) or 'none'} in {facts['shim_folder']}"
    backend = facts.get("backend")
    if backend and "devices" in backend:
        yield "backend", f"{backend['devices']} device(s) of kind {backend['kind']}"


def check(facts: Facts) -> Iterator[Finding]:
    """Findings of one rank."""
    if facts["error"]:
        yield of_error(facts["error"])
    if facts["version"] not in (None, own := mpi_cuda.__version__):
        yield problem(
            f"the library is of version {facts['version']}, and the Python part of {own}",
            "install the wheel again, or in a checkout run scripts/setup",
        )
    for abi, file in facts["shims"].items():
        if file and (wrong := _library.cut_off(Path(file))):
            yield problem(f"the shim for {abi}, {file}, {wrong}", "install the wheel again")
    missing = [abi for abi, file in facts["shims"].items() if not file]
    if facts["abi"] in missing:
        yield problem(
            f"the shim of this MPI, libmpi_cuda_shim_{facts['abi']}.so, is not in "
            f"{facts['shim_folder']}, so jobs of several ranks are refused",
            "install the package anew, or set MPI_CUDA_SHIM_DIR to the folder that has it",
        )
    elif missing:
        yield note(
            f"there is no shim for {', '.join(missing)}",
            "needed for MPIs with that ABI alone; the package has it",
        )
    backend = facts.get("backend") or {}
    if backend.get("error"):
        yield problem(
            f"JAX's backend does not start: {backend['error']}",
            "see the other problems; if there is none, install the package with pip, so that JAX "
            "finds its plugin",
        )
    elif backend.get("seconds", 0.0) > SLOW_START:
        yield note(
            f"JAX's backend took {seconds(backend['seconds'])} to start",
            "start fewer ranks on a core, or put the environment on a fast file system",
        )


#: Seconds.
SLOW_START = 20.0


def _shim(abi: str, folder: str) -> str | None:
    file = os.path.join(folder, f"libmpi_cuda_shim_{abi}.so")
    return file if os.path.isfile(file) else None


def _bytes(file: Path) -> int | None:
    return os.path.getsize(file) if os.path.isfile(file) else None


def _package_of(file: Path) -> str | None:
    """The package and version that has installed a file, by what pip wrote down."""
    site = next((up for up in file.parents if up.name in ("site-packages", "dist-packages")), None)
    if site is None:
        return None
    entry = f"{file.relative_to(site)},"
    for record in site.glob("*.dist-info/RECORD"):
        if any(line.startswith(entry) for line in record.read_text().splitlines()):
            name, version = record.parent.name.removesuffix(".dist-info").split("-", 1)
            return f"{name} {version}"
    return None
