"""Targets that Python registers: jaxlib's LAPACK, `jax.ffi.register_ffi_target`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import jax
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


#: Targets of which jaxlib's XLA has a handler of ours, which it never gives back.
_ours: set[str] = set()


def forward(register: Callable[[str, Any, int], None]) -> None:
    """Calls `register` with the name, handler and API version (0 or 1, as in
    `jax.ffi.register_ffi_target`) of every target for the CPU, past and future; jaxlib's own CPU
    client gets them too."""
    registered = dict(xla_client.custom_call_targets("Host"))
    for name, target in registered.items():
        register(name, target, int(_is_typed(target)))

    def handler(
        name: str | bytes, target: Any, platform: str, api_version: int = 0, traits: Any = 0
    ) -> None:
        text = name.decode() if isinstance(name, bytes) else name
        if api_version and text in _ours:
            raise ValueError(
                f"{text} was registered with api_version=0, and since then mpi_cuda has given "
                "jaxlib a typed target of that name, to compile a program with "
                "custom_partitioning: register the typed one before that, or under another name"
            )
        register(text, target, api_version)
        _jax.register_custom_call_target(name, target, platform, api_version, traits)

    # A second handler would be ignored; ours serves both clients.
    xla_client._custom_callback_handler.pop("Host", None)
    xla_client.register_custom_call_handler("Host", handler)


def _is_typed(registered: Any) -> bool:
    """Whether jaxlib knows an FFI target, which has stages. Others are functions."""
    return isinstance(registered, dict)


def register_with_jaxlib(handlers: Mapping[str, int]) -> None:
    """Tells jaxlib's XLA alone these handlers, by name, where it has no FFI target yet."""
    known = dict(xla_client.custom_call_targets("Host"))
    for name, handler in handlers.items():
        if not _is_typed(known.get(name)):
            target = jax.ffi.pycapsule(ctypes.cast(handler, ctypes.c_void_p))
            _jax.register_custom_call_target(name, target, "Host", 1, 0)
            _ours.add(name)
