"""`jax.effects_barrier` waits for operations as it does for callbacks."""

from __future__ import annotations

from typing import Any

from jax._src import dispatch

from mpi_cuda import _library
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="`jax.effects_barrier` waits for operations too",
        used=(
            "dispatch.runtime_tokens",
            "dispatch.RuntimeTokenSet.block_until_ready",
            "dispatch.RuntimeTokenSet.clear",
        ),
        without="an error at the first operation",
        test="test_an_error_nobody_reads_is_raised_at_the_barrier",
    ),
)


def install() -> None:
    """Wraps what JAX waits with."""
    tokens: Any = type(dispatch.runtime_tokens)
    original = tokens.block_until_ready

    def block_until_ready(self: Any) -> None:
        try:
            original(self)
        except BaseException:
            # It has been raised, and must not be raised again by every later barrier.
            self.clear()
            _library.load().mpi_cuda_wait()
            raise
        if _library.load().mpi_cuda_wait():
            raise RuntimeError(_library.last_error())

    tokens.block_until_ready = block_until_ready
