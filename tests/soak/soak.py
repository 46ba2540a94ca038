"""Random operations, programs, threads and mistakes against an oracle, for a time.

`mpirun -n N python tests/soak/soak.py [SECONDS] [SEED]`. All ranks draw the same random steps. Each
result is compared with what numpy says of all ranks' data, which every rank knows. A part of the
steps is wrong on one rank on purpose: then every rank must get an exception, and the next step must
be right again. Memory must stay flat once every program has been compiled.
"""

from __future__ import annotations

import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
SHAPES = [(3,), (2, 2048)]
DTYPES = ["int32", "bfloat16"]
REDUCTIONS = {"SUM": np.add, "MAX": np.maximum}
COMM = MPI.COMM_WORLD.Dup()
OTHER = MPI.COMM_WORLD.Dup()
#: The part of the steps that one rank does wrong.
WRONG = 0.1
#: What may be added to the memory of a rank after the first third of the time, in MiB.
GROWTH = 64


def data(step: int, rank: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """What a rank passes: small numbers, so that every sum is exact."""
    values = np.random.default_rng([step, rank]).integers(0, 3, shape)
    return values.astype(jnp.dtype(dtype))


def fold(op: str, arrays: list[np.ndarray]) -> np.ndarray:
    total = arrays[0]
    for array in arrays[1:]:
        total = REDUCTIONS[op](total, array)
    return total


class Step:
    """One random step: what all ranks do, and what must come of it."""

    def __init__(self, number: int, draw: random.Random):
        self.number, self.draw = number, draw
        self.shape, self.dtype = draw.choice(SHAPES), draw.choice(DTYPES)
        self.op = draw.choice(list(REDUCTIONS))
        self.root = draw.randrange(SIZE)
        self.comm = draw.choice([None, COMM])

    def all(self) -> list[np.ndarray]:
        return [data(self.number, rank, self.shape, self.dtype) for rank in range(SIZE)]

    def own(self) -> jax.Array:
        return jnp.asarray(self.all()[RANK])

    def reduce(self, op: str | None = None) -> jax.Array:
        return nt.allreduce(self.own(), getattr(m, op or self.op), comm=self.comm)

    def check(self, result: Any, expected: np.ndarray) -> None:
        np.testing.assert_array_equal(np.asarray(result), expected, str(vars(self)))

    def allreduce(self) -> None:
        self.check(self.reduce(), fold(self.op, self.all()))

    def bcast(self) -> None:
        self.check(nt.bcast(self.own(), self.root, comm=self.comm), self.all()[self.root])

    def allgather(self) -> None:
        self.check(nt.allgather(self.own(), comm=self.comm), np.stack(self.all()))

    def gather(self) -> None:
        expected = np.stack(self.all()) if self.root == RANK else self.all()[RANK]
        self.check(nt.gather(self.own(), self.root, comm=self.comm), expected)

    def scan(self) -> None:
        result = nt.scan(self.own(), getattr(m, self.op), comm=self.comm)
        self.check(result, fold(self.op, self.all()[: RANK + 1]))

    def exchange(self) -> None:
        right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
        x = self.own()
        result = nt.sendrecv(x, x, left, right, sendtag=self.root, comm=self.comm)
        self.check(result, self.all()[left])

    def messages(self) -> None:
        right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
        request = nt.irecv(self.own(), left, tag=5, comm=self.comm)
        nt.wait(nt.isend(self.own(), right, tag=5, comm=self.comm))
        self.check(nt.wait(request), self.all()[left])

    def loop(self) -> None:
        program = _loop(self.shape, self.dtype, self.comm)
        total = fold("MAX", self.all())
        self.check(program(self.own(), self.root + 1), total)

    def collective(self) -> None:
        whole = np.stack(self.all()).astype("float32")
        x = jax.make_array_from_callback(whole.shape, _rows(), whole.__getitem__)
        self.check(_sum(x), whole.sum(0))

    def far_ahead(self) -> None:
        if RANK == self.root:
            time.sleep(0.02)
        results = [self.reduce() for _ in range(40)]
        for result in results:
            self.check(result, fold(self.op, self.all()))

    def wrong_operation(self) -> None:
        if RANK == self.root:
            refused(lambda: nt.bcast(self.own(), 0, comm=self.comm))
        else:
            refused(lambda: nt.allgather(self.own(), comm=self.comm))

    def wrong_reduction(self) -> None:
        refused(lambda: self.reduce("MAX" if RANK == self.root else "MIN"))

    def wrong_dtype(self) -> None:
        dtype = "int16" if RANK == self.root else "float16"
        refused(lambda: nt.allreduce(jnp.ones(4, dtype), m.SUM, comm=self.comm))

    def wrong_length(self) -> None:
        length = 6 if RANK == self.root else 7
        refused(lambda: nt.allreduce(jnp.ones(length), m.SUM, comm=self.comm))


RIGHT = [
    *(Step.allreduce, Step.bcast, Step.allgather, Step.gather, Step.scan, Step.exchange),
    *(Step.messages, Step.loop, Step.collective, Step.far_ahead),
]
MISTAKES = [Step.wrong_operation, Step.wrong_reduction, Step.wrong_dtype, Step.wrong_length]
_programs: dict[Any, Any] = {}


def _loop(shape: tuple[int, ...], dtype: str, comm: Any) -> Any:
    def program(x: jax.Array, rounds: int) -> jax.Array:
        return jax.lax.fori_loop(0, rounds, lambda _, x: nt.allreduce(x, m.MAX, comm=comm), x)

    return _programs.setdefault((shape, dtype, id(comm)), jax.jit(program))


def _rows() -> NamedSharding:
    return NamedSharding(jax.make_mesh((SIZE,), ("x",)), P("x"))


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x.sum(0), NamedSharding(_rows().mesh, P()))


