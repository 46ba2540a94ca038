"""The programs in the documentation, on every number of ranks."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["docs/operations.md", "docs/migration.md", "README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_programs_of(page: str) -> None:
    text = (ROOT / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        # In a traceback the line is that of the page.
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], page, "exec"), names)
        jax.effects_barrier()


def test_every_operation_is_on_the_page() -> None:
    from mpi_cuda import notoken

    headings = re.findall(r"^## (.*)", (ROOT / PAGES[0]).read_text(), re.MULTILINE)
    described = {name for heading in headings for name in heading.split(", ")}
    assert set(notoken.__all__) <= described
