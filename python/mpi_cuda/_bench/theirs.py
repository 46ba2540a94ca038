"""mpi4jax on JAX's own CPU backend, in a job of its own: `bench --only mpi4jax`.

Its ranks are mpi4py's: this library joins no job there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpi_cuda._bench.programs import Programs


class Peers:
    """The ranks of mpi4py's world."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()

    def gather(self, own: Any) -> list[Any]:
        """What each rank passes; collective."""
        return self.comm.allgather(own)

    def gather_numbers(self, own: list[float]) -> list[list[float]]:
        """What each rank passes; collective."""
        return self.comm.allgather(own)


def mpi4jax(rank: int, size: int, launch: str) -> Programs:
    """Its operations; it has no reduce_scatter."""
    import mpi4jax as theirs
    from mpi4py import MPI

    def call(name: str, *arguments: Any, **named: Any) -> Callable[[Any], Any]:
        def called(x: Any) -> Any:
            result = getattr(theirs, name)(x, *arguments, **named)
            # Up to 0.7 there is a token too.
            return result[0] if isinstance(result, (tuple, list)) else result

        return called

    left, right = (rank - 1) % size, (rank + 1) % size

    def ring(x: Any) -> Any:
        return call("sendrecv", x, source=left, dest=right)(x)

    calls: dict[str, Callable[[Any], Any]] = {
        "allreduce": call("allreduce", op=MPI.SUM),
        "allgather": call("allgather"),
        "alltoall": call("alltoall"),
        "bcast": call("bcast", 0),
        "reduce": call("reduce", MPI.SUM, 0),
        "gather": call("gather", 0),
        "scatter": call("scatter", 0),
        "sendrecv": ring,
    }
    return Programs("mpi4jax", rank, calls, launch)
