"""Which programs are the same fixed sequence of collectives on every rank.

Their calls need no change of threads: the library runs such a program on the calling thread once
it sees that all ranks have arrived at it (`docs/architecture.md`, "Waiting"). It learns of them
from the name of an attribute on their first operation (`mark`); others are only slower.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np
from jax._src import core

from mpi_cuda._arguments import DEFAULT_NUMBER, WORLD_NUMBER

_POINT_TO_POINT = ("recv", "send", "sendrecv")
# What runs the program inside it exactly once.
_CALLS = ("jit", "closed_call", "core_call", "remat2", "custom_jvp_call", "custom_vjp_call")
# Above these a launch takes long enough that a caller would rather not wait for it.
_LONGEST = 10_000
_LARGEST = 16 << 20

_pending = threading.local()


class _Different(Exception):
    """The sequence may depend on the rank or on data."""


def _sequence(
    jaxpr: core.Jaxpr, effect: core.Effect, comms: set[int], total: list[int], times: int
) -> list[Any]:
    """The operations in `jaxpr`, which runs `times` times; `total` is their number and bytes."""
    found: list[Any] = []
    for eqn in jaxpr.eqns:
        if effect not in eqn.effects:
            continue
        name = eqn.primitive.name
        if "attributes" in eqn.params:
            attributes = dict(eqn.params["attributes"])
            comms.add(attributes["comm"])
            if name.removeprefix("mpi_cuda_") in _POINT_TO_POINT:
                raise _Different
            total[0] += times
            for var in (*eqn.invars, *eqn.outvars):
                total[1] += times * var.aval.size * var.aval.dtype.itemsize
            found.append((name, sorted(attributes.items())))
            continue
        inside = [
            getattr(sub, "jaxpr", sub)
            for sub in core.jaxprs_in_params(eqn.params)
            if effect in sub.effects
        ]
        if len(inside) != 1 or not (name == "scan" or name in _CALLS):
            raise _Different
        length = eqn.params["length"] if name == "scan" else 1
        found.append((length, _sequence(inside[0], effect, comms, total, times * length)))
    return found


def mark(jaxpr: core.Jaxpr, effect: core.Effect) -> str | None:
    """The attribute's name, or None if the ranks may differ. `effect` is that of operations."""
    comms: set[int] = set()
    total = [0, 0]
    try:
        sequence = _sequence(jaxpr, effect, comms, total, 1)
    except _Different:
        return None
    if len(comms) != 1 or not comms <= {WORLD_NUMBER, DEFAULT_NUMBER}:
        return None
    if total[0] > _LONGEST or total[1] > _LARGEST:
        return None
    digest = hashlib.blake2b(repr(sequence).encode(), digest_size=8).hexdigest()
    return f"mpi_cuda_alike_{comms.pop()}_{digest}"


def set_pending(name: str | None) -> None:
    """The next operation lowered by this thread carries the mark."""
    _pending.name = name


def take_pending() -> dict[str, Any]:
    """Attributes of the operation now lowered."""
    name, _pending.name = getattr(_pending, "name", None), None
    return {} if name is None else {name: np.int64(1)}
