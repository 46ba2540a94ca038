"""A time limit for each step: a doctor that waits for ever helps nobody."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

from mpi_cuda._doctor import launched

#: The status of a doctor that could not do its work.
CANNOT_RUN = 2
#: Seconds by which the first rank speaks before the others: a launcher ends the others' processes
#: when one of them fails, and the first rank's report says more than a line.
BEFORE_OTHERS = 1.0


class Limit:
    """Ends this process, and so the job, if a step takes longer than so many seconds. `told` is
    called before that, to say what is known so far."""

    def __init__(self, seconds: float, told: Callable[[], None]):
        self.seconds = seconds
        self.told = told
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
        with contextlib.suppress(Exception):
            self.told()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        text = (
            f"problem: {launched.who()} was still {self.doing} after {self.seconds:g} s "
            f"(--timeout). Remedy: {remedy}\n"
        )
        os.write(2, text.encode())
        # The main thread may wait in C, where no exception reaches it.
        os._exit(CANNOT_RUN)
