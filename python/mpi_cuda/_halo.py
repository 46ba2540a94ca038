"""The exchange of ghost cells: of all sides of any number of arrays in one call.

It is made of `sendrecv` alone, of which it has its order, derivatives and `vmap`. The dimensions of
the process grid are exchanged one after the other, and a side is as long as the whole array, ghost
cells included. So what came from the neighbours in one dimension goes on to those in the next one,
and the corners are right without messages of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpi_cuda import _arguments
from mpi_cuda._arguments import PROC_NULL, Comm
from mpi_cuda._jax_patches import jax_core
from mpi_cuda._operations import Token, as_token, sendrecv

# Messages to higher and to lower coordinates. MPI has at least the tags to 32767 (MPI 4.0, section
# 9.1.2); the largest are those that a program is least likely to use itself.
TAG_UP, TAG_DOWN = 32766, 32767


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One dimension of the process grid, as this rank sees it."""

    axis: int  # of the arrays; may count from the end
    low: int  # ghost cells on the side of lower indices
    high: int  # and of higher ones
    size: int  # ranks in this dimension
    below: int | None  # the neighbour with the lower coordinate, if there is one
    above: int | None


def halo_exchange(
    arrays: Any,
    grid: Sequence[int] | None = None,
    *,
    axes: Sequence[int] | None = None,
    width: Any = 1,
    periodic: Any = None,
    comm: Any = None,
    token: Any = None,
) -> tuple[Any, Token]:
    """Fills the ghost cells of arrays with the neighbours' cells, corners included.

    The ranks form a Cartesian grid in row-major order, as those of MPI_Cart_create (MPI 4.0,
    section 8.2). An array has this rank's part in its interior, and ghost cells around it. All
    arrays of a dtype go in one message for each direction. Ghost cells beyond the end of a
    dimension that is not periodic keep their values; those of them that are also ghost cells
    towards a neighbour in another dimension get what that neighbour has there. Can be
    differentiated and batched.

    Args:
      arrays: an array, or a tree of arrays, whose shapes and dtypes may differ.
      grid: ranks in each dimension. None: those of `comm` if that is an mpi4py Cartcomm, else all
        ranks in one dimension.
      axes: axis of the arrays that each dimension of the grid divides; may be negative. None: the
        first ones.
      width: ghost cells on each side: a number, or for each dimension of the grid a number or a
        pair `(low, high)`. The same on all ranks.
      periodic: whether the last rank of a dimension is the first one's neighbour: one truth value,
        or one for each dimension. None: as the Cartcomm says, else False.
      comm: communicator; None is a private one of all ranks. Of a Cartcomm pass the object itself.
      token: None, or the token of the operation to come after.

    Returns:
      The arrays with their ghost cells filled, as the tree that was passed, and a token.

    Raises:
      TypeError: an argument is of the wrong kind, or an array has no dtype that can be sent.
      ValueError: the grid is not one of the communicator's ranks, an axis is not one of the array's
        or is named twice, or an array is too small for its ghost cells.
    """
    where = _arguments.resolve_comm(comm)
    dimensions = _dimensions(where, _topology(comm), grid, axes, width, periodic)
    leaves, tree = jax.tree.flatten(arrays)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    for number, leaf in enumerate(leaves):
        _check(where, leaf, number, dimensions)
    # Outside of programs as one program: a launch, not one for each slice.
    if jax_core.is_outside_programs():
        arguments = leaves, None if token is False else as_token(token)
        leaves, token = _fill_at_once(arguments, where, dimensions)
    else:
        token = token if token is False else as_token(token)
        leaves, token = _fill(leaves, token, where, dimensions)
    return jax.tree.unflatten(tree, leaves), token


def _topology(comm: Any) -> tuple[tuple[int, ...], tuple[bool, ...]] | None:
    """Ranks in each dimension of an mpi4py Cartcomm, and which dimensions are periodic."""
    mpi = _arguments.mpi4py()
    if mpi is None or not isinstance(comm, mpi.Intracomm) or comm.Get_topology() != mpi.CART:
        return None
    dims, periods, _ = mpi.Cartcomm(comm).Get_topo()
    return tuple(dims), tuple(map(bool, periods))


