"""All that this package changes in JAX, and every use that it makes of JAX's private modules.

One file for each thing. Its `PATCHES` declare what it needs of JAX, what a user notices where that
is gone, and the test that fails then (`patch.Patch`); the table in `docs/compatibility.md` says the
same. No other module of the package may touch what is private to JAX.
"""

from __future__ import annotations

import functools
import importlib
from typing import Literal

import jax

from mpi_cuda import _jax_version

Moment = Literal["import", "operation", "start"]

#: Every file with something to install: at the import of `mpi_cuda`, at the first operation, and
#: when JAX starts with this plugin selected.
INSTALLED: dict[Moment, tuple[str, ...]] = {
    "import": ("vmap", "linear", "hoisting", "coordination"),
    "operation": ("effects_barrier", "token_passing", "fast_dispatch"),
    "start": (
        "backends",
        "call_location",
        "cost_analysis",
        "dlpack",
        "gpu_callbacks",
        "older_plugin",
        "partitioner",
        "profiler",
        "untyped_calls",
    ),
}
#: The others, whose functions are called.
CALLED = ("custom_calls", "effect", "jax_core", "jaxprs", "places", "uniform")


@functools.cache
def install(moment: Moment) -> None:
    """Changes in JAX what is to be changed at this moment, once.

    Raises:
      ImportError: JAX lacks what is to be changed.
    """
    try:
        for file in INSTALLED[moment]:
            importlib.import_module(f"{__name__}.{file}").install()
    except (AttributeError, ImportError) as error:
        raise _jax_version.does_not_fit(jax.__version__, error) from error