def refused(program: Callable[[], Any]) -> None:
    try:
        jax.block_until_ready(program())
    except Exception as error:
        # Else it is that of an earlier step, which somebody has read before.
        assert "Rank" in str(error) and "the launch after it" not in str(error), error
        return
    raise AssertionError("ranks that differ got no exception")


def memory() -> float:
    """MiB that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Thread(threading.Thread):
    """Allreduces on a communicator of its own, meanwhile; as many on all ranks."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rounds, self.failure, self.asked = 0, "", threading.Semaphore(0)

    def run(self) -> None:
        try:
            while self.asked.acquire():
                total = nt.allreduce(jnp.full(5, RANK), m.SUM, comm=OTHER)
                assert (np.asarray(total) == SIZE * (SIZE - 1) // 2).all(), total
                self.rounds += 1
        except BaseException as error:
            self.failure = repr(error)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    draw, thread = random.Random(seed), Thread()
    thread.start()
    start, steps, mistakes, base = time.monotonic(), 0, 0, 0.0
    while True:
        # The ranks agree on the end, and on when memory is first looked at.
        passed = np.asarray(nt.allreduce(jnp.float32(time.monotonic() - start), m.MAX))
        if passed > seconds:
            break
        if not base and passed > seconds / 3:
            base = memory()
        for _ in range(50):
            steps += 1
            step = Step(steps, draw)
            thread.asked.release()
            if draw.random() < WRONG:
                mistakes += 1
                draw.choice(MISTAKES)(step)
            else:
                draw.choice(RIGHT)(step)
            assert not thread.failure, thread.failure
    while thread.rounds < steps:
        assert not thread.failure, thread.failure
        time.sleep(0.01)
    grown = memory() - base
    print(
        f"rank {RANK}: {steps} steps, {mistakes} of them wrong on purpose and refused, "
        f"{thread.rounds} in a thread; memory {base:.0f} MiB, and {grown:+.0f} at the end",
        flush=True,
    )
    assert grown < GROWTH, f"memory has grown by {grown:.0f} MiB"


if __name__ == "__main__":
    main()
