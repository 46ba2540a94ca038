"""Dispatch does not wait for the token of the program before.

JAX waits for the token of one program with ordered callbacks before it dispatches the next. Here
the next gets the token as it is, so that dispatch does not wait for a peer. If the program before
is known to have failed, the next gets a new token: it would fail for a reason that is not its own,
and so would all later ones.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jax._src import core
from jax._src.interpreters import pxla

from mpi_cuda import _library
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="a program gets the token of the one before, without waiting for it",
        used=(
            "core.Token._buf",
            "core.typeof",
            "interpreters.pxla.batched_device_put",
            "interpreters.pxla.shard_arg_handlers",
            "sharding.Sharding._addressable_device_assignment",
        ),
        without="an error at the first operation",
        test="test_deferred_launches_have_callbacks_errors_and_tokens",
    ),
)


class _Ended:
    """In place of the token of a program that has failed: there is nothing to wait for."""

    def block_until_ready(self) -> None:
        pass


def _unless_failed(token: Any, *, wait: bool) -> Any:
    """The token, or `_Ended`; if not to `wait`, only if its program has failed already."""
    if isinstance(token, _Ended) or _library.load().mpi_cuda_has_unread():
        # The launch raises that error, and looking at the token would count as reading it.
        return token
    if not (wait or token._buf.is_ready()):
        return token
    try:
        token.block_until_ready()
    except Exception:
        return _Ended()
    return token


def _as_it_is(token: Any, sharding: Any) -> Any:
    """The token's array, or None if it is elsewhere than the program or not ours."""
    devices = sharding._addressable_device_assignment
    if isinstance(token, _Ended):
        nothing = np.zeros(0, np.bool_)
        return pxla.batched_device_put(
            core.typeof(nothing), sharding, [nothing] * len(devices), devices
        )
    array = token._buf
    same_device = array.sharding.num_devices == 1 and array.devices() == set(devices)
    if not same_device or not _library.is_ours(devices[0].client):
        return None
    return pxla.batched_device_put(array.aval, sharding, [array], devices)


def install() -> None:
    """Wraps what JAX gives to a program for a token."""
    original: Any = pxla.shard_arg_handlers[core.Token]

    @functools.wraps(original)
    def shard_tokens(tokens: Any, shardings: Any, *others: Any) -> Any:
        tokens = [_unless_failed(token, wait=False) for token in tokens]
        passed = [_as_it_is(*pair) for pair in zip(tokens, shardings, strict=True)]
        if any(token is None for token in passed):
            tokens = [_unless_failed(token, wait=True) for token in tokens]
            return original(tokens, shardings, *others)
        return passed

    pxla.shard_arg_handlers[core.Token] = shard_tokens
