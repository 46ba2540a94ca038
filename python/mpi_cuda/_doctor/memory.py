"""Memory that the ranks of a node share, and huge pages."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mpi_cuda._doctor.finding import Facts, Finding, note, problem
from mpi_cuda._report.text import size

FOLDER = Path("/dev/shm")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
#: Below this, boards, rings and MPI's own segments of a node's ranks do not fit.
LITTLE = 32 << 20
#: Seconds; a segment that is younger may be one that its rank does not hold yet.
YOUNG = 10


def collect(about: dict[str, str]) -> Facts:
    """Facts of this process."""
    facts: Facts = {
        "huge_pages": _huge_pages(),
        "failure": about.get("shm_failure"),
        "not_writable": _why_not_writable(),
    }
    try:
        space = os.statvfs(FOLDER)
    except OSError:
        return {**facts, "size": None, "free": None, "left": []}
    return {
        **facts,
        "size": space.f_frsize * space.f_blocks,
        "free": space.f_frsize * space.f_bavail,
        "left": sorted(file.name for file in FOLDER.glob("mpi_cuda.*") if _is_left(file)),
    }


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    """Lines of the report."""
    # Ranks look one after the other, and the free space changes meanwhile.
    free = facts["free"] and size(facts["free"] >> 28 << 28 or facts["free"] >> 20 << 20)
    has = f"{size(facts['size'])}, about {free} free" if facts["size"] else "missing"
    yield "/dev/shm", has
    yield "huge pages", facts["huge_pages"] or "none of Linux'"


def check(facts: Facts) -> Iterator[Finding]:
    """Findings of one rank."""
    remedy = "make it larger (docker --shm-size=1g, Apptainer binds the host's)"
    if facts["size"] is None:
        yield problem("there is no /dev/shm, so ranks of a node share no memory", "mount a tmpfs")
    elif facts["not_writable"]:
        yield problem(
            f"no file can be made in /dev/shm ({facts['not_writable']}), so ranks of a node share "
            "no memory, and MPI may end them",
            "mount a tmpfs there that is writable for all (mode 1777)",
        )
    elif facts["free"] < LITTLE:
        yield problem(f"/dev/shm has less than {size(LITTLE)} free", remedy)
    if facts["failure"]:
        yield problem(
            f"long messages of this node go through MPI, since no memory could be shared "
            f"({facts['failure']})",
            f"{remedy}, or set MPI_CUDA_SHM_RING=0",
        )
    if facts["left"]:
        yield note(
            f"/dev/shm has {len(facts['left'])} segment(s) of killed ranks, such as "
            f"{facts['left'][0]}",
            "the next job's start removes them; those of another user must be removed by that one",
        )
    if facts["huge_pages"] == "never":
        yield note(
            "Linux gives no huge pages, so large messages within a node take about twice as long",
            f"as root: echo madvise > {HUGE_PAGES}",
        )


def _why_not_writable() -> str | None:
    """What keeps this user from making files there, as MPI does."""
    try:
        with tempfile.TemporaryFile(dir=FOLDER):
            return None
    except OSError as error:
        return error.strerror


def _is_left(file: Path) -> bool:
    """Whether no rank holds a segment (`mpi_runtime/src/node/segment.rs`)."""
    try:
        if time.time() - file.stat().st_mtime < YOUNG:
            return False
        with file.open("rb") as segment:
            fcntl.flock(segment, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return file.exists()


def _huge_pages() -> str | None:
    """What Linux gives: always, madvise or never."""
    try:
        chosen = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
    except OSError:
        return None
    return chosen and chosen[1]
