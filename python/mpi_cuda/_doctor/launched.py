"""What the launcher's environment says of this process, before any MPI is opened."""

from __future__ import annotations

import os
import socket

#: Launchers' names for the rank and for that among the ranks of this node (Open MPI, PMI of MPICH
#: and Intel MPI, PMIx, Slurm).
RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def rank() -> int | None:
    """The rank, if a launcher has started this process."""
    return _first(RANK)


def named() -> str | None:
    """The variable that says the rank, as it stands in the environment."""
    return next((f"{name}={os.environ[name]}" for name in RANK if name in os.environ), None)


def is_first_here() -> bool:
    """Whether no other rank of this node is lower, as far as that is said."""
    return not (_first(LOCAL_RANK) or 0)


def host() -> str:
    """The node, as Slurm calls it, or by its own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def who() -> str:
    """This process in words."""
    place = f"on {host()}"
    return f"this process {place}" if rank() is None else f"rank {rank()} {place}"


def _first(names: tuple[str, ...]) -> int | None:
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return None
