"""Errors of host callbacks on GPUs, which nobody may read.

XLA's own plugin calls them there. Without an operation in flight such an error is for JAX alone.
Beside operations nothing may show it but the program's token, so it is noted where it is raised, as
it is on CPUs (`pjrt_plugin/src/ffi/callbacks.rs`): also where JAX finds its results wrong.
"""

from __future__ import annotations

import functools
from typing import Any

from jax._src.interpreters import mlir

from mpi_cuda import _library
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="what a callback on a GPU raises is noted",
        used=("interpreters.mlir.ModuleContext.add_host_callback",),
        without="a job on GPUs ends with status 0 after an error of a callback that nobody reads",
        test="test_an_error_of_a_callback_that_nobody_reads_is_raised_later",
    ),
)


def _noting(function: Any) -> Any:
    """`function`, whose exceptions are noted."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            # The message that is read later has these words in it.
            words = f"{type(error).__name__}: {error}".replace("\0", "")
            _library.load().mpi_cuda_callback_failed(words.encode(errors="replace"))
            raise

    return call


def install() -> None:
    """Wraps what JAX makes of callbacks; without it their errors are for JAX alone."""
    module_context: Any = getattr(mlir, "ModuleContext", None)
    original = getattr(module_context, "add_host_callback", None)
    if original is None:
        return

    @functools.wraps(original)
    def add(self: Any, host_callback: Any) -> None:
        # Of a program for several platforms there is none, and JAX says what is wrong with it.
        backend = self.get_backend(optional=True)
        if _library.is_ours(backend) and _library.load().mpi_cuda_on_gpu():
            host_callback = _noting(host_callback)
        original(self, host_callback)

    module_context.add_host_callback = add
