"""Collectives that are started, and end in `wait`, with computation between (MPI 4.0, 6.12).

All ranks start them in one order with the other collectives of the communicator, and compare them
where they start. The library copies what is passed. A reduction cannot be one of the user's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpi_cuda import _arguments
from mpi_cuda._arguments import Comm
from mpi_cuda._jax_patches import jax_core, linear
from mpi_cuda._nonblocking import Request
from mpi_cuda._operations import Token, bind, collective, require_leading
from mpi_cuda._primitives import SUM_NUMBER, Result, stand_ins

_NUMBER = ((), np.uint32)


def _start(
    name: str,
    where: Comm,
    x: Any,
    shape: tuple[int, ...],
    token: Any,
    rule: str | None = None,
    **attributes: Any,
) -> tuple[Request, Token]:
    """Starts collective `name`, whose result has that shape; `rule` its `batch_as` for `bind`."""
    rule = rule or name
    batch_as = f"i{rule}" if name == "scatter" else None
    number, token = bind(f"i{name}", where, x, _NUMBER, token, batch_as=batch_as, **attributes)
    all_attributes = tuple(sorted({"comm": where.number, **attributes}.items()))
    # What vmap and derivatives need of it. Where the request leaves `jit`, or goes through a loop
    # or a branch, zeros of that size are written; else it takes neither memory nor time.
    template: Any
    is_linear = name in stand_ins and attributes.get("op", SUM_NUMBER) == SUM_NUMBER
    if not (is_linear and linear.is_differentiable(jax.typeof(x))):
        template = np.float32(0) if jax_core.is_outside_programs() else linear.nothing(x)
    elif jax_core.is_outside_programs():
        template = np.broadcast_to(np.zeros((), x.dtype), shape)
    else:
        (template,) = stand_ins[name].bind(
            x,
            result=Result(shape, np.dtype(x.dtype)),
            token=False,
            template=False,
            batch_as=rule,
            derived=False,
            paired=False,
            attributes=all_attributes,
        )
    started = name, rule, all_attributes
    return Request(number, template, shape, np.dtype(x.dtype), where, started), token


@collective
def iallgather(x: Any, *, comm: Any = None, token: Any = None) -> tuple[Request, Token]:
    """Starts `allgather` (MPI 4.0, section 6.12.5).

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns an array of shape `(size, *x.shape)`; and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    return _start("allgather", where, x, (where.size, *x.shape), token)


@collective
def iallreduce(x: Any, op: Any, *, comm: Any = None, token: Any = None) -> tuple[Request, Token]:
    """Starts `allreduce` (MPI 4.0, section 6.12.8).

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      op: reduction, `mpi_cuda.SUM` or mpi4py's `MPI.SUM` and so on; none of the user's own.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns an array like `x`; and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    number = _arguments.resolve_op(op).number
    return _start("allreduce", where, x, x.shape, token, op=number)


@collective
def ialltoall(x: Any, *, comm: Any = None, token: Any = None) -> tuple[Request, Token]:
    """Starts `alltoall` (MPI 4.0, section 6.12.6).

    Args:
      x: array whose leading dimension is the number of ranks.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns an array like `x`,
      whose row i came from rank i; and a token.

    Raises:
      ValueError: the leading dimension is not the number of ranks.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    require_leading("Ialltoall input must have shape (nproc, ...)", x, where)
    return _start("alltoall", where, x, x.shape, token)


@collective
def ibarrier(*, comm: Any = None, token: Any = None) -> tuple[Request, Token]:
    """Starts `barrier`: its `wait` returns when every rank has started it (MPI 4.0, 6.12.1).

    Args:
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns None; and a token.
    """
    where = _arguments.resolve_comm(comm)
    number, token = bind("ibarrier", where, None, _NUMBER, token)
    started = "barrier", "barrier", (("comm", where.number),)
    return Request(number, None, None, None, where, started), token


