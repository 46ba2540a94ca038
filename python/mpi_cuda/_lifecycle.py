"""How a rank ends: after success, what was dispatched is waited for; after a failure the job ends.

Python does not tell its exit handlers why it exits. An uncaught exception leaves `sys.last_value`
(set before `sys.excepthook` runs, whoever's that is). `SystemExit` leaves nothing, so the built-in
class is replaced by a subclass that notices when it is dropped with no Python frame below: then
the interpreter itself took it, and nobody caught it.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import sys
from typing import Any, NoReturn

import jax

from mpi_cuda import _library

_failed = False
_installed = False
_process = os.getpid()
_BuiltinExit = builtins.SystemExit


class _ObservedExit(_BuiltinExit):
    __module__ = "builtins"
    __qualname__ = "SystemExit"

    def __del__(self) -> None:
        global _failed
        # While Python runs code, a frame is below this one; then somebody has caught it.
        if self.code not in (None, 0) and sys._getframe().f_back is None:
            _failed = True


def install() -> None:
    """Installs the exit handlers, once."""
    global _installed, _process
    if _installed:
        return
    _installed, _process = True, os.getpid()
    builtins.SystemExit = _ObservedExit  # type: ignore[misc]
    sys.exit = _exit
    atexit.register(_at_exit)


def _exit(status: Any = None, /) -> NoReturn:
    """Exit the interpreter by raising SystemExit(status)."""
    raise builtins.SystemExit(status)


def _uncaught() -> bool:
    interactive = hasattr(sys, "ps1")
    return _failed or (not interactive and getattr(sys, "last_value", None) is not None)


def _at_exit() -> None:
    library, world = _library.load(), _library.started()
    # A forked child inherits the handlers, and must leave the parent's MPI alone.
    if world is None or os.getpid() != _process:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if _uncaught():
        if world.size > 1:
            library.mpi_cuda_abort(1)
        return
    if library.mpi_cuda_wait():
        print(_library.last_error(), file=sys.stderr, flush=True)
        library.mpi_cuda_abort(1)
    # Programs with callbacks need Python to end. Their errors are JAX's to report, at its own exit.
    with contextlib.suppress(Exception):
        jax.effects_barrier()
    library.mpi_cuda_set_trampoline(None)
    library.mpi_cuda_shutdown()
