"""Which JAX this version is for, and what is said of another one."""

from __future__ import annotations

import re

from mpi_cuda import _library

#: The oldest and the newest JAX that were tested (docs/compatibility.md).
OLDEST, NEWEST = "0.9.0", "0.12.0.1"


def numbers(version: str) -> tuple[int, ...]:
    """A version's numbers, to compare; of a development version those of the release to come."""
    parts = (re.match(r"\d*", part) for part in version.split("+")[0].split("."))
    return tuple(int(part[0]) for part in parts if part and part[0])


def is_tested(version: str) -> bool:
    """Whether a JAX lies between the oldest and the newest that were tested."""
    return numbers(OLDEST) <= numbers(version) <= numbers(NEWEST)


def refuse_older(version: str) -> None:
    """Refuses a JAX that lacks what this package uses of it.

    Raises:
      ImportError: it is older than `OLDEST`.
    """
    if numbers(version) < numbers(OLDEST):
        raise ImportError(
            f"mpi_cuda needs JAX {OLDEST} or newer, and this is JAX {version}: "
            f"pip install 'jax>={OLDEST}'"
        )


def does_not_fit(version: str, error: Exception) -> ImportError:
    """What is said if something of JAX is not where it was."""
    return ImportError(
        f"mpi_cuda cannot work with JAX {version}, which has changed inside ({error}). It was "
        f"tested with JAX {OLDEST} to {NEWEST}: pip install 'jax<={NEWEST}', or a newer mpi_cuda"
    )


def warn_of_newer(version: str) -> None:
    """Says that a JAX is newer than what was tested; one rank calls this, once."""
    if numbers(version) > numbers(NEWEST):
        _library.warn(
            f"JAX {version} is newer than {NEWEST}, the newest that was tested. What it "
            "has changed inside makes calls slower, or is refused by name; a message says which "
            "(docs/compatibility.md). `python -m mpi_cuda doctor` tries what matters most"
        )
