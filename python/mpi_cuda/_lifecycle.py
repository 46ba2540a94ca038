"""How a rank ends: after success, what was dispatched is waited for; after a failure the job ends.

Python does not tell its exit handlers why it exits. An uncaught exception leaves `sys.last_value`
(set before `sys.excepthook` runs, whoever's that is). `SystemExit` leaves nothing, so the built-in
class is replaced by a subclass that notices when it is dropped with no Python frame below: then
the interpreter itself took it, and nobody caught it.

Installed when the world is joined, which may come before JAX is imported: so nothing is imported
here that imports JAX.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import sys
import traceback
from typing import Any, NoReturn

_installed = False
_process = os.getpid()
#: The status that a `SystemExit` asked for which nobody caught.
_asked = 0
_BuiltinExit = builtins.SystemExit


class _ObservedExit(_BuiltinExit):
    __module__ = "builtins"
    __qualname__ = "SystemExit"

    def __del__(self) -> None:
        global _asked
        # While Python runs code, a frame is below this one; then somebody has caught it.
        if self.code not in (None, 0) and sys._getframe().f_back is None:
            # As Python itself: a number is the status, of which the system keeps 8 bits.
            _asked = (self.code & 0xFF or 1) if isinstance(self.code, int) else 1


def install() -> None:
    """Installs the exit handlers. Again, they come before those that were installed since: Python
    calls the last first, and JAX's must find the world as it was."""
    global _installed, _process
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    if not _installed:
        _installed, _process = True, os.getpid()
        builtins.SystemExit = _ObservedExit  # type: ignore[misc]
        sys.exit = _exit
        os._exit = _leave


def _exit(status: Any = None, /) -> NoReturn:
    """Exit the interpreter by raising SystemExit(status)."""
    raise builtins.SystemExit(status)


_system_exit = os._exit


def _leave(status: int) -> NoReturn:
    """Exit to the system with specified status, without normal exit processing."""
    if os.getpid() == _process:
        # By its name: importing it would import the package, and so JAX.
        library_module = sys.modules["mpi_cuda._library"]
        library = library_module.load()
        if not status and library.mpi_cuda_is_awaited():
            # A launcher may take the job's other ranks down with it, and call that a success.
            library_module.log("this rank leaves by os._exit(0) while others wait for it")
            library.mpi_cuda_abort(1)
    _system_exit(status)


def leave(status: int) -> NoReturn:
    """Ends this process in order, as after success, with a status that says what was found and not
    that the job has failed."""
    _at_exit()
    _flush()
    _system_exit(status)


def _status() -> int:
    """That of this process: not 0 after an exception that nobody caught."""
    uncaught = getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1")
    return _asked or int(uncaught)


def failure() -> tuple[int, str] | None:
    """The status of this process and why, once it is known that it fails."""
    status = _status()
    return (status, _why()) if status else None


def _at_exit() -> None:
    if os.getpid() != _process:
        _leave_child()
    # By its name: importing it would import the package, and so JAX.
    library_module = sys.modules["mpi_cuda._library"]
    library, world = library_module.load(), library_module.started()
    if world is None:
        return
    _flush()
    if status := _status():
        library.mpi_cuda_failed(status, _why().encode(errors="replace"))
        if world.size > 1:
            library.mpi_cuda_abort(status)
        return
    library.mpi_cuda_ending()
    if library.mpi_cuda_wait():
        library_module.log(library_module.last_error())
        library.mpi_cuda_abort(1)
    # Programs with callbacks need Python to end.
    if jax := sys.modules.get("jax"):
        try:
            jax.effects_barrier()
        except Exception as error:
            # Somebody may have read it; JAX's own exit would print a long trace of it.
            first = str(error).splitlines()[:1]
            library_module.log(f"a program had failed: {''.join(first)}")
    library.mpi_cuda_set_trampoline(None)
    library.mpi_cuda_set_where(None)
    coordination = sys.modules.get("mpi_cuda._jax_patches.coordination")
    if coordination:
        coordination.leave()
    library.mpi_cuda_shutdown()
    if coordination:
        coordination.end()


def refuse_in_child(what: str) -> None:
    """Refuses what would wait for threads of XLA's, which a forked child of a rank lacks.

    Raises:
      RuntimeError: this process was forked after it had joined.
    """
    if _installed and os.getpid() != _process:
        raise RuntimeError(
            f"mpi_cuda: this process was forked from a rank, and {what} would wait for threads of "
            "the rank's for ever: start worker processes with the spawn method and "
            "JAX_PLATFORMS=cpu"
        )


def _leave_child() -> NoReturn:
    """Leaves a forked child, which has the rank's MPI and XLA's clients but none of their threads:
    whatever waits for those threads, as destructors do, would wait for ever."""
    if logging := sys.modules.get("logging"):
        with contextlib.suppress(Exception):
            logging.shutdown()
    _flush()
    _system_exit(_status())


def _flush() -> None:
    """Writes out what was printed. The streams may be closed, or anything else."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _why() -> str:
    """The exception that nobody caught, and the user's line that it comes from, as far as known."""
    error = getattr(sys, "last_value", None)
    if error is None:
        return "it asked for that status"
    words = type(error).__name__
    # Its text is the user's code.
    with contextlib.suppress(Exception):
        words = traceback.format_exception_only(error)[-1].strip().splitlines()[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return words
    others = ("site-packages", os.path.dirname(__file__))
    own = [frame for frame in frames if not any(part in frame.filename for part in others)]
    frame = (own or frames)[-1]
    return f"{words} ({frame.filename}:{frame.lineno})"
