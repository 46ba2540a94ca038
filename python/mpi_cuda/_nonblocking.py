"""Messages whose start and end are separate operations, with computation between them; and the end
of collectives that were started (`_nonblocking_collectives`)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpi_cuda import _arguments
from mpi_cuda._arguments import ANY_SOURCE, ANY_TAG, Comm
from mpi_cuda._jax_patches import linear
from mpi_cuda._operations import Array, Token, bind, is_template_array, template_of

_NUMBER = ((), np.uint32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What was started by `isend`, `irecv`, `iallreduce` and the like; give it to `wait` once.

    A tree of arrays: it can be returned from `jit`, carried by loops, given back by both branches.
    """

    number: Any
    template: Any
    shape: tuple[int, ...] | None = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    comm: Comm = dataclasses.field(metadata={"static": True})
    # Of a collective: its name, its rule for `vmap` and its attributes.
    started: tuple[str, str, tuple[tuple[str, int], ...]] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )


def isend(
    x: Any, dest: int, *, tag: int = 0, comm: Any = None, token: Any = None
) -> tuple[Request, Token]:
    """Starts to send `x` (MPI 4.0, section 3.7.2).

    The library copies `x`. The message moves on while the program computes; what is never waited
    for is complete when the program ends without an error.

    Args:
      x: array or scalar.
      dest: rank to send to; to PROC_NULL nothing is sent.
      tag: tag of the message.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request for `wait`, and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    attributes: dict[str, Any] = {
        "dest": _arguments.resolve_rank("isend", "dest", dest, where),
        "tag": _arguments.resolve_tag("isend", "tag", tag),
    }
    number, token = bind("isend", where, x, _NUMBER, token, **attributes)
    return Request(number, None, None, None, where), token


def irecv(
    x: Any,
    source: Any = ANY_SOURCE,
    *,
    tag: Any = ANY_TAG,
    comm: Any = None,
    token: Any = None,
) -> tuple[Request, Token]:
    """Starts to receive a message (MPI 4.0, section 3.7.2).

    Messages are matched in the order in which receives of both kinds are started.

    Args:
      x: array or `jax.ShapeDtypeStruct` with the shape and dtype of the message; not written to.
      source: rank that sends, or ANY_SOURCE. From PROC_NULL one receives zeros.
      tag: its tag, or ANY_TAG.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A request for `wait`, and a token.
    """
    template, where = template_of(x), _arguments.resolve_comm(comm)
    attributes: dict[str, Any] = {
        "source": _arguments.resolve_rank("irecv", "source", source, where),
        "recvtag": _arguments.resolve_tag("irecv", "recvtag", tag),
    }
    # Tells the dtype.
    empty = jnp.zeros((0,), template.dtype)
    number, token = bind("irecv", where, empty, _NUMBER, token, template=template, **attributes)
    # What vmap needs of it: whether it is batched.
    kept = linear.nothing(template) if is_template_array(template) else None
    return Request(number, kept, tuple(template.shape), np.dtype(template.dtype), where), token


def wait(request: Request, *, status: Any = None, token: Any = None) -> tuple[Array | None, Token]:
    """Waits until a message or a collective is complete (MPI 4.0, section 3.7.3).

    Args:
      request: what `isend`, `irecv` or the start of a collective returned; each is waited for once.
      status: `MPI.Status` or `mpi_cuda.Status`, filled when the operation has run; of a receive.
      token: None, or the token of the operation to come after.

    Returns:
      What `irecv` received, or the result of the collective; None for `isend` and `ibarrier`. And a
      token.

    Raises:
      TypeError: it is no request.
      ValueError: a status for a collective, which has none; requests that are stacked.
    """
    if not isinstance(request, Request):
        raise TypeError(
            "wait: request must be what isend, irecv or the start of a collective returned, got "
            f"{request!r}"
        )
    if shape := jnp.shape(request.number):
        raise ValueError(
            f"wait: request is an array of {math.prod(shape)} requests, as scan and vmap stack "
            "them; jax.lax.map(wait, requests) waits for one after the other"
        )
    rule, started = None, None
    if request.started is not None:
        name, rule, of_start = request.started
        started = name, of_start
        if status is not None:
            raise ValueError(f"wait: i{name} has no status to fill; only what irecv receives has")
    if request.shape is None:
        return bind("wait_send", request.comm, request.number, None, token, started=started)
    attributes: dict[str, Any] = {"status": _arguments.resolve_status(status)}
    result = (request.shape, request.dtype)
    # Who started it outside of programs waits for no derivative and no batch.
    kept = None if isinstance(request.template, np.ndarray | np.generic) else request.template
    return bind(
        *("wait", request.comm, request.number, result, token),
        **{"template": kept, "batch_as": rule, "started": started, **attributes},
    )
