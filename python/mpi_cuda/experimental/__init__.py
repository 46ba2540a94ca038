"""Names of mpi4jax 0.4 to 0.7, for programs that import this package under that name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mpi_cuda import notoken

F = TypeVar("F", bound=Callable[..., object])


def auto_tokenize(function: F) -> F:
    """The function itself: operations are ordered automatically."""
    return function


__all__ = ["auto_tokenize", "notoken"]
