"""What JAX calls when it looks for plugins. Apart from the package, which changes JAX when it is
imported: being installed changes nothing for those who did not ask for us."""

from __future__ import annotations


def initialize() -> None:
    """Registers the plugin with JAX if `JAX_PLATFORMS` (or `jax_platforms`) names it."""
    import jax

    platforms = (jax.config.jax_platforms or "").split(",")
    _look_for_spaces(platforms)
    if "mpi_cuda" not in platforms:
        _look_for_a_misspelling(platforms)
        return
    from mpi_cuda import _jax_plugin

    _jax_plugin.initialize()


def _look_for_spaces(platforms: list[str]) -> None:
    """JAX says that it does not know ` cpu`, which is hard to see."""
    if any("mpi_cuda" in name for name in platforms):
        for name in platforms:
            if name != name.strip():
                import warnings

                warnings.warn(
                    f"mpi_cuda: a space is a part of a platform's name for JAX, in {name!r}: set "
                    f"JAX_PLATFORMS={','.join(map(str.strip, platforms))}",
                    stacklevel=3,
                )
                return


def _look_for_a_misspelling(platforms: list[str]) -> None:
    """JAX's own remedy for a name that nobody has is to let it choose, which makes copies."""
    for name in platforms:
        letters = "".join(filter(str.isalpha, name.lower()))
        if letters in ("mpicuda", "cudampi", "mpi", "mpigpu", "mpicpu", "pjrtmpicuda"):
            import warnings

            warnings.warn(
                f"mpi_cuda: JAX knows no platform {name}: set JAX_PLATFORMS=mpi_cuda", stacklevel=2
            )
