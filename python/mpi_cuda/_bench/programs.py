"""Programs with an operation, for whichever library executes it: jitted once, or in a loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mpi_cuda._bench.operations import OPERATIONS, Problem

#: The axis of the mesh of all ranks.
AXIS = "ranks"


class Programs:
    """Operations that each rank calls in a program of its own, as those of this library and of
    mpi4jax: a function of the operand for each name."""

    def __init__(
        self, name: str, rank: int, calls: dict[str, Callable[[Any], Any]], launch: str
    ) -> None:
        self.name, self.rank, self.calls, self.launch = name, rank, calls, launch

    def has(self, name: str) -> bool:
        """Whether it has that operation."""
        return name in self.calls

    def prepare(self, problem: Problem) -> Program:
        """Makes the operand of this rank."""
        operand = self.array(problem.operand(self.rank))
        return Program(self, problem, operand)

    def call(self, problem: Problem, x: Any) -> Any:
        """The operation, traced."""
        return self.calls[problem.name](x)

    def array(self, own: Any) -> Any:
        """On this rank's device."""
        return jnp.asarray(own)

    def jitted(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A function of this rank's array."""
        return jax.jit(function)

    def apart(self, x: Any, y: Any) -> Any:
        """`x`, for an operation in a loop that must not be taken out of it."""
        return x


class Collectives(Programs):
    """JAX's own collectives in `shard_map`, over a mesh of one device of each rank."""

    def __init__(self, name: str, rank: int, launch: str) -> None:
        calls = {name: _native(name) for name, row in OPERATIONS.items() if row.native}
        super().__init__(name, rank, calls, launch)
        self.mesh = Mesh(np.array(jax.devices()), (AXIS,))

    def array(self, own: Any) -> Any:
        """The blocks of all ranks as one array, of which this rank holds its own."""
        shape = (own.shape[0] * self.mesh.size, *own.shape[1:])
        sharding = NamedSharding(self.mesh, P(AXIS))
        return jax.make_array_from_callback(shape, sharding, lambda _: own)

    def jitted(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A function of each rank's block."""
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
        )
        return jax.jit(mapped)

    def apart(self, x: Any, y: Any) -> Any:
        """XLA takes a collective of the same operand out of a loop; this costs nothing."""
        return lax.optimization_barrier((x, y))[0]


def _native(name: str) -> Callable[[Any], Any]:
    def ring(x: Any) -> Any:
        size = lax.axis_size(AXIS)
        return lax.ppermute(x, AXIS, [(rank, (rank + 1) % size) for rank in range(size)])

    calls: dict[str, Callable[[Any], Any]] = {
        "allreduce": lambda x: lax.psum(x, AXIS),
        "allgather": lambda x: lax.all_gather(x, AXIS),
        "alltoall": lambda x: lax.all_to_all(x, AXIS, 0, 0),
        "reduce_scatter": lambda x: lax.psum_scatter(x, AXIS),
        "sendrecv": ring,
    }
    return calls[name]


class Program:
    """An operation on an array of this rank."""

    def __init__(self, programs: Programs, problem: Problem, operand: Any) -> None:
        self.programs, self.problem, self.operand = programs, problem, operand
        self.once = programs.jitted(functools.partial(programs.call, problem))
        # Until it has, nothing is in step.
        self.once(operand).block_until_ready()
        self.loop: Callable[[Any], Any] = self.once
        self.times = 1

    def series(self, times: int) -> float:
        """Seconds of an operation; by `launch` in one launch, or with a launch for each."""
        if self.programs.launch == "once":
            start = time.perf_counter()
            for _ in range(times):
                self.once(self.operand).block_until_ready()
        else:
            if times != self.times:
                self.times, self.loop = times, self._loop(times)
                self.loop(self.operand).block_until_ready()
            start = time.perf_counter()
            self.loop(self.operand).block_until_ready()
        return (time.perf_counter() - start) / times

    def _loop(self, times: int) -> Callable[[Any], Any]:
        programs, problem = self.programs, self.problem

        # The operand is the same every time, as in C; a number of each result is used.
        def repeated(x: Any) -> Any:
            def body(_: Any, y: Any) -> Any:
                return y + programs.call(problem, programs.apart(x, y)).reshape(-1)[:1]

            return lax.fori_loop(0, times, body, jnp.zeros(1, x.dtype))

        return programs.jitted(repeated)

    def wrong(self) -> int:
        """Elements of this rank's result that are wrong."""
        result = self.once(self.operand)
        own = np.asarray(result.addressable_shards[0].data)
        return self.problem.wrong(self.programs.rank, own)


def ours(style: str, launch: str) -> Programs:
    """This library: its own operations, or JAX's collectives through it."""
    import mpi_cuda as m
    from mpi_cuda import notoken as nt

    world = m.COMM_WORLD
    rank, size = world.rank, world.size
    if style == "native":
        return Collectives("mpi_cuda", rank, launch)
    left, right = (rank - 1) % size, (rank + 1) % size
    calls: dict[str, Callable[[Any], Any]] = {
        "allreduce": lambda x: nt.allreduce(x, m.SUM),
        "allgather": nt.allgather,
        "alltoall": nt.alltoall,
        "reduce_scatter": lambda x: nt.reduce_scatter(x, m.SUM),
        "bcast": lambda x: nt.bcast(x, 0),
        "reduce": lambda x: nt.reduce(x, m.SUM, 0),
        "gather": lambda x: nt.gather(x, 0),
        "scatter": lambda x: nt.scatter(x, 0),
        "sendrecv": lambda x: nt.sendrecv(x, x, source=left, dest=right),
    }
    return Programs("mpi_cuda", rank, calls, launch)
