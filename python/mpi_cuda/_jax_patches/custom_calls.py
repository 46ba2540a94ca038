"""FFI targets that Python registers: jaxlib's LAPACK, `jax.ffi.register_ffi_target`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxlib import _jax, xla_client

from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="FFI targets for the CPU are ours too",
        used=(
            "jaxlib._jax.register_custom_call_target",
            "jaxlib.xla_client._custom_callback_handler",
            "jaxlib.xla_client.custom_call_targets",
            "jaxlib.xla_client.register_custom_call_handler",
        ),
        without="an error at start",
        test="test_linear_algebra",
    ),
)


def forward(register: Callable[[str, Any, int], None]) -> None:
    """Calls `register` with the name, handler and API version of every FFI target for the CPU, past
    and future; jaxlib's own CPU client gets them too."""
    registered = dict(xla_client.custom_call_targets("Host"))
    for name, target in registered.items():
        register(name, target, 1)

    def handler(
        name: str, target: Any, platform: str, api_version: int = 0, traits: Any = 0
    ) -> None:
        register(name, target, api_version)
        _jax.register_custom_call_target(name, target, platform, api_version, traits)

    # A second handler would be ignored; ours serves both clients.
    xla_client._custom_callback_handler.pop("Host", None)
    xla_client.register_custom_call_handler("Host", handler)
