"""What JAX calls when it looks for plugins. Apart from the package, which changes JAX when it is
imported: being installed changes nothing for those who did not ask for us."""

from __future__ import annotations


def initialize() -> None:
    """Registers the plugin with JAX if `JAX_PLATFORMS` (or `jax_platforms`) names it."""
    import jax

    if "mpi_cuda" not in (jax.config.jax_platforms or "").split(","):
        return
    from mpi_cuda import _jax_plugin

    _jax_plugin.initialize()
