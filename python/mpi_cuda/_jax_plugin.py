"""Registers the plugin with JAX; called by `mpi_cuda_plugin`, which JAX finds."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

NAME = "mpi_cuda"


def initialize() -> None:
    """Registers the plugin with JAX; the user asked for it."""
    import jax._src.xla_bridge as xla_bridge

    from mpi_cuda import _library, _lifecycle
    from mpi_cuda._bridge import callbacks, ffi_targets
    from mpi_cuda._jax_patches import older_plugin

    if _library.load().mpi_cuda_on_gpu():
        _keep_cpu()
    _watch_backends(_answer_to_usual_names)
    xla_bridge._nonexperimental_plugins.add(NAME)
    xla_bridge.register_plugin(
        NAME, priority=500, library_path=str(_library.LIBRARY), options=_options
    )
    callbacks.install()
    ffi_targets.install()
    _lifecycle.install()
    older_plugin.install()


def _keep_cpu() -> None:
    """Adds JAX's CPU backend, where callbacks have their arguments."""
    import jax

    platforms = jax.config.jax_platforms
    if "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


def _options() -> dict[str, Any]:
    """Create options; joins the world first, so that its errors are raised here."""
    from mpi_cuda import _library

    _library.start()
    if _library.load().mpi_cuda_on_gpu():
        from jaxlib import xla_client

        # JAX's own for its GPU plugin: allocator, memory fraction, preallocation.
        options = dict(xla_client.generate_pjrt_gpu_plugin_options())
        if "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT" not in os.environ:
            # Ours is to use it, so that operations do not wait on Python's thread.
            options.pop("use_tfrt_gpu_client", None)
        return options
    return {}


def _watch_backends(hook: Callable[[Any], None]) -> None:
    """Calls `hook` with every backend that JAX makes; only some versions offer that."""
    import jax._src.xla_bridge as xla_bridge

    make = xla_bridge._init_backend

    @functools.wraps(make)
    def make_and_tell(platform: str) -> Any:
        backend = make(platform)
        hook(backend)
        return backend

    setattr(xla_bridge, "_init_backend", make_and_tell)  # noqa: B010


def _answer_to_usual_names(backend: Any) -> None:
    """JAX asks for the backend "cpu" in callbacks, and for "gpu", another name of "cuda", where it
    lowers for one; if the user selected none of that name, ours is one."""
    import jax._src.xla_bridge as xla_bridge

    from mpi_cuda import _library

    if _library.is_ours(backend):
        name = {"gpu": "cuda"}.get(backend.platform, backend.platform)
        platforms = (xla_bridge.config.jax_platforms.value or "").split(",")
        if name not in platforms and backend.platform not in platforms:
            xla_bridge._backends.setdefault(name, backend)
