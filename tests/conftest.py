"""Every test has a time limit; a hang prints the stacks of all threads of every rank."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest

LIMIT = float(os.environ.get("TEST_TIMEOUT", "90"))


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    stderr = int(os.environ.get("TEST_STDERR", "2"))
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
