"""Registers the plugin with JAX; called by `mpi_cuda_plugin`, which JAX finds."""

from __future__ import annotations

import jax

from mpi_cuda import _jax_patches, _library, _lifecycle
from mpi_cuda._bridge import callbacks, ffi_targets


def initialize() -> None:
    """Registers the plugin with JAX; the user asked for it."""
    if _library.load().mpi_cuda_on_gpu():
        _keep_cpu()
    _jax_patches.install("start")
    callbacks.install()
    ffi_targets.install()
    _lifecycle.install()


def _keep_cpu() -> None:
    """Adds JAX's CPU backend, where callbacks have their arguments."""
    platforms = jax.config.jax_platforms
    if "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")
