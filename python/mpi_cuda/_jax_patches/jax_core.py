"""What operations need to be primitives of JAX's."""

from __future__ import annotations

from typing import Any

from jax._src import core, dispatch

from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="operations are primitives, executed like JAX's own",
        used=(
            "core.Primitive",
            "core.Token",
            "core.abstract_token",
            "core.trace_state_clean",
            "dispatch.apply_primitive",
        ),
        without="an error at import",
        test="test_a_world_of_one",
    ),
)

Primitive = core.Primitive
apply_primitive = dispatch.apply_primitive
abstract_token = core.abstract_token
is_outside_programs = core.trace_state_clean


def is_token(value: Any) -> bool:
    """Whether this is a token of JAX's, outside programs."""
    return isinstance(value, core.Token)
