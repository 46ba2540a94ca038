"""The world, as far as the library lets the doctor see it (`include/mpi_cuda.h`)."""

from __future__ import annotations

import array
import ctypes
import json
from typing import Any

from mpi_cuda import _library


def about() -> dict[str, str]:
    """What the library says of this process."""
    lines = _library.load().mpi_cuda_about().decode(errors="replace").splitlines()
    return dict(line.split("\t", 1) for line in lines)


def gather(own: Any, size: int) -> list[Any]:
    """What each rank passes, in the order of ranks; collective. It is what JSON has."""
    words = json.dumps(own).encode()
    lengths = [row[0] for row in gather_numbers([len(words)], size)]
    all_words = _gather(words.ljust(int(max(lengths))), size)
    return [json.loads(one) for one in all_words]


def gather_numbers(own: list[float], size: int) -> list[list[float]]:
    """The same of numbers, of which each rank passes as many."""
    found = _gather(array.array("d", own).tobytes(), size)
    return [array.array("d", one).tolist() for one in found]


def _gather(own: bytes, size: int) -> list[bytes]:
    everybody = ctypes.create_string_buffer(len(own) * size)
    if _library.load().mpi_cuda_gather(own, len(own), everybody):
        raise RuntimeError(_library.last_error())
    found = everybody.raw
    return [found[start : start + len(own)] for start in range(0, len(found), len(own))]


def ping(peer: int, bytes_: int, rounds: int) -> float:
    """Seconds of a message to `peer`, which must call this too."""
    seconds = _library.load().mpi_cuda_ping(peer, bytes_, rounds)
    if seconds < 0:
        raise RuntimeError(_library.last_error())
    return float(seconds)
