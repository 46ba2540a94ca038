"""How a file of this folder says what it needs of JAX."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Patch:
    """A row of the table in `docs/compatibility.md`; a test compares the two."""

    what: str
    """What is changed in JAX, or used of it."""
    used: tuple[str, ...]
    """The names that this needs: below `jax._src`, or in full those of `jaxlib`."""
    without: str
    """What a user notices with a JAX that has them no longer."""
    test: str
    """The test that fails then."""
