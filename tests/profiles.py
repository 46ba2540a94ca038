"""Reads what `jax.profiler` wrote."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax


@dataclass
class Event:
    name: str
    line: str
    start: float
    end: float
    stats: dict[str, Any]

    @property
    def length(self) -> float:
        return self.end - self.start

    def has(self, other: Event, slack: float = 0) -> bool:
        return self.start - slack <= other.start and other.end <= self.end + slack


def events(file: Path) -> list[Event]:
    """All events of a space, times in nanoseconds since the start of the profile."""
    space = jax.profiler.ProfileData.from_file(str(file))
    return [
        Event(
            event.name,
            line.name,
            event.start_ns,
            event.start_ns + event.duration_ns,
            dict(event.stats),
        )
        for plane in space.planes
        for line in plane.lines
        for event in line.events
    ]


def ours(found: list[Event]) -> list[Event]:
    return sorted((one for one in found if one.line.startswith("MPI rank")), key=lambda e: e.start)


def named(found: list[Event], name: str) -> list[Event]:
    return [one for one in found if one.name == name]


def trace_of(file: Path) -> list[dict[str, Any]]:
    """The events of a trace.json.gz."""
    with gzip.open(file, "rt") as text:
        return json.load(text)["traceEvents"]


def only(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(f"plugins/profile/*/{pattern}")
    return file
