"""The vector variants of collectives: the ranks' arrays differ in length along the first axis.

How many rows each rank's array has is static, and said by whoever calls.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from mpi_cuda import _arguments
from mpi_cuda._arguments import Comm, shown_counts
from mpi_cuda._operations import Array, Token, bind, collective


def _require_rows(operation: str, what: str, x: Any, rows: int, comm: Comm, counts: Any) -> None:
    """Refuses an array that has not as many rows as it should."""
    if x.ndim == 0 or x.shape[0] != rows:
        raise ValueError(
            f"{operation} on rank {comm.rank}: {what} has shape {x.shape}, and with {counts} its "
            f"leading dimension must be {rows}"
        )


@collective
def allgatherv(x: Any, counts: Any, *, comm: Any = None, token: Any = None) -> tuple[Array, Token]:
    """Gathers arrays of different lengths on every rank (MPI 4.0, section 6.7).

    Can be differentiated in forward and reverse mode.

    Args:
      x: array of shape `(counts[rank], *row)`, of the same `row` and dtype on every rank.
      counts: integers, the same on every rank: the rows of each rank's array.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      Array of shape `(sum(counts), *row)`, the ranks' arrays one after the other, and a token.

    Raises:
      TypeError: counts are no static integers.
      ValueError: counts are not one for each rank, negative, or not the length of `x`.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    counts = _arguments.resolve_counts("allgatherv", "counts", counts, where)
    _require_own("allgatherv", x, counts, where)
    result = ((sum(counts), *x.shape[1:]), x.dtype)
    return bind("allgatherv", where, x, result, token, counts=counts)


@collective
def gatherv(
    x: Any, counts: Any, root: int, *, comm: Any = None, token: Any = None
) -> tuple[Array, Token]:
    """Gathers arrays of different lengths on the root (MPI 4.0, section 6.5).

    Can be differentiated in forward and reverse mode.

    Args:
      x: array of shape `(counts[rank], *row)`, of the same `row` and dtype on every rank.
      counts: integers, the same on every rank: the rows of each rank's array.
      root: rank that receives.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      On the root an array of shape `(sum(counts), *row)`, elsewhere `x`; and a token.

    Raises:
      TypeError: counts are no static integers.
      ValueError: counts are not one for each rank, negative, or not the length of `x`.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    root = _arguments.resolve_rank("gatherv", "root", root, where)
    counts = _arguments.resolve_counts("gatherv", "counts", counts, where)
    _require_own("gatherv", x, counts, where)
    rows = sum(counts) if where.rank == root else counts[where.rank]
    result = ((rows, *x.shape[1:]), x.dtype)
    return bind("gatherv", where, x, result, token, counts=counts, root=root)


@collective
def scatterv(
    x: Any, counts: Any, root: int, *, comm: Any = None, token: Any = None
) -> tuple[Array, Token]:
    """Sends each rank its rows of an array of the root's (MPI 4.0, section 6.6).

    Can be differentiated in forward and reverse mode.

    Args:
      x: on the root an array of shape `(sum(counts), *row)`, elsewhere an array of shape
        `(counts[rank], *row)` and the same dtype.
      counts: integers, the same on every rank: the rows that each rank gets.
      root: rank that sends.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      Array of shape `(counts[rank], *row)`, and a token.

    Raises:
      TypeError: counts are no static integers.
      ValueError: counts are not one for each rank, negative, or not the length of `x`.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    root = _arguments.resolve_rank("scatterv", "root", root, where)
    counts = _arguments.resolve_counts("scatterv", "counts", counts, where)
    if where.rank == root:
        words = f"counts {shown_counts(counts)} on the root"
        _require_rows("scatterv", "x", x, sum(counts), where, words)
    else:
        _require_own("scatterv", x, counts, where)
    result = ((counts[where.rank], *x.shape[1:]), x.dtype)
    return bind("scatterv", where, x, result, token, counts=counts, root=root)


@collective
def alltoallv(
    x: Any, send_counts: Any, recv_counts: Any, *, comm: Any = None, token: Any = None
) -> tuple[Array, Token]:
    """Sends each rank a number of rows of its own, and receives so (MPI 4.0, section 6.8).

    What this rank sends to another must be what that one expects: `send_counts[s]` here is
    `recv_counts[r]` on rank `s`, where this is rank `r`. The ranks compare that before anything is
    sent. Can be differentiated in forward and reverse mode.

    Args:
      x: array of shape `(sum(send_counts), *row)`, of the same `row` and dtype on every rank: the
        rows for rank 0, then those for rank 1, and so on.
      send_counts: integers: how many rows each rank gets from this one.
      recv_counts: integers: how many rows this rank gets from each.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      Array of shape `(sum(recv_counts), *row)`: the rows from rank 0, then those from rank 1, and
      so on; and a token.

    Raises:
      TypeError: counts are no static integers.
      ValueError: counts are not one for each rank, negative, or not the length of `x`; or what
        this rank sends to itself is not what it expects of itself.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    send_counts = _arguments.resolve_counts("alltoallv", "send_counts", send_counts, where)
    recv_counts = _arguments.resolve_counts("alltoallv", "recv_counts", recv_counts, where)
    words = f"send_counts {shown_counts(send_counts)}"
    _require_rows("alltoallv", "x", x, sum(send_counts), where, words)
    rank = where.rank
    if send_counts[rank] != recv_counts[rank]:
        raise ValueError(
            f"alltoallv on rank {rank}: it sends {send_counts[rank]} rows to itself and expects "
            f"{recv_counts[rank]}: send_counts and recv_counts must agree at {rank}"
        )
    result = ((sum(recv_counts), *x.shape[1:]), x.dtype)
    attributes = {"send_counts": send_counts, "recv_counts": recv_counts}
    return bind("alltoallv", where, x, result, token, **attributes)


def _require_own(operation: str, x: Any, counts: tuple[int, ...], comm: Comm) -> None:
    words = f"counts {shown_counts(counts)}"
    _require_rows(operation, "x", x, counts[comm.rank], comm, words)
