"""All ranks take the same derivative of an operation, even one with nothing to differentiate.

JAX leaves out the tangent of an operation whose operand is a constant, and the batch of one that is
not batched. Both are decided on each rank alone, and one rank may pass a constant where another
passes what is differentiated (a placeholder off the root), or lose a zero that another keeps. So
here an operation always has a tangent while derivatives are taken, and the operations that
derivatives make are always batched: zeros, but tied to what is differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import local
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import ad_checkpoint as remat
from jax._src import core, pjit, source_info_util
from jax._src.interpreters import ad as private_ad
from jax._src.interpreters import batching as private_batching
from jax._src.interpreters import partial_eval as pe
from jax._src.lax.control_flow import conditionals, loops
from jax.interpreters import ad, batching, mlir

from mpi_cuda._jax_patches import jax_core, jaxprs
from mpi_cuda._jax_patches.effect import only_operations
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="an operation has a tangent, and in derivatives a batch, whatever it gets",
        used=(
            "core.Primitive.bind_with_trace",
            "core.set_current_trace",
            "interpreters.ad.JVPTrace.to_primal_tangent_pair",
            "interpreters.ad.LinearizeTrace.to_primal_tangent_pair",
            "interpreters.ad.LinearizeTracer",
            "interpreters.batching.BatchTrace.to_batch_info",
            "interpreters.batching.BatchTracer",
            "interpreters.partial_eval.DynamicJaxprTrace.var_to_tracer",
            "source_info_util.current",
        ),
        without="ranks must not differ in what is constant where derivatives are taken",
        test="test_a_placeholder_where_the_operand_does_not_matter",
    ),
    Patch(
        what="so do programs with operations",
        used=(
            "ad_checkpoint.remat_p",
            "interpreters.ad.JVPTrace.process_primitive",
            "interpreters.ad.LinearizeTrace.process_primitive",
            "lax.control_flow.conditionals.cond_p",
            "lax.control_flow.loops.scan_p",
            "lax.control_flow.loops.while_p",
            "pjit.jit_p",
        ),
        without="ranks must not differ in what is constant in `jit`, loops and branches",
        test="test_a_paired_receive_that_jax_takes_for_a_constant_is_refused",
    ),
)

_state = local()


@contextmanager
def derived() -> Iterator[None]:
    """The operations called inside are those of a derivative."""
    outer, _state.derived = is_derived(), True
    try:
        yield
    finally:
        _state.derived = outer


def is_derived() -> bool:
    """Whether this thread is in such a block."""
    return getattr(_state, "derived", False)


# Zeros that JAX takes for a linear function of an array: what depends on it is differentiated and
# batched like the array, and costs nothing when it runs.

_nothing_p = jax_core.Primitive("mpi_cuda_nothing")
_nothing_p.def_impl(lambda x, shape, dtype: jnp.zeros(shape, dtype))
_nothing_p.def_abstract_eval(lambda x, shape, dtype: jax.core.ShapedArray(shape, dtype))
mlir.register_lowering(
    _nothing_p, mlir.lower_fun(lambda x, shape, dtype: jnp.zeros(shape, dtype), False)
)


def _batch_nothing(args: Any, dims: Any, *, shape: tuple[int, ...], dtype: Any) -> Any:
    size = args[0].shape[dims[0]]
    return _nothing_p.bind(args[0], shape=(size, *shape), dtype=dtype), 0


def _nothing_transpose(ct: Any, x: Any, *, shape: Any, dtype: Any) -> Any:
    return [nothing(ad.instantiate_zeros(ct), x.aval.shape, x.aval.dtype)]


batching.primitive_batchers[_nothing_p] = _batch_nothing
ad.deflinear2(_nothing_p, _nothing_transpose)


def nothing(x: Any, shape: Sequence[int] = (), dtype: Any = np.float32) -> Any:
    """Zeros that depend on `x`, so that JAX treats them like it."""
    return _nothing_p.bind(x, shape=tuple(shape), dtype=np.dtype(dtype))


def is_differentiable(aval: Any) -> bool:
    """Whether an array of this kind has tangents."""
    # Tokens have no dtype.
    return hasattr(aval, "dtype") and bool(jnp.issubdtype(aval.dtype, jnp.inexact))


class Linear(jax_core.Primitive):
    """An operation that is linear, unless its attributes say otherwise."""

    def is_linear(self, params: dict[str, Any]) -> bool:
        """Whether it has derivatives with these parameters."""
        return True

    def bind_with_trace(self, trace: Any, args: Any, *rest: Any) -> Any:
        """Called by JAX for every transformation that the operation goes through."""
        params = rest[-1]
        if args and self.is_linear(params):
            args = [_prepared(trace, args[0], params), *args[1:]]
        return super().bind_with_trace(trace, args, *rest)


def _prepared(trace: Any, x: Any, params: dict[str, Any]) -> Any:
    """The operand, with a tangent while derivatives are taken; batched, if of a derivative."""
    if isinstance(trace, ad.JVPTrace | private_ad.LinearizeTrace):
        return _with_tangent(trace, x)
    if isinstance(trace, private_batching.BatchTrace) and params.get("derived"):
        value, dim = trace.to_batch_info(x)
        if dim is None:
            size = trace.axis_data.size
            with core.set_current_trace(trace.parent_trace):
                value = jax.lax.broadcast(value, (size,))
            return private_batching.BatchTracer(trace, value, 0, source_info_util.current())
    return x


def _with_tangent(trace: Any, x: Any) -> Any:
    primal, tangent = trace.to_primal_tangent_pair(x)
    aval = jax.typeof(primal)
    if type(tangent) is not ad.Zero or not is_differentiable(aval):
        return x
    forward = isinstance(trace, ad.JVPTrace)
    home = trace.parent_trace if forward else trace.tangent_trace
    source = _any_input(home)
    with core.set_current_trace(home):
        zeros = (
            ad.instantiate_zeros(tangent) if source is None else nothing(source, *_shaped(tangent))
        )
    return (ad.JVPTracer if forward else private_ad.LinearizeTracer)(trace, primal, zeros)


def _shaped(tangent: Any) -> tuple[Any, Any]:
    return tangent.aval.shape, tangent.aval.dtype


def _any_input(trace: Any) -> Any:
    """An input of the program that the tangents become. The last ones are tangents themselves
    (`ad.linearize_jaxpr`, `ad.jvp_jaxpr`): what is tied to them is not taken for a constant."""
    if isinstance(trace, pe.DynamicJaxprTrace):
        for var in reversed(trace.frame.invars):
            if is_differentiable(var.aval):
                return trace.var_to_tracer(var, source_info_util.current())
    return None


def _calls() -> frozenset[Any]:
    """What runs programs inside, and is left out like an operation if all it gets is constant."""
    return frozenset({pjit.jit_p, loops.scan_p, conditionals.cond_p, remat.remat_p})


def _is_harmless(program: Any) -> bool:
    """Whether a tangent can go through a program, wherever it gets: not through a reduction like
    MAX, nor back through a `while_loop`, where what is constant on all ranks must be let in."""
    for eqn in jaxprs.bare(program).eqns:
        primitive, inside = eqn.primitive, list(jaxprs.in_params(eqn.params))
        if isinstance(primitive, Linear):
            if not primitive.is_linear(eqn.params):
                return False
        elif primitive is loops.while_p or not all(map(_is_harmless, inside)):
            return False
        elif not inside and primitive not in ad.primitive_jvps:
            return False
    return True


def install() -> None:
    """Lets programs with operations have tangents in the same way; for this JAX, if it can."""
    try:
        calls = _calls()
    except AttributeError:
        return
    for trace in (private_ad.JVPTrace, private_ad.LinearizeTrace):
        _install_calls(trace, calls)


def _install_calls(trace: Any, calls: frozenset[Any]) -> None:
    original = trace.process_primitive

    @functools.wraps(original)
    def process_primitive(self: Any, primitive: Any, tracers: Any, params: Any, /) -> Any:
        if primitive in calls:
            programs = list(jaxprs.in_params(params))
            if any(map(only_operations, programs)) and all(map(_is_harmless, programs)):
                tracers, found = _some_tangent(self, tracers)
                if not found and any(map(_receives, programs)):
                    raise NotImplementedError(
                        f"mpi_cuda.recv with paired=True in a {primitive.name} that takes no array "
                        "with derivatives, so that JAX takes it for a constant: pass one in, and "
                        "give it to recv as its first argument"
                    )
        return original(self, primitive, tracers, params)

    trace.process_primitive = process_primitive


def _receives(program: Any) -> bool:
    """Whether a program has a receive with derivatives."""
    for eqn in jaxprs.bare(program).eqns:
        if eqn.primitive.name == "mpi_cuda_recv" and eqn.params["paired"]:
            return True
        if any(map(_receives, jaxprs.in_params(eqn.params))):
            return True
    return False


def _some_tangent(trace: Any, tracers: Sequence[Any]) -> tuple[Sequence[Any], bool]:
    """The operands, of which at least one has a tangent, if any can."""
    pairs = [trace.to_primal_tangent_pair(x) for x in tracers]
    if any(type(tangent) is not ad.Zero for _, tangent in pairs):
        return tracers, True
    for index, (primal, _) in enumerate(pairs):
        if is_differentiable(jax.typeof(primal)):
            new = list(tracers)
            new[index] = _with_tangent(trace, tracers[index])
            return new, True
    return tracers, False
