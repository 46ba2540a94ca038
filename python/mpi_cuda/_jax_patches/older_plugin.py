"""Programs in a form that the inner plugin can read.

JAX writes programs in versions of StableHLO that a plugin of the last twelve weeks reads. That does
not hold for what Shardy says in types which MLIR's own dialect has learnt to write since, floats of
8, 6 and 4 bits: the inner plugin (`xla-cpu-pjrt` 0.0.1) does not know their codes. Such a program
is compiled once more with Shardy's part as attributes, as it goes through XLA's own HLO.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax._src import compiler
from jax._src.lib import _jax
from jax.interpreters import mlir
from jax.interpreters.mlir import ir

from mpi_cuda import _library
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="what compiles is wrapped, and programs go through HLO where they must",
        used=(
            "compiler.backend_compile_and_load",
            "lib._jax.mlir.mlir_module_to_xla_computation",
            "lib._jax.mlir.xla_computation_to_mlir_module",
        ),
        without="a warning; programs for several devices with floats of 8 bits and less need "
        "`jax_use_shardy_partitioner=False`",
        test="test_8_bit_floats_are_moved",
    ),
)

#: How the inner plugin's MLIR says that it does not know what it reads.
_UNREADABLE = "unknown attribute code"
#: What Shardy's attributes say already; beside it, JAX takes the program for one of before Shardy.
_SHARDING = "mhlo.sharding"
_MESH = "stablehlo.mesh"


def _through_hlo(module: Any) -> Any:
    """`module` with Shardy's part as attributes."""
    program = mlir.module_to_bytecode(module)
    computation = _jax.mlir.mlir_module_to_xla_computation(program)
    with module.context:
        older = ir.Module.parse(_jax.mlir.xla_computation_to_mlir_module(computation))
        older.operation.walk(_without_sharding)
        _keep_meshes(module, older)
        before, after = _main(module), _main(older)
        for attributes in ("arg_attrs", "res_attrs"):
            _keep(attributes, before, after)
    return older


def _keep_meshes(before: Any, after: Any) -> None:
    """Newer collectives name their groups by a mesh, whose plain form stands beside Shardy's."""
    plain = {str(mesh["mesh"]): mesh[_MESH] for mesh in _meshes(before) if _MESH in mesh}
    for mesh in _meshes(after):
        if str(mesh["mesh"]) in plain:
            mesh[_MESH] = plain[str(mesh["mesh"])]


def _meshes(module: Any) -> list[Any]:
    """The attributes of each."""
    return [op.operation.attributes for op in module.body if op.operation.name == "sdy.mesh"]


def _main(module: Any) -> Any:
    return ir.SymbolTable(module.operation)["main"].operation


def _without_sharding(operation: Any) -> Any:
    if _SHARDING in operation.attributes:
        del operation.attributes[_SHARDING]
    return ir.WalkResult.ADVANCE


def _keep(attributes: str, before: Any, after: Any) -> None:
    """HLO has no place for donors, layouts and memory kinds of arguments and results."""
    if attributes not in before.attributes:
        return
    originals = before.attributes[attributes]
    converted: Any = [{}] * len(originals)
    if attributes in after.attributes:
        converted = after.attributes[attributes]
    merged = []
    for original, own in zip(originals, converted, strict=True):
        names = {name: value for name, value in _items(own) if name != _SHARDING}
        names.update((n, v) for n, v in _items(original) if not n.startswith(("sdy.", "mhlo.sh")))
        merged.append(ir.DictAttr.get(names))
    after.attributes[attributes] = ir.ArrayAttr.get(merged)


def _items(attributes: Any) -> list[tuple[str, Any]]:
    return [(attribute.name, attribute.attr) for attribute in attributes]


def _once_more(original: Any) -> Any:
    @functools.wraps(original)
    def compile_and_load(backend: Any, module: Any, *args: Any, **options: Any) -> Any:
        try:
            return original(backend, module, *args, **options)
        except jax.errors.JaxRuntimeError as error:
            if _UNREADABLE not in str(error):
                raise
        return original(backend, _through_hlo(module), *args, **options)

    return compile_and_load


def install() -> None:
    """Wraps what compiles; with another JAX such programs fail as the inner plugin says."""
    module: Any = compiler
    if not hasattr(module, "backend_compile_and_load"):
        _library.warn(
            "with this version of JAX, programs for several devices with floats of 8 "
            "bits and less may need jax_use_shardy_partitioner=False",
        )
        return
    module.backend_compile_and_load = _once_more(module.backend_compile_and_load)
