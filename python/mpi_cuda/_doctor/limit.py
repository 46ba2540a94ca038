"""A time limit for each step: a doctor that waits for ever helps nobody."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

from mpi_cuda._doctor import launched

#: The status of a doctor that could not do its work.
CANNOT_RUN = 2
#: Seconds by which the first rank speaks before the others: a launcher ends the others' processes
#: when one of them fails, and the first rank's report says more than a line.
BEFORE_OTHERS = 1.0


class Limit:
    """Ends this process, and so the job, if a step takes longer than so many seconds. `tell` is
    asked before that to report it, with what is known so far; whether it has done so."""

    def __init__(self, seconds: float, tell: Callable[[str, str], bool]):
        self.seconds = seconds
        self.tell = tell
        #: What is being done.
        self.doing = ""

    @contextlib.contextmanager
    def on(self, doing: str, remedy: str) -> Iterator[None]:
        """A step."""
        self.doing = doing
        others = 0.0 if not launched.rank() else BEFORE_OTHERS
        timer = threading.Timer(self.seconds + others, self._expired, [remedy])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expired(self, remedy: str) -> None:
        words, is_told = f"was still {self.doing} after {self.seconds:g} s (--timeout)", False
        with contextlib.suppress(Exception):
            is_told = self.tell(words, remedy)
        if not is_told:
            line = f"problem: {launched.who()} {words}. Remedy: {remedy}\n"
            os.write(2, line.encode())
        # The main thread may wait in C, where no exception reaches it.
        os._exit(CANNOT_RUN)
