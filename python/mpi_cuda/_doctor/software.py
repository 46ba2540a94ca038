"""Python and JAX: versions, and which backend programs get."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator

import mpi_cuda
from mpi_cuda._doctor.finding import Facts, Finding, note, problem
from mpi_cuda._jax_version import NEWEST, OLDEST, is_tested

#: Platforms of JAX's own, and of plugins that many have.
PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu", "metal", "oneapi", "")


def collect(about: dict[str, str]) -> Facts:
    """Facts of this process."""
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        # Of the module that runs: several may be installed.
        "mpi_cuda": mpi_cuda.__version__,
        "folder": os.path.dirname(mpi_cuda.__file__),
        "jax": _version("jax"),
        "jaxlib": _version("jaxlib"),
        "platforms": os.environ.get("JAX_PLATFORMS"),
    }


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    """Lines of the report."""
    yield "Python", f"{facts['python']} ({facts['executable']})"
    if facts["jax"] is None:
        yield "JAX", f"none, mpi_cuda {facts['mpi_cuda']}"
        return
    tested = "tested" if is_tested(facts["jax"]) else "not tested"
    yield (
        "JAX",
        f"{facts['jax']} with jaxlib {facts['jaxlib']} ({tested}), mpi_cuda {facts['mpi_cuda']}",
    )


def check(facts: Facts) -> Iterator[Finding]:
    """Findings of one rank."""
    if facts["jax"] and not is_tested(facts["jax"]):
        yield note(
            f"JAX {facts['jax']} was not tested with this version, {OLDEST} to {NEWEST} were",
            "if something fails, install one of those (docs/compatibility.md)",
        )
    platforms = facts["platforms"]
    if platforms is None:
        yield note(
            "JAX_PLATFORMS is not set, so programs do not use mpi_cuda",
            "set JAX_PLATFORMS=mpi_cuda where you start them",
        )
        return
    names = platforms.split(",")
    bare = [name.strip() for name in names]
    if bare != names and "mpi_cuda" in bare:
        yield problem(
            f"JAX_PLATFORMS={platforms!r}: a space is a part of a platform's name for JAX",
            f"set JAX_PLATFORMS={','.join(bare)}",
        )
        return
    if names[0] == "mpi_cuda":
        return
    if "mpi_cuda" in names:
        yield problem(
            f"JAX_PLATFORMS={platforms}: programs use {names[0] or 'what JAX finds'}, the first, "
            "so each rank runs alone, as a copy of the others",
            "set JAX_PLATFORMS=mpi_cuda,cpu to have both",
        )
        return
    if unknown := [name for name in names if name not in PLATFORMS]:
        meant = difflib.get_close_matches(unknown[0], ["mpi_cuda", *PLATFORMS], 1)
        yield problem(
            f"JAX_PLATFORMS={platforms}: JAX knows no platform {unknown[0]}",
            f"set JAX_PLATFORMS={meant[0] if meant and meant[0] else 'mpi_cuda'}",
        )
    else:
        yield note(
            f"JAX_PLATFORMS={platforms}, so programs do not use mpi_cuda",
            "set JAX_PLATFORMS=mpi_cuda to have one world of all ranks",
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
