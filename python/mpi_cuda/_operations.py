"""The operations, with explicit tokens. `mpi_cuda.notoken` has them without."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpi_cuda import _arguments, _jax_patches, _library
from mpi_cuda._arguments import ANY_SOURCE, ANY_TAG, Comm
from mpi_cuda._jax_patches import jax_core, linear
from mpi_cuda._primitives import TEMPLATES, Result, primitives

Array = jax.Array
Token = jax.Array


# Types of less than 8 bits, and the type in which they travel, one byte for each element; in the
# order of their numbers (`include/mpi_cuda.h`).
CARRIERS = {
    "int2": jnp.int8,
    "uint2": jnp.uint8,
    "int4": jnp.int8,
    "uint4": jnp.uint8,
    "float4_e2m1fn": jnp.float8_e4m3fn,
}


def create_token() -> Token:
    """A token to start a chain with: a 0-d int32 array, which can go wherever an array can."""
    return jnp.zeros((), np.int32)


def as_token(token: Any) -> Any:
    if token is None or jax_core.is_token(token):
        return np.zeros((), np.int32)
    aval = jax.typeof(token)
    if not hasattr(aval, "shape"):
        # A token of `jax.lax.create_token()` inside a jitted function.
        return np.zeros((), np.int32)
    if aval.shape != () or aval.dtype != np.int32:
        raise TypeError(
            "token must be None, a token of an earlier operation, or mpi_cuda.create_token(), "
            f"got {aval}"
        )
    return token


def is_template_array(x: Any) -> bool:
    """Whether the first argument of a receive is an array, which `vmap` may batch."""
    return not isinstance(x, jax.ShapeDtypeStruct)


def template_of(x: Any) -> Any:
    """Shape and dtype of what is to be received, as this JAX has it (with or without 64 bits)."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return jnp.asarray(x)
    dtype = x.dtype
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(x.shape, dtype)


def bind(
    name: str,
    comm: Comm,
    data: Any,
    result: tuple[tuple[int, ...], Any] | None,
    token: Any,
    *,
    template: Any = None,
    batch_as: str | None = None,
    paired: bool = False,
    started: tuple[str, tuple[tuple[str, int], ...]] | None = None,
    **attributes: int | tuple[int, ...],
) -> tuple[Any, Any]:
    """Calls primitive `name`; returns what it receives and its token, None where there is none.

    `token` is False for the style without tokens. `batch_as` names the rule for `vmap` where this
    rank's part differs from the operation's (a rank that is not the root). `paired`: the peer of
    the message takes its derivatives too. `started`: the collective whose end it is, and its
    attributes.
    """
    _jax_patches.install("operation")
    for dtype in ([] if data is None else [data.dtype]) + ([] if result is None else [result[1]]):
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            raise TypeError(
                f"mpi_cuda.{name}: arrays of {dtype} cannot be sent; of keys, pass "
                "jax.random.key_data(x), and wrap what arrives with jax.random.wrap_key_data"
            )
    narrow = CARRIERS.get(np.dtype(result[1]).name) if result else None
    if "op" in attributes and data is not None and data.dtype.name in CARRIERS:
        raise TypeError(
            f"mpi_cuda.{name}: there is no reduction of {data.dtype}; cast to int8 "
            "or a larger type first"
        )
    sent = "" if data is None else data.dtype.name
    received = np.dtype(result[1]).name if result else ""
    numbers = {name: number for number, name in enumerate(CARRIERS, 1)}
    types = numbers.get(sent, 0) | numbers.get(received, 0) << 8
    if types:
        # The others see that these are no bytes, and errors name them.
        attributes["type"] = types
    if data is not None and data.dtype.name in CARRIERS:
        data = data.astype(CARRIERS[data.dtype.name])
    operands = [] if data is None else [data]
    has_template = name in TEMPLATES and template is not None and is_template_array(template)
    if has_template:
        operands.append(template)
    with_token = token is not False
    if with_token:
        operands.append(as_token(token))
    outs = primitives[name].bind(
        *operands,
        result=None if result is None else Result(tuple(result[0]), np.dtype(narrow or result[1])),
        token=with_token,
        template=has_template,
        batch_as=batch_as or name,
        derived=linear.is_derived(),
        paired=paired,
        attributes=tuple(sorted({"comm": comm.number, **attributes}.items())),
        **({"started": started} if started else {}),
    )
    outs = list(outs)
    new_token = outs.pop() if with_token else None
    if narrow and result:
        outs = [outs[0].astype(result[1])]
    return (outs[0] if outs else None), new_token


