"""Dispatch does not wait for the token of the program before.

JAX waits for the token of one program with ordered callbacks before it dispatches the next. Here
the next gets the token as it is, so that dispatch does not wait for a peer.
"""

from __future__ import annotations

import functools
from typing import Any

from jax._src import core
from jax._src.interpreters import pxla

from mpi_cuda import _library
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="a program gets the token of the one before, without waiting for it",
        used=(
            "core.Token._buf",
            "interpreters.pxla.batched_device_put",
            "interpreters.pxla.shard_arg_handlers",
            "sharding.Sharding._addressable_device_assignment",
        ),
        without="an error at the first operation",
        test="test_deferred_launches_have_callbacks_errors_and_tokens",
    ),
)


def _as_it_is(token: Any, sharding: Any) -> Any:
    """The token's array, or None if it is elsewhere than the program or not ours."""
    array, devices = token._buf, sharding._addressable_device_assignment
    same_device = array.sharding.num_devices == 1 and array.devices() == set(devices)
    if not same_device or not _library.is_ours(devices[0].client):
        return None
    return pxla.batched_device_put(array.aval, sharding, [array], devices)


def install() -> None:
    """Wraps what JAX gives to a program for a token."""
    original: Any = pxla.shard_arg_handlers[core.Token]

    @functools.wraps(original)
    def shard_tokens(tokens: Any, shardings: Any, *others: Any) -> Any:
        passed = [_as_it_is(*pair) for pair in zip(tokens, shardings, strict=True)]
        if any(token is None for token in passed):
            return original(tokens, shardings, *others)
        return passed

    pxla.shard_arg_handlers[core.Token] = shard_tokens
