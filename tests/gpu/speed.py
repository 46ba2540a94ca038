"""How fast messages of device memory are, beside what the device and the same MPI can do.

Usage: mpirun -n 2 python tests/gpu/speed.py REPORT.json

Both ranks do the same at the same time, as in a sendrecv, and the slower one counts:
- down, up: copies between the GPU and pinned memory of the host, one direction after the other.
- pageable: what mpi4jax does with an MPI that does not know CUDA, without its overhead: arrays of
  the host are made, one copy down, MPI, one copy up (mpi_xla_bridge_cuda.cpp of mpi4jax 0.9).
- aware: MPI itself on memory from cuMemAlloc, if it knows CUDA.
- sendrecv, allreduce: ours, within a jitted loop of ten.
Needs mpi4py, JAX and numpy, and of CUDA no more than its driver; without one, only ours are
measured.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

COMM = MPI.COMM_WORLD
RANK = COMM.rank
OTHER = RANK ^ 1
PRETENDED = "MPI_CUDA_PRETEND_DEVICE" in os.environ
SIZES = [8, 1 << 16, 1 << 20, 4 << 20, 16 << 20, 64 << 20]
LARGEST = SIZES[-1]


class Driver:
    """CUDA's driver in the context that JAX uses."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self("cuInit", 0)
        device, context, own = ctypes.c_int(), ctypes.c_void_p(), jax.local_devices()[0]
        number = own.local_hardware_id if own.local_hardware_id is not None else 0
        self("cuDeviceGet", ctypes.byref(device), number)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)
        self.stream = ctypes.c_void_p()
        self("cuStreamCreate", ctypes.byref(self.stream), 1)

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name} failed: {code}")

    def memory(self, size: int) -> int:
        """Of the device."""
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def pinned(self, size: int) -> int:
        """Of the host."""
        address = ctypes.c_void_p()
        self("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), 1)
        return address.value or 0

    def down(self, host: int, device: int, size: int) -> None:
        """Copies to the host."""
        self(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(host),
            ctypes.c_uint64(device),
            ctypes.c_size_t(size),
            self.stream,
        )
        self("cuStreamSynchronize", self.stream)

    def up(self, device: int, host: int, size: int) -> None:
        """Copies to the device."""
        self(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(device),
            ctypes.c_void_p(host),
            ctypes.c_size_t(size),
            self.stream,
        )
        self("cuStreamSynchronize", self.stream)


class OnDevice:
    """Device memory, as mpi4py takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def seconds(action: Callable[[], Any], times: int, per: int = 1) -> float:
    """Of the slower rank: the best of five, each the mean of `times`; `per` of them in one call."""
    action()
    best = float("inf")
    for _ in range(5):
        COMM.Barrier()
        start = time.perf_counter()
        for _ in range(times):
            action()
        best = min(best, COMM.allreduce(time.perf_counter() - start, MPI.MAX))
    return best / times / per


def repetitions(size: int) -> int:
    return 20 if size <= 1 << 20 else 3


def bare(driver: Driver, aware: bool) -> dict[str, dict[int, float]]:
    """What the device and MPI do without us."""
    sent, received = driver.memory(LARGEST), driver.memory(LARGEST)
    host = driver.pinned(LARGEST)
    found: dict[str, dict[int, float]] = {"down": {}, "up": {}, "pageable": {}}
    if aware:
        found["aware"] = {}
    for size in SIZES:
        times = repetitions(size)
        found["down"][size] = seconds(lambda n=size: driver.down(host, sent, n), times)
        found["up"][size] = seconds(lambda n=size: driver.up(received, host, n), times)

        def pageable(n: int = size) -> None:
            out, into = np.empty(n, np.uint8), np.empty(n, np.uint8)
            driver.down(out.ctypes.data, sent, n)
            COMM.Sendrecv(out, OTHER, recvbuf=into, source=OTHER)
            driver.up(received, into.ctypes.data, n)

        found["pageable"][size] = seconds(pageable, times)
        if aware:
            out, into = OnDevice(sent, size), OnDevice(received, size)

            def known(out: Any = out, into: Any = into) -> None:
                COMM.Sendrecv(out, OTHER, recvbuf=into, source=OTHER)

            found["aware"][size] = seconds(known, times)
    return found


def ours() -> dict[str, dict[int, float]]:
    """Of one operation inside a loop of ten."""
    found: dict[str, dict[int, float]] = {}
    for name, operation in {
        "sendrecv": lambda x: nt.sendrecv(x, x, source=OTHER, dest=OTHER),
        "allreduce": lambda x: nt.allreduce(x, m.SUM),
    }.items():
        found[name] = {}
        for size in SIZES[:2] if PRETENDED else SIZES:
            x = jnp.zeros(size // 4, jnp.float32)
            loop = jax.jit(lambda x, f=operation: lax.fori_loop(0, 10, lambda _, x: f(x), x))
            times = max(1, repetitions(size) // 5)
            found[name][size] = seconds(lambda x=x, f=loop: f(x).block_until_ready(), times, 10)
    return found


def main() -> None:
    if COMM.size != 2:
        sys.exit("two ranks, please")
    measured = ours()
    if not PRETENDED:
        direct = "direct" in os.environ.get("MPI_CUDA_TRANSFER", "")
        measured |= bare(Driver(), direct)
    if RANK != 0:
        return
    print("microseconds of one", *(f"{size} B" for size in SIZES), sep="\t")
    for name, times in measured.items():
        print(name, *(f"{one * 1e6:.1f}" for one in times.values()), sep="\t")
    speed: dict[int, Any] = {}
    for size in SIZES:
        if size >= 4 << 20 and "down" in measured:
            one = measured["sendrecv"][size]
            row: dict[str, float] = {}
            slower = max(measured["down"][size], measured["up"][size])
            row["part of the slower copy's speed"] = slower / one
            row["times as fast as pageable"] = measured["pageable"][size] / one
            if "aware" in measured:
                row["part of MPI's own speed"] = measured["aware"][size] / one
            speed[size] = row
            print(f"sendrecv of {size} B:", {key: round(value, 2) for key, value in row.items()})
    with open(sys.argv[1], "w") as file:
        json.dump({"seconds": measured, "sendrecv": speed, "jax": jax.__version__}, file, indent=1)


if __name__ == "__main__":
    main()
