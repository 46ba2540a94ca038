"""Stands in for mpi4jax's bridge (0.9), so that its programs are executed by this library.

mpi4jax's bridge is built for one MPI and writes MPI's handles and addresses into programs. Where
the backend mpi_cuda is selected, `mpi_cuda_startup` has Python import this module instead of
`mpi4jax._src.xla_bridge.mpi_xla_bridge_cpu`; on GPUs it stands in for `mpi_xla_bridge_cuda` too.
mpi4jax itself stays as it is; what it asks its own `utils` for is answered with the numbers and the
effect of ours:

- communicators, reductions and status are numbers in programs, as in ours (`_arguments`);
- its ordered effect is ours, so that one order holds for the operations of both, and calls take
  JAX's fast dispatch path (`_jax_patches`);
- equal communicators and reductions are one hashable object, so that an eager call compiles once.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import types
from typing import Any

from mpi4py import MPI

from mpi_cuda import _arguments, _jax_patches, _library
from mpi_cuda._bridge.ffi_targets import MPI4JAX
from mpi_cuda._jax_patches.effect import effect

MPI_STATUS_IGNORE_ADDR = 0

MPI_ABI_INFO = {
    "sizeof_comm": MPI._sizeof(MPI.COMM_WORLD),
    "sizeof_datatype": MPI._sizeof(MPI.BYTE),
    "sizeof_op": MPI._sizeof(MPI.SUM),
    "sizeof_status": MPI._sizeof(MPI.Status()),
    "comm_world_handle": MPI._handleof(MPI.COMM_WORLD),
    "mpi_library_version": MPI.Get_library_version(),
}

_logging = False


def set_logging(enable: bool) -> None:
    """mpi4jax's switch; `MPI_CUDA_LOG=debug` prints every operation instead."""
    global _logging
    _logging = bool(enable)


def get_logging() -> bool:
    """What `set_logging` was called with."""
    return _logging


def _elsewhere() -> Any:
    """A handler for JAX's own CPU backend, as the capsule that JAX asks for."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    handler = _library.load().mpi_cuda_mpi4jax_elsewhere
    return new(ctypes.cast(handler, ctypes.c_void_p), None, None)


ffi_targets = {name.removesuffix("_ffi"): _elsewhere() for name in MPI4JAX}


def _for_cuda() -> types.ModuleType:
    """The other bridge, whose targets the plugin has registered."""
    module: Any = types.ModuleType("mpi4jax._src.xla_bridge.mpi_xla_bridge_cuda", __doc__)
    module.set_logging, module.get_logging = set_logging, get_logging
    # It tells whether MPI knows CUDA, which this library finds out itself.
    module.set_copy_to_host = lambda enable: None
    module.ffi_targets = {}
    return module


def _handle(value: Any) -> int:
    """What stands in programs for an MPI object."""
    if isinstance(value, MPI.Comm):
        return _arguments.resolve_comm(value).number
    if isinstance(value, MPI.Op):
        return _arguments.resolve_op(value).number
    if isinstance(value, MPI.Datatype):
        return 0  # The arrays themselves have one.
    raise TypeError(f"mpi4jax asks for the handle of {value!r}, which mpi_cuda does not know")


def _install() -> None:
    compat: Any = importlib.import_module("mpi4jax._src.jax_compat")
    register_effect = compat.register_effect

    def shared_effect(effect_type: Any, ordered: bool = False) -> Any:
        if effect_type.__name__ == "OrderedMPIEffect":
            return effect
        return register_effect(effect_type, ordered)

    compat.register_effect = shared_effect
    utils: Any = importlib.import_module("mpi4jax._src.utils")
    missing = [name for name in ("to_mpi_handle", "to_mpi_ptr") if not hasattr(utils, name)]
    if missing or utils.ordered_effect is not effect:
        raise ImportError(
            "mpi_cuda executes the calls of mpi4jax 0.9, and this version differs (no "
            f"{', '.join(missing) or 'ordered effect'}): install mpi4jax 0.9.1, or use mpi_cuda's "
            "own operations (mpi_cuda.notoken)"
        )
    pointer = utils.to_mpi_ptr

    def to_mpi_ptr(value: Any) -> Any:
        # Only addresses of statuses get into programs, when they are lowered.
        if not isinstance(value, MPI.Status):
            return pointer(value)
        _library.load().mpi_cuda_reads_status()
        return _arguments.resolve_status(value)

    hashable, wrap = utils.HashableMPIType, utils.wrap_as_hashable
    wrappers: dict[Any, Any] = {}

    def wrap_as_hashable(value: Any) -> Any:
        if isinstance(value, hashable) or not isinstance(value, MPI.Comm | MPI.Op):
            return wrap(value)
        key = (type(value), MPI._handleof(value))
        known = wrappers.get(key)
        # A freed object has become another one; what was compiled with it is not used again.
        if known is None or known.wrapped != value:
            known = wrappers[key] = wrap(value)
        return known

    if _library.load().mpi_cuda_on_gpu():
        bridge = _for_cuda()
        sys.modules[bridge.__name__] = bridge
        # It would warn that its MPI is not said to know CUDA.
        decorators: Any = importlib.import_module("mpi4jax._src.decorators")
        decorators._cuda_mpi_setup_done = True
    utils.to_mpi_handle = _handle
    utils.to_mpi_ptr = to_mpi_ptr
    utils.wrap_as_hashable = wrap_as_hashable
    _jax_patches.install("operation")


_install()
