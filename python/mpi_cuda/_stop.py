"""Stopping together: a rank that is asked to stop, by a signal for instance, tells the others."""

from __future__ import annotations

import signal
from types import FrameType

import numpy as np

from mpi_cuda import _arguments, _operations
from mpi_cuda._jax_patches import jax_core

_requested = False


def request_stop() -> None:
    """This rank wants the job to stop. May be called by a signal handler, and from any thread."""
    global _requested
    _requested = True


def stop_on(*signals: int) -> None:
    """Calls `request_stop` when one of these signals arrives, SIGTERM if none is given.

    Instead of what the signal did before. Call it on Python's main thread.
    """
    for number in signals or (signal.SIGTERM,):
        signal.signal(number, _on_signal)


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    request_stop()


def stop_requested(comm: object = None) -> bool:
    """Whether a rank of `comm` has called `request_stop`: the same answer on all of them.

    Collective: an allreduce with LOR, in the order of all operations.

    Raises:
      RuntimeError: it is called in a program that is traced, which would ask only once.
    """
    if not jax_core.is_outside_programs():
        raise RuntimeError("stop_requested asks while it is called: call it outside of jax.jit")
    any_rank, _ = _operations.allreduce(np.bool_(_requested), _arguments.OPS["LOR"], comm=comm)
    return bool(any_rank)
