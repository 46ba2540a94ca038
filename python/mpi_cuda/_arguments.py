"""What users pass for communicators, reductions, ranks, tags and status, turned into numbers.

mpi4py's objects are accepted, and ours where mpi4py is absent.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import operator
import sys
from typing import Any

import jax
import numpy as np

from mpi_cuda import _library
from mpi_cuda._jax_patches import jax_core
from mpi_cuda._library import (
    ATTRIBUTE_ANY,
    ATTRIBUTE_PROC_NULL,
    DEFAULT_NUMBER,
    REDUCTIONS,
    SELF_NUMBER,
)

# What a negative number that is none of the two is reduced by.
_NEGATIVE = 2**32


class Constant:
    """A named constant, such as `ANY_SOURCE`; the same object when copied."""

    def __init__(self, name: str):
        self.name = name

    def __deepcopy__(self, _: Any) -> Constant:
        return self

    def __copy__(self) -> Constant:
        return self

    def __repr__(self) -> str:
        return f"mpi_cuda.{self.name}"


ANY_SOURCE = Constant("ANY_SOURCE")
ANY_TAG = Constant("ANY_TAG")
PROC_NULL = Constant("PROC_NULL")


class Op(Constant):
    """A reduction (MPI 4.0, section 6.9.2); `number` is its attribute value."""

    def __init__(self, name: str, number: int):
        super().__init__(name)
        self.number = number


OPS = {name: Op(name, number) for number, name in enumerate(REDUCTIONS)}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Comm:
    """A communicator by its number; what operations and `mpi_cuda.COMM_WORLD` use.

    Hashable and comparable. An argument of a jitted function is static if it is one.
    """

    number: int
    rank: int
    size: int

    def Get_rank(self) -> int:
        """Rank of this process."""
        return self.rank

    def Get_size(self) -> int:
        """Number of ranks."""
        return self.size


class Status:
    """What a receive saw, where mpi4py is absent; filled when the operation has run."""

    # The largest MPI_Status of the supported families.
    _BYTES = 64

    def __init__(self) -> None:
        self._memory = (ctypes.c_int * (self._BYTES // 4))()

    def _field(self, openmpi: int, mpich: int) -> int:
        family = _library.start().family
        return self._memory[openmpi if family == "openmpi" else mpich]

    def Get_source(self) -> int:
        """Rank the message came from."""
        return self._field(0, 2)

    def Get_tag(self) -> int:
        """Tag of the message."""
        return self._field(1, 3)


def mpi4py() -> Any:
    """mpi4py's MPI module if the user imported it, else None."""
    return sys.modules.get("mpi4py.MPI")


@functools.cache
def _refuse_other_mpi(mpi: Any) -> None:
    """Handles of another MPI mean nothing to ours."""
    if wrong := _library.other_mpi(mpi.__file__, mpi.Get_library_version()):
        raise RuntimeError(wrong)


def world_comm(number: int) -> Comm:
    """One of the communicators that always exist."""
    world = _library.start()
    return Comm(number, 0, 1) if number == SELF_NUMBER else Comm(number, world.rank, world.size)


@dataclasses.dataclass(frozen=True)
class Topology:
    """The neighbours of this rank; None where a Cartesian topology has none."""

    sources: tuple[int | None, ...]
    destinations: tuple[int | None, ...]
    is_cartesian: bool


_registered: dict[int, Comm] = {}
_topologies: dict[int, Topology] = {}


def _note_topology(mpi: Any, comm: Any, number: int) -> None:
    if number not in _topologies and isinstance(comm, mpi.Topocomm):
        sources, destinations = (
            tuple(None if rank == mpi.PROC_NULL else rank for rank in edges)
            for edges in (comm.inedges, comm.outedges)
        )
        is_cartesian = isinstance(comm, mpi.Cartcomm)
        _topologies[number] = Topology(sources, destinations, is_cartesian)


def known_topology(number: int) -> Topology | None:
    """That of a communicator by its number, if it has one."""
    return _topologies.get(number)


def resolve_comm(comm: Any) -> Comm:
    """The communicator a user means.

    Raises:
      TypeError: it is no intracommunicator of mpi4py's or ours.
      RuntimeError: MPI refuses it.
    """
    if comm is None:
        return world_comm(DEFAULT_NUMBER)
    if isinstance(comm, Comm):
        return comm
    mpi = mpi4py()
    if mpi is not None and isinstance(comm, mpi.Comm) and comm == mpi.COMM_NULL:
        raise ValueError("comm is COMM_NULL: it was freed, or this rank is not in it")
    if mpi is None or not isinstance(comm, mpi.Intracomm):
        raise TypeError(
            f"comm must be an mpi4py Intracomm, an mpi_cuda communicator or None, got {comm!r}"
        )
    _library.start()
    _refuse_other_mpi(mpi)
    handle = mpi._handleof(comm) & 0xFFFF_FFFF_FFFF_FFFF
    rank, size = ctypes.c_int(), ctypes.c_int()
    name = comm.Get_name() or "an unnamed communicator"
    number = _library.load().mpi_cuda_comm(
        handle, name.encode(), ctypes.byref(rank), ctypes.byref(size)
    )
    if number < 0:
        raise RuntimeError(_library.last_error())
    _note_topology(mpi, comm, number)
    return _registered.setdefault(number, Comm(number, rank.value, size.value))


def known_comm(number: int) -> Comm:
    """The communicator with a number that `resolve_comm` gave."""
    return _registered[number] if number in _registered else world_comm(number)


