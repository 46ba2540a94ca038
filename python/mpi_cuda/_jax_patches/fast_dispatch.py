"""The one touch of JAX's internals: operations keep their trace order, at no cost per call.

Every operation has the effect of `io_callback(ordered=True)`, so JAX threads one token through
both, into `jit`, loops and branches, and never deletes an operation. At the top of a program that
effect would make JAX leave its fast dispatch path and pass a token from program to program. Between
programs the library keeps the order (by tickets), so there the effect is hidden: the whole program
becomes one equation without it, which makes its own token.

If JAX changes, `install` says so and everything still works with JAX's own tokens, only slower.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from jax._src import callback as jax_callback
from jax._src import core, dispatch, effects
from jax._src.interpreters import mlir, pxla
from jax.interpreters import mlir as public_mlir

from mpi_cuda._jax_patches import uniform


class CommunicationEffect(jax_callback.OrderedIOEffect):
    """Equal to the effect of ordered callbacks, so that one token orders both."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, jax_callback.OrderedIOEffect)

    def __hash__(self) -> int:
        return hash(jax_callback._OrderedIOEffect)


def _make_equal() -> None:
    # Python asks the left operand first unless the right one is of a subclass, so that ours is
    # always asked; only the hash has to agree.
    effects.remat_allowed_effects.add_type(CommunicationEffect)
    effects.custom_derivatives_allowed_effects.add_type(CommunicationEffect)
    # So that the tangent of a send, which has no result, is kept.
    effects.partial_eval_kept_effects.add_type(CommunicationEffect)


effect = CommunicationEffect()
_make_equal()

fast_dispatch = False
"""Whether the effect is hidden from JAX's dispatch; False means slower, not wrong."""

_scope_p = core.Primitive("mpi_cuda_program")
_scope_p.multiple_results = True


def _scope_abstract_eval(*_: Any, program: core.ClosedJaxpr) -> Any:
    return program.out_avals, {e for e in program.effects if e != effect}


_scope_p.def_effectful_abstract_eval(_scope_abstract_eval)


def _scope_lowering(ctx: mlir.LoweringRuleContext, *args: Any, program: core.ClosedJaxpr) -> Any:
    inner = mlir.TokenSet.create([effect])
    tokens = mlir.TokenSet({**dict(ctx.tokens_in.items()), **dict(inner.items())})
    consts = [mlir.ir_constant(c, aval=core.typeof(c)) for c in program.consts]
    uniform.set_pending(uniform.mark(program.jaxpr, effect))
    try:
        results, tokens_out = mlir.jaxpr_subcomp(
            ctx.module_context,
            program.jaxpr,
            ctx.name_stack,
            tokens,
            consts,
            *args,
            dim_var_values=ctx.dim_var_values,
            const_lowering=ctx.const_lowering,
            outer_traceback=ctx.traceback,
        )
    finally:
        uniform.set_pending(None)
    others = {e: t for e, t in tokens_out.items() if e in ctx.tokens_in.effects()}
    if others:
        ctx.set_tokens_out(mlir.TokenSet(others))
    return results


mlir._uncacheable_primitives.add(_scope_p)
public_mlir.register_lowering(_scope_p, _scope_lowering)