def _dimensions(
    comm: Comm, topology: Any, grid: Any, axes: Any, width: Any, periodic: Any
) -> tuple[Dimension, ...]:
    """The arguments, each dimension of the grid for itself.

    Raises:
      TypeError, ValueError: they are wrong in themselves, whatever the arrays.
    """
    here = f"halo_exchange on rank {comm.rank}"
    sizes = _grid(here, comm, topology, grid)
    count = len(sizes)
    if periodic is None:
        periodic = False if topology is None else topology[1]
    around = _for_each(here, "periodic", periodic, sizes)
    widths = [_width(here, one) for one in _for_each(here, "width", width, sizes)]
    along = [
        _arguments.integer("halo_exchange", "an entry of axes", axis)
        for axis in (range(count) if axes is None else _for_each(here, "axes", axes, sizes))
    ]
    found, stride = [], comm.size
    for size, axis, (low, high), wraps in zip(sizes, along, widths, around, strict=True):
        # The last dimension varies fastest.
        stride //= size
        place = comm.rank // stride % size
        first = comm.rank - place * stride
        neighbours = [
            first + other % size * stride if wraps or 0 <= other < size else None
            for other in (place - 1, place + 1)
        ]
        found.append(Dimension(axis, low, high, size, *neighbours))
    return tuple(found)


def _grid(here: str, comm: Comm, topology: Any, grid: Any) -> tuple[int, ...]:
    if grid is None:
        return (comm.size,) if topology is None else topology[0]
    entries = grid if isinstance(grid, Sequence | np.ndarray) else (grid,)
    sizes = tuple(_arguments.integer("halo_exchange", "an entry of grid", n) for n in entries)
    if topology is not None and sizes != topology[0]:
        raise ValueError(
            f"{here}: grid is {sizes}, and that of the Cartesian communicator {topology[0]}: leave "
            "grid out"
        )
    if min(sizes, default=1) < 1 or math.prod(sizes) != comm.size:
        raise ValueError(
            f"{here}: grid {sizes} has {math.prod(sizes)} places, and the communicator {comm.size} "
            "ranks: the product of grid must be the number of ranks, as that of "
            "MPI.Compute_dims is"
        )
    return sizes


def _for_each(here: str, what: str, value: Any, sizes: tuple[int, ...]) -> list[Any]:
    """One value for each dimension of the grid: the entries, or the one there is."""
    if not isinstance(value, Sequence | np.ndarray):
        if what == "axes" and len(sizes) != 1:
            raise TypeError(f"{here}: axes must be a sequence of integers, got {value!r}")
        return [value] * len(sizes)
    if len(value) != len(sizes):
        raise ValueError(
            f"{here}: {what} {value} has {len(value)} entries, and the grid {sizes} "
            f"{len(sizes)} dimensions: pass one entry for each dimension"
        )
    return list(value)


def _width(here: str, entry: Any) -> tuple[int, int]:
    pair = tuple(entry) if isinstance(entry, Sequence | np.ndarray) else (entry, entry)
    if len(pair) != 2:
        raise ValueError(
            f"{here}: an entry of width is {entry}: pass a number, or a pair (low, high)"
        )
    low, high = (_arguments.integer("halo_exchange", "an entry of width", n) for n in pair)
    if low < 0 or high < 0:
        raise ValueError(f"{here}: width {entry} is negative")
    return low, high


def _check(comm: Comm, leaf: Any, number: int, dimensions: tuple[Dimension, ...]) -> None:
    """Whether an array can be exchanged.

    Raises:
      TypeError, ValueError: it cannot.
    """
    here = f"halo_exchange on rank {comm.rank}: array {number}, {leaf.dtype}{list(leaf.shape)},"
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(
            f"{here} cannot be sent; of keys, pass jax.random.key_data(x), and wrap what comes "
            "back with jax.random.wrap_key_data"
        )
    seen: set[int] = set()
    for dimension in dimensions:
        axis, ndim = dimension.axis, leaf.ndim
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{here} has no axis {axis}: it needs an axis for each dimension of the grid "
                "(axes= says which), or must be left out"
            )
        if axis % ndim in seen:
            raise ValueError(f"{here} would be divided twice along axis {axis}: see axes=")
        seen.add(axis % ndim)
        low, high = dimension.low, dimension.high
        inside = leaf.shape[axis] - low - high
        alone = dimension.below is None and dimension.above is None
        if inside < (0 if alone else max(low, high)):
            raise ValueError(
                f"{here} has {leaf.shape[axis]} cells along axis {axis}, of which {low} and {high} "
                f"are ghost cells: its own {max(inside, 0)} cells must be at least as many as the "
                "widest side: use fewer ranks along this axis, a smaller width or a larger array"
            )


