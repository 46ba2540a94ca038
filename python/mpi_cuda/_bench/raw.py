"""MPI without JAX: its own calls in a loop, on arrays that lie in huge pages, as ours do.

`mpi` is a loop of the library's (`mpi_cuda_raw` in `mpi_cuda.h`) around the call that an operation
ends in, with nothing of the engine. `sendrecv` is there what it is to this library: `MPI_Isend`,
`MPI_Mprobe` and `MPI_Mrecv`. `mpi4py` is a loop of Python's around mpi4py's calls with buffers,
which cost some 0.2 us each; its `sendrecv` is `MPI_Sendrecv`.

Without huge pages a comparison of large arrays would say what pages do: ranks of a node copy each
other's memory page by page (`docs/mpi.md`, "Memory of messages").
"""

from __future__ import annotations

import importlib.util
import mmap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_cuda import _library
from mpi_cuda._bench.operations import Problem

#: Bytes of a huge page on x86-64.
HUGE = 2 << 20
#: mpi4py's names; MPI has none for 16-bit floats.
DATATYPES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "int8": "INT8_T",
    "uint8": "UINT8_T",
    "int32": "INT32_T",
    "int64": "INT64_T",
}


def array(shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    """Zeros in huge pages, as far as Linux has some to give."""
    bytes_ = max(1, int(np.prod(shape)) * dtype.itemsize)
    # Private: memory that could be shared has small pages, whatever is asked for.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, -(-bytes_ // HUGE) * HUGE + HUGE, flags)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        # A kernel without them.
        pass
    start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE
    found = np.frombuffer(memory, np.uint8, bytes_, start)
    found[:] = 0
    return found.view(dtype).reshape(shape)


class _Arrays:
    """An operand and a result of this rank."""

    def __init__(self, problem: Problem, rank: int) -> None:
        self.problem, self.rank = problem, rank
        self.send = array(problem.sent(rank), problem.dtype)
        self.send[...] = problem.operand(rank)
        self.recv = array(problem.got(), problem.dtype)
        operation = problem.operation
        # MPI broadcasts in place, and the root's result is its operand.
        self.has_result = not (problem.name == "bcast" and rank == 0)
        self.has_result &= not (operation.root_gets and rank != 0)

    def wrong(self) -> int:
        """Runs it once, and counts."""
        self.recv[...] = 0
        self.series(1)
        return self.problem.wrong(self.rank, self.recv) if self.has_result else 0

    def series(self, times: int) -> float:
        raise NotImplementedError


class _Raw(_Arrays):
    def series(self, times: int) -> float:
        """Seconds of a call."""
        problem = self.problem
        seconds = _library.load().mpi_cuda_raw(
            problem.name.encode(),
            problem.dtype.name.encode(),
            problem.count,
            self.send.ctypes.data,
            self.recv.ctypes.data,
            times,
        )
        if seconds < 0:
            raise RuntimeError(f"MPI's own {problem.name}: {_library.last_error()}")
        return float(seconds)


class Mpi:
    """MPI itself, in a loop of the library's."""

    name = "mpi"

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def has(self, name: str) -> bool:
        """All that there are."""
        return True

    def prepare(self, problem: Problem) -> _Raw:
        """Makes arrays."""
        return _Raw(problem, self.rank)


class _Call(_Arrays):
    def __init__(self, problem: Problem, rank: int) -> None:
        super().__init__(problem, rank)
        self.call = _of_mpi4py(problem, rank, self.send, self.recv)

    def series(self, times: int) -> float:
        """Seconds of a call."""
        call, start = self.call, time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times


def _of_mpi4py(problem: Problem, rank: int, send: NDArray, recv: NDArray) -> Callable[[], Any]:
    from mpi4py import MPI

    comm, datatype = MPI.COMM_WORLD, getattr(MPI, DATATYPES[problem.dtype.name])
    # With their type, so that mpi4py need not ask for it.
    operand, result = [send, datatype], [recv, datatype]
    source, dest = (rank - 1) % problem.ranks, (rank + 1) % problem.ranks
    got, passed = (result, operand) if rank == 0 else (None, None)
    calls: dict[str, Callable[[], Any]] = {
        "allreduce": lambda: comm.Allreduce(operand, result, MPI.SUM),
        "allgather": lambda: comm.Allgather(operand, result),
        "alltoall": lambda: comm.Alltoall(operand, result),
        "reduce_scatter": lambda: comm.Reduce_scatter_block(operand, result, MPI.SUM),
        "bcast": lambda: comm.Bcast(operand if rank == 0 else result, 0),
        "reduce": lambda: comm.Reduce(operand, got, MPI.SUM, 0),
        "gather": lambda: comm.Gather(operand, got, 0),
        "scatter": lambda: comm.Scatter(passed, result, 0),
        "sendrecv": lambda: comm.Sendrecv(operand, dest, 0, result, source, 0),
    }
    return calls[problem.name]


class Mpi4py(Mpi):
    """mpi4py, in a loop of Python's."""

    name = "mpi4py"

    def prepare(self, problem: Problem) -> Any:
        """Makes arrays."""
        return _Call(problem, self.rank)


def why_not_mpi(ranks: int) -> str | None:
    """Why MPI itself cannot be measured here."""
    if ranks == 1 and _library.start().family == "none":
        return "there is no MPI in this job of one rank"
    return None


def why_not_mpi4py(dtype: np.dtype) -> str | None:
    """Why mpi4py cannot be measured here."""
    if importlib.util.find_spec("mpi4py") is None:
        return "it is not installed (pip install mpi4py)"
    if dtype.name not in DATATYPES:
        return f"MPI has no {dtype.name}"
    try:
        import mpi4py.MPI  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return " ".join(str(error).split())
    return None
