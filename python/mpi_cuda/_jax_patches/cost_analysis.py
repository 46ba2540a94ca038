"""What a program costs, before and after compiling.

JAX asks the plugin. PJRT's C interface has no such function before compiling, and newer XLA plugins
for the CPU have none after it. What counts is in jaxlib too, and needs a client of its own.
"""

from __future__ import annotations

import functools
from typing import Any

from jax._src import stages
from jax._src.interpreters import pxla
from jax._src.lib import _jax
from jaxlib import xla_client

from mpi_cuda import _library
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="what a program costs is counted by jaxlib where the plugin does not count it",
        used=(
            "interpreters.pxla.MeshComputation",
            "lib._jax.hlo_module_cost_analysis",
            "stages.Executable",
            "jaxlib.xla_client.make_cpu_client",
        ),
        without="an error at start",
        test="test_what_a_program_costs_is_known_before_and_after_compiling",
    ),
)


@functools.cache
def _counter() -> Any:
    """A client that counts. Nothing is ever run on it."""
    return xla_client.make_cpu_client(asynchronous=False)


def _lowered(original: Any) -> Any:
    @functools.wraps(original)
    def cost_analysis(self: Any) -> Any:
        if not _library.is_ours(self.compile_args["backend"]):
            return original(self)
        return _jax.hlo_module_cost_analysis(_counter(), self.hlo().as_hlo_module())

    return cost_analysis


def _compiled(original: Any) -> Any:
    @functools.wraps(original)
    def cost_analysis(self: Any) -> Any:
        try:
            return original(self)
        except NotImplementedError:
            executable = self.xla_extension_executable()
            if not _library.is_ours(getattr(executable, "client", None)):
                raise
        return _jax.hlo_module_cost_analysis(_counter(), executable.hlo_modules()[0])

    return cost_analysis


def install() -> None:
    """Wraps the two functions that ask the plugin."""
    for owner, wrapped in ((pxla.MeshComputation, _lowered), (stages.Executable, _compiled)):
        setattr(owner, "cost_analysis", wrapped(owner.cost_analysis))  # noqa: B010