def _fill(
    leaves: list[Any], token: Any, comm: Comm, dimensions: tuple[Dimension, ...]
) -> tuple[list[Any], Any]:
    for dimension in dimensions:
        leaves, token = _fill_dimension(leaves, token, comm, dimension)
    return leaves, token


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fill_at_once(
    arrays: tuple[list[Any], Any], comm: Comm, dimensions: tuple[Dimension, ...]
) -> tuple[list[Any], Any]:
    """The same as one program, of arrays and a token (None: without)."""
    leaves, token = arrays
    leaves, token = _fill(leaves, False if token is None else token, comm, dimensions)
    return leaves, None if token is False else token


def _fill_dimension(
    leaves: list[Any], token: Any, comm: Comm, dimension: Dimension
) -> tuple[list[Any], Any]:
    """Fills the ghost cells on both sides of one dimension."""
    axis, low, high = dimension.axis, dimension.low, dimension.high
    below, above = dimension.below, dimension.above
    if below is None and above is None:
        return leaves, token
    # What the neighbours need: the last cells of the interior, and the first ones.
    up, down = [], []
    for x in leaves:
        end = x.shape[axis] - high
        up.append(jax.lax.slice_in_dim(x, end - low, end, axis=axis))
        down.append(jax.lax.slice_in_dim(x, low, low + high, axis=axis))
    # XLA sees by this that nothing but the writes below needs the arrays, once both are read. So it
    # writes in place, without a copy of each array.
    up, down = jax.lax.optimization_barrier((up, down))
    if dimension.size == 1:
        from_below, from_above = up, down
    elif dimension.size == 2:
        # Both sides have the same neighbour, or one has none: one message each way.
        peer = above if above is not None else below
        sent = (up if above is not None else []) + (down if below is not None else [])
        wanted = (up if below is not None else []) + (down if above is not None else [])
        got, token = _sendrecv(sent, wanted, peer, peer, TAG_UP, comm, token)
        from_below, from_above = got, got[-len(leaves) :]
    else:
        from_below, token = _sendrecv(up, up, below, above, TAG_UP, comm, token)
        from_above, token = _sendrecv(down, down, above, below, TAG_DOWN, comm, token)
    filled = []
    for x, first, last in zip(leaves, from_below, from_above, strict=False):
        if below is not None and low:
            x = jax.lax.dynamic_update_slice_in_dim(x, first, 0, axis)
        if above is not None and high:
            x = jax.lax.dynamic_update_slice_in_dim(x, last, x.shape[axis] - high, axis)
        filled.append(x)
    return filled, token


def _sendrecv(
    sent: list[Any],
    wanted: list[Any],
    source: Any,
    dest: Any,
    tag: int,
    comm: Comm,
    token: Any,
) -> tuple[list[Any], Any]:
    """Sends the arrays `sent` and receives such as `wanted`: those of a dtype in one message."""
    received = list(wanted)
    for dtype in dict.fromkeys(x.dtype for x in sent):
        message = jnp.concatenate([x.ravel() for x in sent if x.dtype == dtype])
        places = [place for place, x in enumerate(wanted) if x.dtype == dtype]
        ends = np.cumsum([wanted[place].size for place in places])
        expected = jax.ShapeDtypeStruct((int(ends[-1]),), dtype)
        if not message.size and not expected.size:
            continue
        # An empty message goes too, where the other direction has cells: its length is compared.
        giver: Any = PROC_NULL if source is None else source
        taker: Any = PROC_NULL if dest is None else dest
        tags: dict[str, Any] = {"sendtag": tag, "recvtag": tag}
        got, token = sendrecv(message, expected, giver, taker, **tags, comm=comm, token=token)
        for place, part in zip(places, jnp.split(got, ends[:-1]), strict=True):
            received[place] = part.reshape(wanted[place].shape)
    return received, token
