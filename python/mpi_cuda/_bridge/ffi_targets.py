"""Hands FFI targets that Python registers (jaxlib's LAPACK, `jax.ffi.register_ffi_target`) over."""

from __future__ import annotations

import ctypes
from typing import Any

from mpi_cuda import _library
from mpi_cuda._jax_patches import custom_calls, untyped_calls

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype = ctypes.c_char_p
_capsule_name.argtypes = [ctypes.py_object]

# Ours replace jaxlib's: those cannot be registered with another plugin.
OWN = frozenset(
    {
        "xla_ffi_python_cpu_callback",
        "xla_ffi_partitioned_python_cpu_callback",
        "xla_buffer_python_cpu_callback",
    }
)


# mpi4jax's (0.9): the library brings its own handlers for them.
MPI4JAX = frozenset(
    f"mpi_{operation}_ffi"
    for operation in (
        *("allgather", "allreduce", "alltoall", "barrier", "bcast", "gather", "recv", "reduce"),
        *("scan", "scatter", "send", "sendrecv"),
    )
)


def _pointer(capsule: Any) -> int | None:
    if capsule is None:
        return None
    return _capsule_pointer(capsule, _capsule_name(capsule))


def _register(name: str, target: Any, api_version: int) -> None:
    if name in OWN or name in MPI4JAX or name.startswith("mpi_cuda_"):
        return
    if api_version == 0:
        _register_untyped(name, target)
        return
    handler: int | None
    if isinstance(target, dict):
        others = any(
            target.get(stage) is not None for stage in ("instantiate", "prepare", "initialize")
        )
        handler = None if others else _pointer(target.get("execute"))
    else:
        handler = _pointer(target)
    if _library.load().mpi_cuda_register_ffi_target(name.encode(), handler):
        raise RuntimeError(_library.last_error())


def _register_untyped(name: str, target: Any) -> None:
    handler = _library.load().mpi_cuda_register_untyped_target(name.encode(), _pointer(target))
    if handler is None:
        raise RuntimeError(_library.last_error())
    untyped_calls.handlers[name] = handler


def install() -> None:
    """Forwards all targets for the CPU, past and future.

    Those for GPUs are registered by JAX's own package with the plugin that is wrapped."""
    if not _library.load().mpi_cuda_on_gpu():
        custom_calls.forward(_register)
