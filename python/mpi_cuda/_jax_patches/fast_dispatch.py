"""The order of operations costs nothing per call.

At the top of a program their effect would make JAX leave its fast dispatch path and pass a token
from program to program. Between programs the library keeps the order (by tickets), so there the
effect is hidden: the whole program becomes one equation without it, which makes its own token.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

import jax
from jax._src.interpreters import mlir as private_mlir
from jax._src.interpreters import pxla
from jax.interpreters import mlir

from mpi_cuda import _library
from mpi_cuda._jax_patches import jax_core, jaxprs, places, uniform
from mpi_cuda._jax_patches.effect import effect, only_operations
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="what lowers a program is wrapped, and gets it without the effect",
        used=("interpreters.pxla._cached_lowering_to_hlo", "interpreters.mlir.jaxpr_subcomp"),
        without="a warning; calls are slower",
        test="test_fast_dispatch_is_taken_with_this_jax",
    ),
    Patch(
        what="the hidden program is one equation, lowered anew at each place",
        used=("interpreters.mlir._uncacheable_primitives",),
        without="an error at import",
        test="test_fast_dispatch_is_taken_with_this_jax",
    ),
)

is_taken = False
"""Whether the effect is hidden from JAX's dispatch; False means slower, not wrong."""

_program_p = jax_core.Primitive("mpi_cuda_program")
_program_p.multiple_results = True


def _abstract_eval(*_: Any, program: Any) -> Any:
    return program.out_avals, {e for e in program.effects if e != effect}


@functools.cache
def _takes_traceback() -> bool:
    """Since JAX 0.9.1 it wants one."""
    parameters = inspect.signature(private_mlir.jaxpr_subcomp).parameters
    return "outer_traceback" in parameters


def _lowering(ctx: mlir.LoweringRuleContext, *args: Any, program: Any) -> Any:
    inner = mlir.TokenSet.create([effect])
    tokens = mlir.TokenSet({**dict(ctx.tokens_in.items()), **dict(inner.items())})
    consts = [mlir.ir_constant(c, aval=jax.typeof(c)) for c in program.consts]
    mark = uniform.mark(program.jaxpr, effect)
    jaxpr = program.jaxpr if mark else places.place(program.jaxpr, effect)
    uniform.set_pending(mark)
    try:
        results, tokens_out = private_mlir.jaxpr_subcomp(
            ctx.module_context,
            jaxpr,
            ctx.name_stack,
            tokens,
            consts,
            *args,
            dim_var_values=ctx.dim_var_values,
            const_lowering=ctx.const_lowering,
            **({"outer_traceback": ctx.traceback} if _takes_traceback() else {}),
        )
    finally:
        uniform.set_pending(None)
    others = {e: t for e, t in tokens_out.items() if e in ctx.tokens_in.effects()}
    if others:
        ctx.set_tokens_out(mlir.TokenSet(others))
    return results


_program_p.def_effectful_abstract_eval(_abstract_eval)
private_mlir._uncacheable_primitives.add(_program_p)
mlir.register_lowering(_program_p, _lowering)

# The same object for the same program, so that JAX's own caches by identity work. None is kept
# longer than JAX keeps the program, and with it the arrays that the program captured.
_hidden: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _hide(program: Any) -> Any:
    """The program as one equation without our effect."""
    known = _hidden.get(program)
    if known is None:
        # Of a copy: what refers to its own key would keep it.
        known = _hidden.setdefault(program, _as_one_equation(program.replace()))
    return known


def _as_one_equation(program: Any) -> Any:
    jaxpr = program.jaxpr
    invars = [jaxprs.Var(v.aval) for v in jaxpr.invars]
    outvars = [jaxprs.Var(v.aval) for v in jaxpr.outvars]
    remaining = {e for e in program.effects if e != effect}
    eqn = jaxprs.new_equation(invars, outvars, _program_p, {"program": program}, remaining)
    return jaxprs.program(invars, outvars, [eqn], remaining, jaxpr.debug_info)


def install() -> None:
    """Hides the effect from dispatch; with another JAX, says that it cannot."""
    global is_taken
    original: Any = getattr(pxla, "_cached_lowering_to_hlo", None)
    if original is None or not hasattr(private_mlir, "jaxpr_subcomp"):
        _library.warn(
            "this version of JAX has no fast dispatch for operations; calls are slower",
        )
        return

    @functools.wraps(original)
    def lowering(program: Any, *args: Any, **kwargs: Any) -> Any:
        if only_operations(program):
            return original(_hide(program), *args, **kwargs)
        if effect in program.effects:
            uniform.set_pending(uniform.mark(program.jaxpr, effect, callbacks=True))
        try:
            return original(program, *args, **kwargs)
        finally:
            uniform.set_pending(None)

    for name in ("cache_clear", "cache_info", "cache_keys", "evict_weakref"):
        if hasattr(original, name):
            setattr(lowering, name, getattr(original, name))
    setattr(pxla, "_cached_lowering_to_hlo", lowering)  # noqa: B010
    is_taken = True
