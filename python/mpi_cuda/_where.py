"""Where the threads of this process are in the user's code, for reports of jobs that wait."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from types import FrameType
from typing import Any

_NUMBER = ctypes.POINTER(ctypes.c_size_t)
_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, _NUMBER)
# Folders of code that is not the user's.
_OWN = os.path.dirname(os.path.abspath(__file__))
_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_STANDARD = os.path.dirname(os.path.abspath(threading.__file__))


def is_users(file: str) -> bool:
    """Whether a file of Python is the user's code."""
    if file.startswith("<") or file.startswith((_OWN, _STANDARD)):
        return False
    return not any(folder in file for folder in _LIBRARIES)


def words(file: str, line: int, function: str) -> str:
    """How a line of Python is called: `train.py:12 in step`."""
    return f"{os.path.basename(file)}:{line} in {function}"


def _line(frame: FrameType | None) -> str | None:
    """The innermost line of the user's code, and what it calls if that is another's."""
    called = None
    while frame is not None:
        code = frame.f_code
        if is_users(code.co_filename):
            line = words(code.co_filename, frame.f_lineno, code.co_name)
            return f"{line} (in {called})" if called else line
        called = code.co_name
        frame = frame.f_back
    return None


def _has_ended(frame: FrameType | None) -> bool:
    """Whether the main thread, which is in that frame, waits for the others at Python's end."""
    if frame is None:
        return False
    while frame.f_back is not None:
        frame = frame.f_back
    code = frame.f_code
    return (code.co_name, code.co_filename) == ("_shutdown", threading.__file__)


def _failure(frame: FrameType | None) -> tuple[int, str] | None:
    """With what the main thread has failed, if it has: the status of this process, and why."""
    # By its name: mpi_cuda_startup may have loaded it.
    lifecycle = sys.modules.get("mpi_cuda._lifecycle")
    return lifecycle.failure() if lifecycle and _has_ended(frame) else None


def where() -> tuple[str, int]:
    """The lines of the user's code that the threads are at, the main thread first.

    Also how many other threads there are, in whatever code: they may still come to an operation.
    """
    frames = sys._current_frames()
    main = threading.main_thread()
    lines, others = [], 0
    for thread in sorted(threading.enumerate(), key=lambda thread: thread is not main):
        line = _line(frames.get(thread.ident or 0))
        if thread is main:
            failure = _failure(frames.get(thread.ident or 0))
            end = f"its main thread has failed with {failure[1]}" if failure else "at its end"
            lines.append(line or end)
        elif line is not None or not thread.name.startswith("Dummy-"):
            others += 1
            lines.append(f"thread {thread.name}" + (f" at {line}" if line else ""))
    return ", ".join(lines), others


def _write(text: int, capacity: int, others: Any) -> int:
    words, others[0] = where()
    said = words.encode()[:capacity]
    ctypes.memmove(text, said, len(said))
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if _library is not None and (failure := _failure(frame)):
        # Whoever asks has waited for some time.
        status, why = failure
        _library.mpi_cuda_main_thread_failed(status, why.encode(errors="replace"))
    return len(said)


_callback = _SIGNATURE(_write)
_library: ctypes.CDLL | None = None


def install(library: ctypes.CDLL) -> None:
    """Tells the library whom to ask."""
    global _library
    _library = library
    library.mpi_cuda_set_where(_callback)
