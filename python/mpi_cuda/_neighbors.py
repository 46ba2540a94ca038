"""Collectives between neighbours in the topology of a communicator of mpi4py's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from mpi_cuda import _arguments
from mpi_cuda._arguments import Comm, Topology
from mpi_cuda._operations import Array, Token, bind, collective


def _resolve(operation: str, comm: Any) -> tuple[Comm, Topology]:
    where = _arguments.resolve_comm(comm)
    topology = _arguments.known_topology(where.number)
    if topology is None:
        raise TypeError(
            f"{operation}: comm must have a topology, as those of mpi4py's Create_cart, "
            f"Create_graph, Create_dist_graph and Create_dist_graph_adjacent have, got {comm!r}"
        )
    for edges, words in ((topology.sources, "from"), (topology.destinations, "to")):
        several = [rank for rank in edges if edges.count(rank) > 1]
        if several and not topology.is_cartesian:
            raise NotImplementedError(
                f"{operation} on rank {where.rank}: the graph has {edges.count(several[0])} edges "
                f"{words} rank {several[0]}, and MPIs differ in which block takes which of them; "
                "make one edge of them, or use alltoallv"
            )
    return where, topology


def _degrees(topology: Topology) -> dict[str, Any]:
    return {"sources": len(topology.sources), "destinations": len(topology.destinations)}


@collective
def neighbor_allgather(x: Any, *, comm: Any, token: Any = None) -> tuple[Array, Token]:
    """Sends `x` to all neighbours, and gathers theirs (MPI 4.0, section 8.6.1).

    Can be differentiated in forward and reverse mode.

    Args:
      x: array or scalar of the same shape and dtype on every rank of `comm`.
      comm: communicator of mpi4py's with a Cartesian, graph or distributed graph topology.
      token: None, or the token of the operation to come after.

    Returns:
      Array of shape `(sources, *x.shape)`, in the order of `comm.inedges`: of a Cartesian topology
      for each dimension the rank before, then the one behind. Zeros where there is none. And a
      token.

    Raises:
      TypeError: the communicator has no topology.
      NotImplementedError: a graph has several edges from one rank to another.
    """
    x, (where, topology) = jnp.asarray(x), _resolve("neighbor_allgather", comm)
    result = ((len(topology.sources), *x.shape), x.dtype)
    return bind("neighbor_allgather", where, x, result, token, **_degrees(topology))


@collective
def neighbor_alltoall(x: Any, *, comm: Any, token: Any = None) -> tuple[Array, Token]:
    """Sends `x[i]` to neighbour i, and receives from each (MPI 4.0, section 8.6.2).

    Can be differentiated in forward and reverse mode.

    Args:
      x: array of shape `(destinations, *shape)`, in the order of `comm.outedges`: of a Cartesian
        topology for each dimension what the rank before gets, then the one behind. `shape` and
        dtype are the same on every rank of `comm`.
      comm: communicator of mpi4py's with a Cartesian, graph or distributed graph topology.
      token: None, or the token of the operation to come after.

    Returns:
      Array of shape `(sources, *shape)`, in the order of `comm.inedges`. Zeros where there is no
      neighbour. And a token.

    Raises:
      TypeError: the communicator has no topology.
      NotImplementedError: a graph has several edges from one rank to another.
      ValueError: the leading dimension is not the number of neighbours.
    """
    x, (where, topology) = jnp.asarray(x), _resolve("neighbor_alltoall", comm)
    neighbors = len(topology.destinations)
    if x.ndim == 0 or x.shape[0] != neighbors:
        raise ValueError(
            f"neighbor_alltoall on rank {where.rank}: x has shape {x.shape}, and its leading "
            f"dimension must be the number of neighbours that this rank sends to, {neighbors}"
        )
    result = ((len(topology.sources), *x.shape[1:]), x.dtype)
    return bind("neighbor_alltoall", where, x, result, token, **_degrees(topology))