def require_leading(rule: str, x: Any, comm: Comm) -> None:
    if x.ndim == 0 or x.shape[0] != comm.size:
        raise ValueError(
            f"{rule}: on rank {comm.rank} it has {x.shape}, and the leading dimension must be the "
            f"number of ranks, {comm.size}"
        )


def tell_refused(operation: str, comm: Any, error: BaseException, launches: int) -> None:
    """A collective has failed: tells the other ranks, which may be waiting in theirs.

    Only outside of programs, and if nothing was launched since there were so many
    `_library.launches`: what comes of those the library tells.
    """
    if _library.launches.value != launches:
        return
    if _library.started() is None or not jax_core.is_outside_programs():
        return
    try:
        number = _arguments.resolve_comm(comm).number
    except Exception:
        return
    words = f"{operation}, which it refused: {str(error).rstrip('.') or type(error).__name__}"
    _library.load().mpi_cuda_refuse(number, operation.encode(), words.encode())


def collective(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The other ranks hear of it if this one fails before it launches anything."""

    @functools.wraps(operation)
    def function(*args: Any, **kwargs: Any) -> Any:
        launches = _library.launches.value
        try:
            return operation(*args, **kwargs)
        except BaseException as error:
            tell_refused(operation.__name__, kwargs.get("comm"), error, launches)
            raise

    return function


@collective
def allgather(x: Any, *, comm: Any = None, token: Any = None) -> tuple[Array, Token]:
    """Gathers `x` of every rank on every rank (MPI 4.0, section 6.7).

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      Array of shape `(size, *x.shape)`, and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    return bind("allgather", where, x, ((where.size, *x.shape), x.dtype), token)


@collective
def allreduce(x: Any, op: Any, *, comm: Any = None, token: Any = None) -> tuple[Array, Token]:
    """Reduces `x` over all ranks, with the result on every rank (MPI 4.0, section 6.9.6).

    SUM can be differentiated in forward and reverse mode.

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      op: reduction, `mpi_cuda.SUM` or mpi4py's `MPI.SUM` and so on.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      Array of the shape and dtype of `x`, and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    number = _arguments.resolve_op(op).number
    return bind("allreduce", where, x, (x.shape, x.dtype), token, op=number)


@collective
def alltoall(x: Any, *, comm: Any = None, token: Any = None) -> tuple[Array, Token]:
    """Sends `x[i]` to rank i and receives from it (MPI 4.0, section 6.8).

    Args:
      x: array whose leading dimension is the number of ranks.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      Array of the shape and dtype of `x`, whose row i came from rank i, and a token.

    Raises:
      ValueError: the leading dimension is not the number of ranks.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    require_leading("Alltoall input must have shape (nproc, ...)", x, where)
    return bind("alltoall", where, x, (x.shape, x.dtype), token)


@collective
def barrier(*, comm: Any = None, token: Any = None) -> Token:
    """Waits until every rank has come here (MPI 4.0, section 6.3).

    Args:
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      A token.
    """
    return bind("barrier", _arguments.resolve_comm(comm), None, None, token)[1]


@collective
def bcast(x: Any, root: int, *, comm: Any = None, token: Any = None) -> tuple[Array, Token]:
    """Sends `x` of the root to every rank (MPI 4.0, section 6.4).

    Args:
      x: on the root the data; elsewhere an array of its shape and dtype.
      root: rank that sends.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      The root's data, and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    root = _arguments.resolve_rank("bcast", "root", root, where)
    return bind("bcast", where, x, (x.shape, x.dtype), token, root=root)


@collective
def exscan(x: Any, op: Any, *, comm: Any = None, token: Any = None) -> tuple[Array, Token]:
    """Reduces `x` over the ranks before this one (MPI 4.0, section 6.11.2).

    On rank 0, where MPI leaves the result undefined, it is the reduction's identity: 0 for SUM,
    LOR, LXOR, BOR and BXOR, 1 for PROD and LAND, the largest value for MIN and the smallest for MAX
    (infinities of real types), all bits set for BAND; and 0 for user-defined reductions.

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      op: reduction, `mpi_cuda.SUM` or mpi4py's `MPI.SUM` and so on.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      Array of the shape and dtype of `x`, and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    number = _arguments.resolve_op(op).number
    return bind("exscan", where, x, (x.shape, x.dtype), token, op=number)


@collective
def gather(x: Any, root: int, *, comm: Any = None, token: Any = None) -> tuple[Array, Token]:
    """Gathers `x` of every rank on the root (MPI 4.0, section 6.5).

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      root: rank that receives.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      On the root an array of shape `(size, *x.shape)`, elsewhere `x`; and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    root = _arguments.resolve_rank("gather", "root", root, where)
    if where.rank == root:
        return bind("gather", where, x, ((where.size, *x.shape), x.dtype), token, root=root)
    return bind("gather", where, x, (x.shape, x.dtype), token, batch_as="bcast", root=root)


def recv(
    x: Any,
    source: Any = ANY_SOURCE,
    *,
    tag: Any = ANY_TAG,
    comm: Any = None,
    status: Any = None,
    token: Any = None,
    paired: bool = False,
) -> tuple[Array, Token]:
    """Receives a message (MPI 4.0, section 3.2.4).

    Can be differentiated if both sides say that they are `paired`: the transpose sends back.

    Args:
      x: array or `jax.ShapeDtypeStruct` with the shape and dtype of the message; not written to.
      source: rank that sends, or ANY_SOURCE. From PROC_NULL one receives zeros at once.
      tag: its tag, or ANY_TAG.
      comm: communicator; None is a private one of all ranks.
      status: `MPI.Status` or `mpi_cuda.Status`, filled when the call returns.
      token: None, or the token of the operation to come after.
      paired: whether the `send` that this receives is `paired` too. Then it has derivatives, and
        source and tag must be named.

    Returns:
      Array of the shape and dtype of `x`, and a token.
    """
    template, where = template_of(x), _arguments.resolve_comm(comm)
    attributes: dict[str, Any] = {
        "source": _arguments.resolve_rank("recv", "source", source, where),
        "recvtag": _arguments.resolve_tag("recv", "recvtag", tag),
        "status": _arguments.resolve_status(status),
    }
    if paired:
        if _library.ATTRIBUTE_ANY in (attributes["source"], attributes["recvtag"]):
            raise ValueError(
                f"recv on rank {where.rank}: a paired receive must name its source and tag, since "
                "its derivatives go the other way"
            )
        if not is_template_array(template):
            # What has a tangent must be an operand.
            template = jnp.zeros(template.shape, template.dtype)
    result = (template.shape, template.dtype)
    return bind("recv", where, None, result, token, template=template, paired=paired, **attributes)


@collective
def reduce(
    x: Any, op: Any, root: int, *, comm: Any = None, token: Any = None
) -> tuple[Array, Token]:
    """Reduces `x` over all ranks, with the result on the root (MPI 4.0, section 6.9.1).

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      op: reduction, `mpi_cuda.SUM` or mpi4py's `MPI.SUM` and so on.
      root: rank that receives.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      On the root the reduction, elsewhere `x`; and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    root = _arguments.resolve_rank("reduce", "root", root, where)
    number = _arguments.resolve_op(op).number
    return bind("reduce", where, x, (x.shape, x.dtype), token, op=number, root=root)


@collective
def reduce_scatter(x: Any, op: Any, *, comm: Any = None, token: Any = None) -> tuple[Array, Token]:
    """Reduces `x` over all ranks, of which rank i gets `x[i]` (MPI 4.0, section 6.10.1).

    Args:
      x: array of shape `(size, *shape)`, of the same shape and dtype on every rank.
      op: reduction, `mpi_cuda.SUM` or mpi4py's `MPI.SUM` and so on.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      Array of shape `shape`, and a token.

    Raises:
      ValueError: the leading dimension is not the number of ranks.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    require_leading("Reduce_scatter input must have shape (nproc, ...)", x, where)
    number = _arguments.resolve_op(op).number
    return bind("reduce_scatter", where, x, (x.shape[1:], x.dtype), token, op=number)


@collective
def scan(x: Any, op: Any, *, comm: Any = None, token: Any = None) -> tuple[Array, Token]:
    """Reduces `x` over the ranks up to and including this one (MPI 4.0, section 6.11.1).

    Args:
      x: array or scalar of the same shape and dtype on every rank.
      op: reduction, `mpi_cuda.SUM` or mpi4py's `MPI.SUM` and so on.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      Array of the shape and dtype of `x`, and a token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    number = _arguments.resolve_op(op).number
    return bind("scan", where, x, (x.shape, x.dtype), token, op=number)


@collective
def scatter(x: Any, root: int, *, comm: Any = None, token: Any = None) -> tuple[Array, Token]:
    """Sends `x[i]` of the root to rank i (MPI 4.0, section 6.6).

    Args:
      x: on the root an array of shape `(size, *shape)`, elsewhere an array of shape `shape`.
      root: rank that sends.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.

    Returns:
      Array of shape `shape`, and a token.

    Raises:
      ValueError: on the root, if the leading dimension is not the number of ranks.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    root = _arguments.resolve_rank("scatter", "root", root, where)
    if where.rank != root:
        return bind("scatter", where, x, (x.shape, x.dtype), token, batch_as="bcast", root=root)
    require_leading("Scatter input must have shape (nproc, ...) on the root", x, where)
    return bind("scatter", where, x, (x.shape[1:], x.dtype), token, root=root)


def send(
    x: Any,
    dest: int,
    *,
    tag: int = 0,
    comm: Any = None,
    token: Any = None,
    paired: bool = False,
) -> Token:
    """Sends `x` (MPI 4.0, section 3.2.1).

    Can be differentiated if both sides say that they are `paired`: the transpose receives.

    Args:
      x: array or scalar.
      dest: rank to send to; to PROC_NULL nothing is sent.
      tag: tag of the message.
      comm: communicator; None is a private one of all ranks.
      token: None, or the token of the operation to come after.
      paired: whether the `recv` that receives it is `paired` too. Then it has derivatives.

    Returns:
      A token.
    """
    x, where = jnp.asarray(x), _arguments.resolve_comm(comm)
    attributes: dict[str, Any] = {
        "dest": _arguments.resolve_rank("send", "dest", dest, where),
        "tag": _arguments.resolve_tag("send", "tag", tag),
    }
    return bind("send", where, x, None, token, paired=paired, **attributes)[1]


def sendrecv(
    sendbuf: Any,
    recvbuf: Any,
    source: Any,
    dest: int,
    *,
    sendtag: int = 0,
    recvtag: Any = ANY_TAG,
    comm: Any = None,
    status: Any = None,
    token: Any = None,
) -> tuple[Array, Token]:
    """Sends one message and receives another, which cannot deadlock (MPI 4.0, section 3.11).

    Can be differentiated with respect to `sendbuf`: the transpose sends the other way.

    Args:
      sendbuf: array or scalar to send.
      recvbuf: array or `jax.ShapeDtypeStruct` with the shape and dtype to receive, which may
        differ from those sent; not written to.
      source: rank to receive from, or ANY_SOURCE. From PROC_NULL one receives zeros.
      dest: rank to send to; to PROC_NULL nothing is sent.
      sendtag: tag of the message sent.
      recvtag: tag of the message received, or ANY_TAG.
      comm: communicator; None is a private one of all ranks.
      status: `MPI.Status` or `mpi_cuda.Status`, filled when the call returns.
      token: None, or the token of the operation to come after.

    Returns:
      Array of the shape and dtype of `recvbuf`, and a token.
    """
    x, tags = jnp.asarray(sendbuf), (sendtag, recvtag)
    return _exchange("sendrecv", x, template_of(recvbuf), source, dest, tags, comm, status, token)


def sendrecv_replace(
    x: Any,
    source: Any,
    dest: int,
    *,
    sendtag: int = 0,
    recvtag: Any = ANY_TAG,
    comm: Any = None,
    status: Any = None,
    token: Any = None,
) -> tuple[Array, Token]:
    """Sends `x`, and receives a message like it in its place (MPI 4.0, section 3.11).

    It is `sendrecv` of `x` into `x`: arrays of JAX are not written to, and what is received is a
    new one. Can be differentiated: the transpose sends the other way.

    Args:
      x: array or scalar to send; what is received has its shape and dtype.
      source: rank to receive from, or ANY_SOURCE. From PROC_NULL one receives zeros.
      dest: rank to send to; to PROC_NULL nothing is sent.
      sendtag: tag of the message sent.
      recvtag: tag of the message received, or ANY_TAG.
      comm: communicator; None is a private one of all ranks.
      status: `MPI.Status` or `mpi_cuda.Status`, filled when the call returns.
      token: None, or the token of the operation to come after.

    Returns:
      Array of the shape and dtype of `x`, and a token.
    """
    x, tags = jnp.asarray(x), (sendtag, recvtag)
    return _exchange("sendrecv_replace", x, x, source, dest, tags, comm, status, token)


def _exchange(
    name: str,
    x: Any,
    template: Any,
    source: Any,
    dest: int,
    tags: tuple[int, Any],
    comm: Any,
    status: Any,
    token: Any,
) -> tuple[Array, Token]:
    where = _arguments.resolve_comm(comm)
    attributes: dict[str, Any] = {
        "source": _arguments.resolve_rank(name, "source", source, where),
        "dest": _arguments.resolve_rank(name, "dest", dest, where),
        "tag": _arguments.resolve_tag(name, "tag", tags[0]),
        "recvtag": _arguments.resolve_tag(name, "recvtag", tags[1]),
        "status": _arguments.resolve_status(status),
    }
    result = (template.shape, template.dtype)
    return bind("sendrecv", where, x, result, token, template=template, **attributes)
