"""What is asked for: reads the command line, and refuses in words what cannot be measured."""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpi_cuda._bench.operations import OPERATIONS, Problem, problem
from mpi_cuda._doctor import plot as doctor_plot
from mpi_cuda._report.text import size as words_of

DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64")
AGAINST = ("mpi", "mpi4py", "gloo")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
SIZE = re.compile(r"(\d+)\s*([KMG]?)(?:i?B)?", re.IGNORECASE)


class Refused(ValueError):
    """What is asked for cannot be done; the text says why, and what can."""


class Plan(NamedTuple):
    """What is measured."""

    operations: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: np.dtype
    style: str
    launch: str
    repeat: int
    #: Operations of a series, at most.
    most: int
    against: tuple[str, ...]
    check: bool
    only: str | None

    @property
    def how(self) -> dict[str, Any]:
        """The arguments of `timing.measure`."""
        return {"repeat": self.repeat, "most": self.most, "check": self.check}

    def problems(self, name: str, ranks: int) -> list[Problem]:
        """Those of an operation; sizes that are the same on so many ranks come once."""
        found = [problem(name, size, self.dtype, ranks) for size in self.sizes]
        return list(dict.fromkeys(found))

    def needs(self, ranks: int) -> tuple[int, Problem]:
        """Bytes that a rank needs at most, about, and for what: operand and result of each
        library, and once more while they are made and compared."""
        libraries = 2 + len(self.against)

        def bytes_(one: Problem) -> int:
            elements = int(np.prod(one.sent(0))) + int(np.prod(one.got()))
            return elements * (one.dtype.itemsize * libraries + (16 if self.check else 8))

        last = [self.problems(name, ranks)[-1] for name in self.operations]
        largest = max(last, key=bytes_)
        return bytes_(largest), largest


def size_of(text: str) -> int:
    """Bytes: `8`, `4K`, `16M`; units are powers of 1024.

    Raises:
      Refused: it is no size.
    """
    found = SIZE.fullmatch(text.strip())
    if found is None or not int(found[1]):
        raise Refused(f"{text} is no size: write bytes above 0, such as 8, 4K or 16M")
    return int(found[1]) * UNITS[found[2].upper()]


def sizes(least: str, most: str, factor: int, dtype: np.dtype) -> tuple[int, ...]:
    """From the least on, each so many times the one before, and none above the most.

    Raises:
      Refused: there are none, or they are no multiples of the dtype.
    """
    low, high = size_of(least), size_of(most)
    for option, text, size in (("--min", least, low), ("--max", most, high)):
        if size % dtype.itemsize:
            raise Refused(
                f"{option} {text} is no multiple of {dtype.itemsize} B, the size of {dtype.name}"
            )
    if low > high:
        raise Refused(f"--min {least} is above --max {most}")
    if factor < 2:
        raise Refused(f"--factor {factor} is below 2")
    found = [low]
    while found[-1] * factor <= high:
        found.append(found[-1] * factor)
    return tuple(found)


def plan(arguments: argparse.Namespace) -> Plan:
    """What the command line asks for.

    Raises:
      Refused: it cannot be done, on however many ranks.
    """
    if arguments.dtype not in DTYPES:
        raise Refused(f"--dtype {arguments.dtype} is not measured: {', '.join(DTYPES)} are")
    dtype = np.dtype(jnp.dtype(arguments.dtype))
    for option in ("repeat", "iterations"):
        if (number := getattr(arguments, option)) < 1:
            raise Refused(f"--{option} {number} is below 1")
    against = tuple(one for one in arguments.against.split(",") if one)
    for library in against:
        if library == "mpi4jax":
            raise Refused(
                "--against mpi4jax: one process cannot have both. Write a file of each, "
                "`bench --json ours.json` and `JAX_PLATFORMS=cpu ... bench --only mpi4jax --json "
                "theirs.json`, and then `bench --compare ours.json theirs.json`"
            )
        if library not in AGAINST:
            raise Refused(f"--against {library} is not known: {', '.join(AGAINST)} are")
    if arguments.only and against:
        raise Refused(f"--only {arguments.only} measures that alone, without --against")
    if arguments.plot is not None and (words := doctor_plot.refused()):
        raise Refused(words)
    return Plan(
        _operations(arguments),
        sizes(arguments.min, arguments.max, arguments.factor, dtype),
        dtype,
        arguments.style,
        arguments.launch,
        arguments.repeat,
        arguments.iterations,
        against,
        arguments.check,
        arguments.only,
    )


def _operations(arguments: argparse.Namespace) -> tuple[str, ...]:
    native = [name for name, row in OPERATIONS.items() if row.native]
    if arguments.operations is None:
        return tuple(native if arguments.style == "native" else OPERATIONS)
    names = tuple(name for name in arguments.operations.split(",") if name)
    if not names:
        raise Refused(f"--operations names none: {', '.join(OPERATIONS)}")
    for name in names:
        if name not in OPERATIONS:
            raise Refused(f"--operations {name} is not measured: {', '.join(OPERATIONS)} are")
        if arguments.style == "native" and name not in native:
            raise Refused(
                f"--style native has no {name}, since JAX has no collective for it: "
                f"{', '.join(native)}"
            )
    return tuple(dict.fromkeys(names))


def why_not_files(arguments: argparse.Namespace) -> str | None:
    """Why a file that is asked for cannot be written, as far as its folder says."""
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path is not None and (words := doctor_plot.why_not(path)):
            return f"{option}: {words}"
    return None


def why_not_memory(wanted: Plan, ranks: int, here: int) -> str | None:
    """Why the arrays do not fit into the memory of this node, which has `here` ranks."""
    available = _available()
    needed, largest = wanted.needs(ranks)
    if available is None or needed <= available // here:
        return None
    return (
        f"{largest.name} of {words_of(largest.size)} needs about {words_of(needed)} on each rank, "
        f"and {words_of(available // here)} are free for each of {here}: pass a smaller --max"
    )


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    return int(found["MemAvailable"]) << 10 if "MemAvailable" in found else None


def why_not_mpi4jax(platforms: str | None) -> str | None:
    """Why `--only mpi4jax` cannot run here."""
    if platforms != "cpu":
        return (
            "--only mpi4jax measures it on JAX's own CPU backend: set JAX_PLATFORMS=cpu for that "
            "job"
        )
    for package in ("mpi4jax", "mpi4py"):
        if importlib.util.find_spec(package) is None:
            return f"--only mpi4jax: {package} is not installed (pip install mpi4jax)"
    return None
