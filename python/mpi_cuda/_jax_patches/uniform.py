"""Which programs are the same fixed sequence of operations on every rank.

Ranks compare such a program once for each launch (`docs/checks.md`). If it is short, its calls need
no change of threads: the library runs it on the calling thread once it sees that all ranks have
arrived at it (`docs/waiting.md`). The library learns of them from the name of an attribute on their
first operation (`mark`); others are only slower.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from typing import Any

import numpy as np

from mpi_cuda import _library
from mpi_cuda._jax_patches import jaxprs
from mpi_cuda._jax_patches.effect import is_ordered_callback
from mpi_cuda._jax_patches.patch import Patch
from mpi_cuda._library import (
    ATTRIBUTE_ANY,
    ATTRIBUTE_PROC_NULL,
    DEFAULT_NUMBER,
    REDUCTIONS,
    WORLD_NUMBER,
)

PATCHES = (
    Patch(
        what="what runs a program inside it exactly once is known by its name",
        used=(
            "ad_checkpoint.remat_p",
            "custom_derivatives.custom_jvp_call_p",
            "custom_derivatives.custom_vjp_call_p",
            "lax.control_flow.loops.scan_p",
            "pjit.jit_p",
        ),
        without="small programs stay on XLA's threads: slower",
        test="test_which_programs_are_the_same_on_every_rank",
    ),
)

# What runs the program inside it exactly once.
_CALLS = ("jit", "closed_call", "core_call", "remat2", "custom_jvp_call", "custom_vjp_call")
# Above these a launch takes so long that its caller had rather not wait for it.
_LONGEST = 10_000
_LARGEST = 16 << 20
_LONGEST_WORDS = 400
# If a launch fails behind so many collectives, the other ranks do not hear of it.
_MOST_KINDS = 1000

_pending = threading.local()


class _Different(Exception):
    """The sequence may depend on the rank or on data."""


@dataclasses.dataclass
class _Found:
    """What a program has, so far."""

    effect: Any
    rank: int
    comms: set[int] = dataclasses.field(default_factory=set)
    operations: int = 0
    bytes: int = 0
    exchanges: int = 0
    balance: int = 0
    # Something in it is compared between ranks.
    compared: bool = False

    def add(self, eqn: Any, times: int) -> Any:
        """Notes an operation that runs `times` times; returns its place in the sequence."""
        name = eqn.primitive.name.removeprefix("mpi_cuda_")
        attributes = dict(eqn.params["attributes"])
        self.comms.add(attributes["comm"])
        self.operations += times
        # A template stays here.
        template = len(eqn.invars) - 1 - eqn.params["token"] if eqn.params["template"] else -1
        arrays = [var for index, var in enumerate(eqn.invars) if index != template]
        for var in (*arrays, *eqn.outvars):
            self.bytes += times * var.aval.size * var.aval.dtype.itemsize
        if name in ("wait", "wait_send") and "started" in eqn.params:
            # Of a collective, which the ranks have compared at its start.
            return "wait", [], None
        if name in ("send", "recv", "isend", "irecv", "wait", "wait_send"):
            raise _Different
        self.compared = True
        if attributes.get("op", 0) not in range(len(REDUCTIONS)):
            # The user's have other numbers on other ranks.
            raise _Different
        if name == "sendrecv":
            tag, recvtag = attributes["tag"], attributes["recvtag"]
            if attributes["source"] == ATTRIBUTE_ANY or recvtag not in (tag, ATTRIBUTE_ANY):
                raise _Different
            # Every message sent must be one received: that adds nothing to the sum over all ranks.
            for sign, source, dest in (
                (1, self.rank, attributes["dest"]),
                (-1, attributes["source"], self.rank),
            ):
                if ATTRIBUTE_PROC_NULL not in (source, dest):
                    self.balance += sign * _hash((self.exchanges, source, dest))
            self.exchanges += 1
            attributes = {"tag": tag, "recvtag": recvtag}
        # They differ by rank.
        attributes.pop("send_counts", None)
        attributes.pop("recv_counts", None)
        return name, sorted(attributes.items()), same_everywhere(name, eqn)


def same_everywhere(name: str, eqn: Any) -> tuple[str, int] | None:
    """dtype and number of elements that an operation has on every rank."""
    if name in ("barrier", "ibarrier", "sendrecv"):
        return None
    counts = dict(eqn.params["attributes"]).get("counts")
    if counts is not None:
        row = eqn.invars[0].aval
        return (str(row.dtype), sum(counts) * math.prod(row.shape[1:]))
    if name in ("alltoallv", "neighbor_alltoall"):
        # A rank may have more rows, or more neighbours, than another.
        block = eqn.invars[0].aval
        return (str(block.dtype), math.prod(block.shape[1:]))
    if name == "iscatter":
        block = eqn.invars[0].aval
        is_root = eqn.params["batch_as"] == name
        return (str(block.dtype), math.prod(block.shape[1:]) if is_root else block.size)
    # The root of a scatter passes more, and that of a gather gets more.
    arrays = eqn.outvars if name == "scatter" else eqn.invars
    return (str(arrays[0].aval.dtype), arrays[0].aval.size)


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little")


def _sequence(jaxpr: Any, found: _Found, times: int) -> list[Any]:
    """The operations in `jaxpr`, which runs `times` times."""
    sequence: list[Any] = []
    for eqn in jaxpr.eqns:
        if found.effect not in eqn.effects or is_ordered_callback(eqn):
            continue
        if "attributes" in eqn.params:
            sequence.append(found.add(eqn, times))
            continue
        name = eqn.primitive.name
        inside = [
            jaxprs.bare(program)
            for program in jaxprs.in_params(eqn.params)
            if found.effect in program.effects
        ]
        if len(inside) != 1 or not (name == "scan" or name in _CALLS):
            raise _Different
        length = eqn.params["length"] if name == "scan" else 1
        sequence.append((length, _sequence(inside[0], found, times * length)))
    return sequence


def _code(sequence: list[Any]) -> list[Any]:
    """The sequence without the lengths of its loops."""
    is_loop = [isinstance(item[0], int) for item in sequence]
    return [_code(item[1]) if loop else item for item, loop in zip(sequence, is_loop, strict=True)]


def _words(sequence: list[Any]) -> str:
    """`4 times (allreduce of 3 float32 with SUM), barrier`"""
    said = []
    for item in sequence:
        if isinstance(item[0], int):
            said.append(f"{item[0]} times ({_words(item[1])})" if item[0] > 1 else _words(item[1]))
            continue
        name, attributes, array = item
        known = dict(attributes)
        words = name if array is None else f"{name} of {array[1]} {array[0]}"
        if "op" in known:
            words += f" with {REDUCTIONS[known['op']]}"
        said.append(words + (f" with root {known['root']}" if "root" in known else ""))
    return ", ".join(words for words in said if words)


def _kinds(sequence: list[Any], most: int) -> list[str]:
    """The names of the first collectives of a sequence."""
    kinds: list[str] = []
    for item in sequence:
        if isinstance(item[0], int):
            inside = _kinds(item[1], most - len(kinds))
            kinds += (inside * min(item[0], most))[: most - len(kinds)]
        elif item[0] not in ("sendrecv", "wait") and len(kinds) < most:
            kinds.append(item[0])
    return kinds


def mark(jaxpr: Any, effect: Any, *, callbacks: bool = False) -> str | None:
    """The attribute's name, or None if the ranks may differ. `effect` is that of operations.

    Of a program with callbacks it tells only which collectives are missing if one of these fails.
    """
    found = _Found(effect, _library.start().rank)
    try:
        sequence = _sequence(jaxpr, found, 1)
    except _Different:
        return None
    if (
        not found.compared
        or len(found.comms) != 1
        or not found.comms <= {WORLD_NUMBER, DEFAULT_NUMBER}
    ):
        return None
    # A callback may take as long as it likes.
    long = callbacks or found.operations > _LONGEST or found.bytes > _LARGEST
    number = _hash(sequence)
    words = _words(sequence)[:_LONGEST_WORDS].encode()
    _library.load().mpi_cuda_describe(number, _hash(_code(sequence)), words)
    kinds = " ".join(_kinds(sequence, _MOST_KINDS)).encode()
    _library.load().mpi_cuda_know_kinds(number, kinds)
    name = f"mpi_cuda_{'long_' * long}uniform_{found.comms.pop()}_{number:016x}"
    return f"{name}_{found.balance % 2**64:016x}" if found.exchanges else name


def set_pending(name: str | None) -> None:
    """The next operation lowered by this thread carries the mark."""
    _pending.name = name


def take_pending() -> dict[str, Any]:
    """Attributes of the operation now lowered."""
    name, _pending.name = getattr(_pending, "name", None), None
    return {} if name is None else {name: np.int64(1)}
