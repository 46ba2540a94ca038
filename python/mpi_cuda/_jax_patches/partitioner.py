"""Programs that only JAX's own XLA can partition.

`custom_partitioning` and `inspect_array_sharding` hand XLA functions of Python, which are
registered with the XLA of jaxlib. The inner plugin has an XLA of its own, which knows nothing of
them. So our plugin hands such a program back (`pjrt_plugin/src/compile/partitioner.rs`), and a
client of jaxlib's for the CPU, with as many devices as the program is for, partitions it.

A rule of `custom_partitioning` is lowered apart from the program. JAX forgets the callbacks that
stand in it, and the process ends when they are called; here that is refused.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
from typing import Any

import jax
from jax._src.interpreters import mlir
from jax._src.lib import _jax, xla_client
from jax.interpreters.mlir import ir

from mpi_cuda import _library
from mpi_cuda._jax_patches import custom_calls, untyped_calls
from mpi_cuda._jax_patches.effect import CommunicationEffect
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="jaxlib's client for the CPU partitions what only jaxlib's XLA can",
        used=(
            "interpreters.mlir.build_mlir_module_helper",
            "lib._jax.CompileOptions",
            "lib._jax.DeviceList",
            "lib.xla_client.make_cpu_client",
            "lib.xla_client.register_custom_call_target",
        ),
        without="programs for several devices with `custom_partitioning` and "
        "`inspect_array_sharding` are refused",
        test="test_custom_partitioning_runs_its_rule",
    ),
)

#: An option of jaxlib's XLA: which products are left to a library that an older plugin lacks. None.
_LIBRARY = ("xla_cpu_experimental_ynn_fusion_type", "")
#: A row for each of our programs that jaxlib's XLA is partitioning.
_partitioning: list[None] = []
#: What the names of all targets for host callbacks contain.
_CALLBACK = "_python_cpu_callback"


def _partition(program: bytes, options: bytes) -> bytes:
    """The serialized module that jaxlib's XLA makes of `program`, in MLIR."""
    _register_targets()
    wanted: Any = _jax.CompileOptions.ParseFromString(options)
    devices = wanted.num_replicas * wanted.num_partitions
    client: Any = xla_client.make_cpu_client(num_devices=devices)

    def compiled_with(*more: tuple[str, str]) -> Any:
        own = _jax.CompileOptions.ParseFromString(options)
        own.env_option_overrides = [*own.env_option_overrides, *more]
        return client.compile_and_load(program, _jax.DeviceList(tuple(client.devices())), own)

    _partitioning.append(None)
    try:
        (module,) = _compiled(compiled_with).hlo_modules()
    finally:
        _partitioning.pop()
    return module.as_serialized_hlo_module_proto()


def _compiled(compiled_with: Any) -> Any:
    try:
        return compiled_with(_LIBRARY)
    except jax.errors.JaxRuntimeError as error:
        # A jaxlib without that option has no such library.
        if _LIBRARY[0] not in str(error):
            raise
        return compiled_with()


def _register_targets() -> None:
    """Tells jaxlib's XLA our targets: it refuses a custom call whose target it does not know."""
    _register_own_targets()
    if untyped_calls.handlers:
        custom_calls.register_with_jaxlib(untyped_calls.handlers)


@functools.cache
def _register_own_targets() -> None:
    found: list[tuple[bytes, int]] = []
    pair = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)
    visit = pair(lambda name, handler: found.append((name, handler)))
    _library.load().mpi_cuda_each_target(ctypes.cast(visit, ctypes.c_void_p))
    for name, handler in found:
        target = jax.ffi.pycapsule(ctypes.cast(handler, ctypes.c_void_p))
        xla_client.register_custom_call_target(name.decode(), target, "cpu", 1)


def _answer(program: int, length: int, options: int, options_length: int, result: int) -> None:
    try:
        given = _partition(
            ctypes.string_at(program, length), ctypes.string_at(options, options_length)
        )
        failed = 0
    except BaseException as error:
        # The plugin raises it again, or does without; a signal is for the main thread.
        if not isinstance(error, Exception):
            _thread.interrupt_main()
        given = f"{type(error).__name__}: {error}".encode()
        failed = 1
    _library.load().mpi_cuda_partitioned(result, failed, given, len(given))


_partitioner = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
)(_answer)


def _has_callback(module: Any) -> bool:
    found = []

    def look(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call":
            found.append(_CALLBACK in str(operation.attributes["call_target_name"]))
        return ir.WalkResult.ADVANCE

    with module.context:
        module.operation.walk(look)
    return any(found)


def _without_callbacks(original: Any) -> Any:
    @functools.wraps(original)
    def build(rule: Any, **options: Any) -> Any:
        if any(isinstance(effect, CommunicationEffect) for effect in rule.effects):
            raise NotImplementedError(
                "an operation of mpi_cuda stands in the partition rule of a custom_partitioning, "
                "where JAX keeps no order; express it by jax.lax.psum, all_gather, ppermute and "
                "the like over the axes of the mesh, or use the operation in jax.shard_map"
            )
        module = original(rule, **options)
        if _has_callback(module):
            raise NotImplementedError(
                "a callback (jax.debug.print, io_callback, pure_callback) stands in the partition "
                "rule of a custom_partitioning, where JAX does not keep it; put it outside of the "
                "function that is partitioned"
            )
        return untyped_calls.typed(module) if _partitioning else module

    return build


def install() -> None:
    """Tells our plugin whom to ask, and wraps what lowers a rule."""
    module: Any = mlir
    module.build_mlir_module_helper = _without_callbacks(module.build_mlir_module_helper)
    _library.load().mpi_cuda_set_partitioner(ctypes.cast(_partitioner, ctypes.c_void_p))
