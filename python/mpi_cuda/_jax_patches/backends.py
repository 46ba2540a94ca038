"""The plugin among JAX's backends, under its own name and the usual ones."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax._src import xla_bridge
from jaxlib import xla_client

from mpi_cuda import _jax_version, _library
from mpi_cuda._jax_patches import coordination
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="the plugin is registered, and answers to the usual names of platforms",
        used=(
            "xla_bridge._backends",
            "xla_bridge._init_backend",
            "xla_bridge._nonexperimental_plugins",
            "xla_bridge.config",
            "xla_bridge.register_plugin",
        ),
        without="an error at start",
        test="test_selected_prints_nothing",
    ),
    Patch(
        what="the options of JAX's own GPU plugin are ours on GPUs",
        used=("jaxlib.xla_client.generate_pjrt_gpu_plugin_options",),
        without="an error at start on GPUs",
        test="test_auto_takes_the_gpu_and_says_why",
    ),
)

NAME = "mpi_cuda"


def install() -> None:
    """Registers the plugin with JAX; the user asked for it."""
    _watch(_answer_to_usual_names)
    xla_bridge._nonexperimental_plugins.add(NAME)
    xla_bridge.register_plugin(
        NAME, priority=500, library_path=str(_library.LIBRARY), options=_options
    )


def is_one_ours() -> bool:
    """Whether JAX has made a backend of this plugin."""
    return any(_library.is_ours(backend) for backend in xla_bridge._backends.values())


def _options() -> dict[str, Any]:
    """Create options; joins the world first, so that its errors are raised here."""
    if _library.start().rank == 0:
        _jax_version.warn_of_newer(jax.__version__)
    processes = coordination.processes()
    if not _library.load().mpi_cuda_on_gpu():
        return processes
    # JAX's own for its GPU plugin: allocator, memory fraction, preallocation.
    options = dict(xla_client.generate_pjrt_gpu_plugin_options())
    if "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT" not in os.environ:
        # Ours is to use it, so that operations do not wait on Python's thread.
        options.pop("use_tfrt_gpu_client", None)
    return options | processes


def _watch(hook: Callable[[Any], None]) -> None:
    """Calls `hook` with every backend that JAX makes; only some versions offer that."""
    make = xla_bridge._init_backend

    @functools.wraps(make)
    def make_and_tell(platform: str) -> Any:
        with coordination.hidden(from_ours=platform == NAME):
            backend = make(platform)
        hook(backend)
        return backend

    setattr(xla_bridge, "_init_backend", make_and_tell)  # noqa: B010


def _answer_to_usual_names(backend: Any) -> None:
    """JAX asks for the backend "cpu" in callbacks, and for "gpu", another name of "cuda", where it
    lowers for one; if the user selected none of that name, ours is one."""
    if _library.is_ours(backend):
        coordination.offer(max(device.process_index for device in backend.devices()) + 1)
        name = {"gpu": "cuda"}.get(backend.platform, backend.platform)
        platforms = (xla_bridge.config.jax_platforms.value or "").split(",")
        if name not in platforms and backend.platform not in platforms:
            xla_bridge._backends.setdefault(name, backend)