@collective
def ibcast(x: Any, root: int, *, comm: Any = None, token: Any = None) -> tuple[Request, Token]:
    """Starts `bcast` (MPI 4.0, section 6.12.2).

    Args:
      x: on the root the data; elsewhere an array of its shape and dtype.
      root: rank that sends.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns the root's `x`; and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    root = _arguments.resolve_rank("ibcast", "root", root, where)
    return _start("bcast", where, x, x.shape, token, root=root)


@collective
def iexscan(x: Any, op: Any, *, comm: Any = None, token: Any = None) -> tuple[Request, Token]:
    """Starts `exscan` (MPI 4.0, section 6.12.12).

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      op: reduction, `mpi_cuda.SUM` or mpi4py's `MPI.SUM` and so on; none of the user's own.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns an array like `x`, on
      rank 0 the identity as of `exscan`; and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    number = _arguments.resolve_op(op).number
    return _start("exscan", where, x, x.shape, token, op=number)


@collective
def igather(x: Any, root: int, *, comm: Any = None, token: Any = None) -> tuple[Request, Token]:
    """Starts `gather` (MPI 4.0, section 6.12.3).

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      root: rank that receives.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns on the root an array of shape `(size, *x.shape)`,
      elsewhere `x`; and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    root = _arguments.resolve_rank("igather", "root", root, where)
    if where.rank == root:
        return _start("gather", where, x, (where.size, *x.shape), token, root=root)
    return _start("gather", where, x, x.shape, token, "bcast", root=root)


@collective
def ireduce(
    x: Any, op: Any, root: int, *, comm: Any = None, token: Any = None
) -> tuple[Request, Token]:
    """Starts `reduce` (MPI 4.0, section 6.12.7).

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      op: reduction, `mpi_cuda.SUM` or mpi4py's `MPI.SUM` and so on; none of the user's own.
      root: rank that receives.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns on the root the reduction, elsewhere `x`; and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    root = _arguments.resolve_rank("ireduce", "root", root, where)
    number = _arguments.resolve_op(op).number
    return _start("reduce", where, x, x.shape, token, op=number, root=root)


@collective
def ireduce_scatter(
    x: Any, op: Any, *, comm: Any = None, token: Any = None
) -> tuple[Request, Token]:
    """Starts `reduce_scatter` (MPI 4.0, section 6.12.9).

    Args:
      x: array of shape `(size, *shape)`, of the same shape and dtype on every rank.
      op: reduction, `mpi_cuda.SUM` or mpi4py's `MPI.SUM` and so on; none of the user's own.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns an array of shape `shape`; and a token.

    Raises:
      ValueError: the leading dimension is not the number of ranks.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    require_leading("Ireduce_scatter input must have shape (nproc, ...)", x, where)
    number = _arguments.resolve_op(op).number
    return _start("reduce_scatter", where, x, x.shape[1:], token, op=number)


@collective
def iscan(x: Any, op: Any, *, comm: Any = None, token: Any = None) -> tuple[Request, Token]:
    """Starts `scan` (MPI 4.0, section 6.12.11).

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      op: reduction, `mpi_cuda.SUM` or mpi4py's `MPI.SUM` and so on; none of the user's own.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns an array like `x`; and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    number = _arguments.resolve_op(op).number
    return _start("scan", where, x, x.shape, token, op=number)


@collective
def iscatter(x: Any, root: int, *, comm: Any = None, token: Any = None) -> tuple[Request, Token]:
    """Starts `scatter` (MPI 4.0, section 6.12.4).

    Args:
      x: on the root an array of shape `(size, *shape)`, elsewhere an array of shape `shape`.
      root: rank that sends.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request, for which `wait` returns an array of shape `shape`; and a token.

    Raises:
      ValueError: on the root, if the leading dimension is not the number of ranks.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    root = _arguments.resolve_rank("iscatter", "root", root, where)
    if where.rank != root:
        return _start("scatter", where, x, x.shape, token, "bcast", root=root)
    require_leading("Iscatter input must have shape (nproc, ...) on the root", x, where)
    return _start("scatter", where, x, x.shape[1:], token, root=root)