def has_host_callback(jaxpr: core.Jaxpr) -> bool:
    """Whether a program has callbacks; those keep JAX's own tokens between programs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive in (jax_callback.io_callback_p, jax_callback.pure_callback_p):
            return True
        if "callback" in eqn.primitive.name:
            return True
        for sub in core.jaxprs_in_params(eqn.params):
            if has_host_callback(getattr(sub, "jaxpr", sub)):
                return True
    return False


def only_operations(jaxpr: Any) -> bool:
    """Whether a program has the effect, and no ordered callbacks, which have the same one."""
    return effect in jaxpr.effects and not has_host_callback(getattr(jaxpr, "jaxpr", jaxpr))


def program(
    invars: Sequence[core.Var],
    outvars: Sequence[core.Var],
    eqns: Sequence[core.JaxprEqn],
    effects: set[core.Effect],
    debug_info: core.DebugInfo,
) -> core.ClosedJaxpr:
    """A program without constants."""
    jaxpr = core.Jaxpr([], invars, outvars, eqns, effects, debug_info=debug_info, is_high=False)
    # JAX 0.12 has one class for both.
    close: Any = getattr(core, "ClosedJaxpr", lambda jaxpr, _: jaxpr)
    return close(jaxpr, ())


# The same object for the same program, so that JAX's own caches by identity work. None is kept
# longer than JAX keeps the program, and with it the arrays that the program captured.
_hidden: weakref.WeakKeyDictionary[core.ClosedJaxpr, core.ClosedJaxpr] = weakref.WeakKeyDictionary()


def _hide(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The program as one equation without our effect."""
    known = _hidden.get(closed)
    if known is None:
        # Of a copy: what refers to its own key would keep it.
        known = _hidden.setdefault(closed, _as_one_equation(closed.replace()))
    return known


def _as_one_equation(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    jaxpr = closed.jaxpr
    invars = [core.Var(v.aval) for v in jaxpr.invars]
    outvars = [core.Var(v.aval) for v in jaxpr.outvars]
    remaining = {e for e in closed.effects if e != effect}
    eqn = core.new_jaxpr_eqn(invars, outvars, _scope_p, {"program": closed}, remaining)
    return program(invars, outvars, [eqn], remaining, jaxpr.debug_info)


def install() -> None:
    """Hides the effect from dispatch, and makes `jax.effects_barrier` wait for operations."""
    global fast_dispatch
    if fast_dispatch:
        return
    _install_barrier()
    _install_token_passing()
    original: Any = getattr(pxla, "_cached_lowering_to_hlo", None)
    if original is None or not hasattr(mlir, "jaxpr_subcomp"):
        warnings.warn(
            "mpi_cuda: this version of JAX has no fast dispatch for operations; calls are slower",
            stacklevel=2,
        )
        return

    @functools.wraps(original)
    def lowering(closed: core.ClosedJaxpr, *args: Any, **kwargs: Any) -> Any:
        if effect in closed.effects and not has_host_callback(closed.jaxpr):
            closed = _hide(closed)
        return original(closed, *args, **kwargs)

    for name in ("cache_clear", "cache_info", "cache_keys", "evict_weakref"):
        if hasattr(original, name):
            setattr(lowering, name, getattr(original, name))
    setattr(pxla, "_cached_lowering_to_hlo", lowering)  # noqa: B010
    fast_dispatch = True


def _install_barrier() -> None:
    from mpi_cuda import _library

    tokens: Any = type(dispatch.runtime_tokens)
    original = tokens.block_until_ready

    def block_until_ready(self: Any) -> None:
        original(self)
        if _library.load().mpi_cuda_wait():
            raise RuntimeError(_library.last_error())

    tokens.block_until_ready = block_until_ready


def _install_token_passing() -> None:
    """JAX waits for the token of one program with ordered callbacks before it dispatches the next;
    here the next gets the token as it is, so that dispatch does not wait for a peer."""
    from mpi_cuda import _library

    original: Any = pxla.shard_arg_handlers[core.Token]

    def as_it_is(token: core.Token, sharding: Any) -> Any:
        array, devices = token._buf, sharding._addressable_device_assignment
        same_device = array.sharding.num_devices == 1 and array.devices() == set(devices)
        if not same_device or not _library.is_ours(devices[0].client):
            return None
        return pxla.batched_device_put(array.aval, sharding, [array], devices)

    @functools.wraps(original)
    def shard_tokens(tokens: Any, shardings: Any, *others: Any) -> Any:
        passed = [as_it_is(*pair) for pair in zip(tokens, shardings, strict=True)]
        if any(token is None for token in passed):
            return original(tokens, shardings, *others)
        return passed

    pxla.shard_arg_handlers[core.Token] = shard_tokens