def resolve_op(op: Any) -> Op:
    """The reduction a user means.

    Raises:
      TypeError: it is none, or one that is not supported (named).
      ValueError: it was freed.
    """
    if isinstance(op, Op):
        return op
    mpi = mpi4py()
    if mpi is not None and isinstance(op, mpi.Op):
        for name, known in OPS.items():
            if op == getattr(mpi, name):
                return known
        for name in ("MAXLOC", "MINLOC", "REPLACE", "NO_OP"):
            if op == getattr(mpi, name):
                raise TypeError(f"reduction {name} is not supported; use one of {', '.join(OPS)}")
        return _user_op(mpi, op)
    raise TypeError(f"op must be a reduction such as mpi_cuda.SUM or MPI.SUM, got {op!r}")


# By handle: mpi4py's object, which is kept from being freed, and ours.
_user_ops: dict[int, tuple[Any, Op]] = {}


def _user_op(mpi: Any, op: Any) -> Op:
    if op == mpi.OP_NULL:
        raise ValueError("op is OP_NULL: it was freed")
    handle = mpi._handleof(op)
    kept, known = _user_ops.get(handle, (None, None))
    # The handle of one that was freed may have become another's.
    if known is None or kept != op:
        _library.start()
        _refuse_other_mpi(mpi)
        number = _library.load().mpi_cuda_op(handle & 0xFFFF_FFFF_FFFF_FFFF)
        known = Op("user-defined", number)
        _user_ops[handle] = op, known
    return known


def integer(operation: str, what: str, value: Any) -> int:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{operation}: {what} must be a Python integer, got a traced value: pass it through "
            "static_argnums, or close over it"
        )
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{operation}: {what} must be an integer, got {value!r}") from None


def _is(value: Any, ours: Constant) -> bool:
    if value is ours:
        return True
    mpi = mpi4py()
    return mpi is not None and isinstance(value, int) and value == getattr(mpi, ours.name)


def resolve_rank(operation: str, what: str, value: Any, comm: Comm) -> int:
    """A rank, `PROC_NULL`, or `ANY_SOURCE` for a source, as an attribute value.

    In a program a peer need not be a rank of `comm`: the operation may stand in a branch that this
    rank never takes. It is refused when it is executed.

    Raises:
      TypeError: it is no static integer.
      ValueError: it is not a rank of `comm`, and a root or of a call outside programs.
    """
    if what == "source" and _is(value, ANY_SOURCE):
        return ATTRIBUTE_ANY
    if what != "root" and _is(value, PROC_NULL):
        return ATTRIBUTE_PROC_NULL
    rank = integer(operation, what, value)
    if not 0 <= rank < comm.size:
        if what != "root" and -(2**31) <= rank < 2**31 and not jax_core.is_outside_programs():
            return rank if rank >= 0 else rank - _NEGATIVE
        raise ValueError(
            f"{operation} on rank {comm.rank}: {what} {rank} is not a rank of the communicator, "
            f"which has 0 to {comm.size - 1}"
        )
    return rank


def resolve_counts(operation: str, what: str, counts: Any, comm: Comm) -> tuple[int, ...]:
    """The rows of each rank's block.

    Raises:
      TypeError: they are no static integers.
      ValueError: they are not one for each rank of `comm`, or one is negative.
    """
    if isinstance(counts, jax.core.Tracer):
        counts = (counts,)
    elif isinstance(counts, jax.Array):
        # Within a program its elements would be traced.
        counts = np.asarray(counts)
    try:
        resolved = tuple(integer(operation, f"each of {what}", count) for count in counts)
    except TypeError as error:
        if str(error).startswith(operation):
            raise
        raise TypeError(f"{operation}: {what} must be integers, got {counts!r}") from None
    where = f"{operation} on rank {comm.rank}: {what} {shown_counts(resolved)}"
    if len(resolved) != comm.size:
        raise ValueError(
            f"{where} has {len(resolved)} numbers, and the communicator {comm.size} ranks: pass "
            "the rows of each rank's array"
        )
    for rank, count in enumerate(resolved):
        if count < 0:
            raise ValueError(f"{where} has a negative number for rank {rank}, {count}")
    if sum(resolved) >= 2**63:
        raise ValueError(f"{where} has more rows than memory can hold")
    return resolved


def shown_counts(counts: tuple[int, ...]) -> str:
    """Counts in words; of many the first."""
    most = 8
    if len(counts) <= most:
        return str(counts)
    first = ", ".join(map(str, counts[:most]))
    return f"({first}, and {len(counts) - most} more)"


_LARGEST_TAG = 2**31 - 1


def resolve_tag(operation: str, what: str, value: Any) -> int:
    """A tag, or `ANY_TAG` for a receive, as an attribute value.

    Raises:
      TypeError: it is no static integer.
      ValueError: it is negative, or does not fit a C `int`.
    """
    if what == "recvtag" and _is(value, ANY_TAG):
        return ATTRIBUTE_ANY
    tag = integer(operation, what, value)
    if tag < 0:
        raise ValueError(f"{operation}: {what} {tag} is negative")
    if tag > _LARGEST_TAG:
        raise ValueError(f"{operation}: {what} {tag} is above {_LARGEST_TAG}, the largest there is")
    return tag


_statuses: dict[int, Any] = {}


def resolve_status(status: Any) -> int:
    """The number of a status, 0 for none. The object is kept alive: programs refer to it."""
    if status is None:
        return 0
    mpi = mpi4py()
    if isinstance(status, Status):
        address = ctypes.addressof(status._memory)
    elif mpi is not None and isinstance(status, mpi.Status):
        address = mpi._addressof(status)
    else:
        raise TypeError(f"status must be an MPI.Status or mpi_cuda.Status, got {status!r}")
    number = _library.load().mpi_cuda_status(address)
    _statuses[number] = status
    return number
