"""What the doctor finds wrong, or worth knowing."""

from __future__ import annotations

from typing import Any, NamedTuple

#: What a rank knows of one subject; made of what JSON has.
Facts = dict[str, Any]


class Finding(NamedTuple):
    """A problem keeps a job from running well; a note need not."""

    is_problem: bool
    text: str
    remedy: str
    #: The ranks that it is about; none means all.
    ranks: tuple[int, ...] = ()


def problem(text: str, remedy: str, ranks: tuple[int, ...] = ()) -> Finding:
    """What keeps a job from running, or from running well."""
    return Finding(True, text, remedy, ranks)


def note(text: str, remedy: str, ranks: tuple[int, ...] = ()) -> Finding:
    """What is worth knowing."""
    return Finding(False, text, remedy, ranks)


def of_error(words: str) -> Finding:
    """A problem from an error of the library's, which says the remedy itself."""
    return problem(" ".join(words.split()).removeprefix("mpi_cuda: "), "")
