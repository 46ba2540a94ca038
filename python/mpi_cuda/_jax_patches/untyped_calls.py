"""Custom calls of the interface that XLA had before FFI, "untyped" ones.

XLA runs them only on its own CPU backend: PJRT has no way to register their functions with a
plugin. So a program is compiled with typed custom calls instead, of the same targets, which have
what the function is to be told as attributes (`pjrt_plugin/src/ffi/untyped.rs`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from jax._src import compiler
from jax.interpreters import mlir
from jax.interpreters.mlir import ir

from mpi_cuda import _library, _lifecycle
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="what compiles is wrapped, and untyped custom calls become typed ones",
        used=("compiler.backend_compile_and_load",),
        without="programs that call targets of `api_version=0` are refused",
        test="test_each_convention_has_the_results_of_jax",
    ),
)

#: The handlers that call the untyped targets, by name; `_bridge/ffi_targets.py` fills it.
handlers: dict[str, int] = {}

#: XLA's number of typed calls; those below are the conventions before.
_TYPED = 4
_ORIGINAL = 1
#: A dictionary in place of the text, which only XLA's own targets read.
_DICTIONARY = "mhlo.backend_config"


def _calls(module: Any) -> Iterator[Any]:
    """The untyped custom calls of known targets."""
    found = []

    def look(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call" and _is_untyped(operation.attributes):
            found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(look)
    return iter(found)


def _is_untyped(attributes: Any) -> bool:
    return (
        ir.StringAttr(attributes["call_target_name"]).value in handlers
        and _ORIGINAL <= _convention(attributes) < _TYPED
        and _DICTIONARY not in attributes
    )


def _convention(attributes: Any) -> int:
    if "api_version" not in attributes:
        return _ORIGINAL
    return ir.IntegerAttr(attributes["api_version"]).value


def _make_typed(call: Any) -> None:
    attributes = call.attributes
    opaque = b""
    if "backend_config" in attributes:
        opaque = ir.StringAttr(attributes["backend_config"]).value_bytes
    # XLA makes a tuple of none or several results.
    is_tuple = len(call.results) != 1 or str(call.results[0].type).startswith("tuple<")
    number = ir.IntegerType.get_signless(64)
    attributes["backend_config"] = ir.DictAttr.get(
        {
            "mpi_cuda.untyped_convention": ir.IntegerAttr.get(number, _convention(attributes)),
            "mpi_cuda.untyped_is_tuple": ir.IntegerAttr.get(number, int(is_tuple)),
            "mpi_cuda.untyped_opaque": ir.StringAttr.get(opaque),
        }
    )
    attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), _TYPED)


def typed(module: Any) -> Any:
    """`module`, or a copy of it where untyped custom calls of known targets are typed ones."""
    if not handlers:
        return module
    with module.context:
        if next(_calls(module), None) is None:
            return module
        copy = ir.Module.parse(mlir.module_to_bytecode(module))
        for call in _calls(copy):
            _make_typed(call)
    return copy


def _with_typed_calls(original: Any) -> Any:
    @functools.wraps(original)
    def compile_and_load(backend: Any, module: Any, *args: Any, **options: Any) -> Any:
        if _library.is_ours(backend):
            _lifecycle.refuse_in_child("a compilation")
            module = typed(module)
        return original(backend, module, *args, **options)

    return compile_and_load


def install() -> None:
    """Wraps what compiles; with another JAX such programs are refused as the plugin says."""
    module: Any = compiler
    if not hasattr(module, "backend_compile_and_load"):
        return
    module.backend_compile_and_load = _with_typed_calls(module.backend_compile_and_load)
