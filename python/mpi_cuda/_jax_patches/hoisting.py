"""Operations stay in their loops while derivatives are taken.

To differentiate a `scan`, JAX moves out of it what is the same in every iteration, and forgets what
no result depends on: a `recv` or `barrier`, whose operands are constant, would run once instead of
every time, and a `send` not at all. Loops with operations are left as they are here. Of a program
under `jax.checkpoint` it forgets all if no result depends on a tangent; here the tangents stay.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from threading import local
from typing import Any

from jax._src import ad_checkpoint as remat
from jax._src.interpreters import partial_eval as pe
from jax._src.lax.control_flow import conditionals, loops

from mpi_cuda import _library
from mpi_cuda._jax_patches import jaxprs
from mpi_cuda._jax_patches.effect import effect
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="operations stay in a `scan`, and in `jax.checkpoint`, that is differentiated",
        used=(
            "ad_checkpoint.remat_p",
            "interpreters.partial_eval.EffectHandle",
            "interpreters.partial_eval.custom_partial_eval_rules",
            "interpreters.partial_eval.move_binders_to_front",
            "interpreters.partial_eval.partial_eval_jaxpr_custom_rules",
            "interpreters.partial_eval.partial_eval_jaxpr_nounits",
            "lax.control_flow.conditionals.cond_p",
            "lax.control_flow.loops._scan_known_hoisting",
            "lax.control_flow.loops.scan_p",
        ),
        without="a warning; operations may be moved out of a `scan` or forgotten by "
        "`jax.checkpoint` that is differentiated",
        test="test_loops_that_are_differentiated_keep_their_messages",
    ),
)

_state = local()


def _keep_known(original: Any) -> Any:
    """For the part of a loop that does not depend on tangents."""

    @functools.wraps(original)
    def hoisting(jaxpr: Any, consts: Sequence[Any], num_residuals: int, *others: Any) -> Any:
        if effect in jaxpr.effects:
            return jaxpr, consts, [False] * num_residuals, []
        return original(jaxpr, consts, num_residuals, *others)

    return hoisting


def _keep_rematerialized(original: Any) -> Any:
    """For a loop inside `jax.checkpoint`."""

    @functools.wraps(original)
    def rule(saveable: Any, unknown: Any, instantiated: Any, eqn: Any) -> Any:
        outer = getattr(_state, "inside", False)
        _state.inside = effect in eqn.effects
        try:
            return original(saveable, unknown, instantiated, eqn)
        finally:
            _state.inside = outer

    return rule


def _split_nothing(original: Any) -> Any:
    """The rule above splits a loop's body by what depends on the iteration; here all of it does."""

    @functools.wraps(original)
    def split(jaxpr: Any, unknowns: Sequence[bool], instantiate: Any) -> Any:
        if not getattr(_state, "inside", False) or effect not in jaxpr.effects:
            return original(jaxpr, unknowns, instantiate)
        known = [not is_unknown for is_unknown in unknowns]
        avals = [aval for aval, is_known in zip(jaxpr.in_avals, known, strict=True) if is_known]
        consts = [jaxprs.Var(aval) for aval in avals]
        names = jaxpr.jaxpr.debug_info.with_unknown_names()
        passed_on = jaxprs.program(consts, consts, [], set(), names)
        loop = pe.move_binders_to_front(jaxpr, known)
        return passed_on, loop, [True] * len(jaxpr.out_avals), avals

    return split


def _keep_program(original: Any) -> Any:
    """For a program inside `jax.checkpoint` no result of which depends on the tangents: JAX forgets
    it, with the messages in it."""

    @functools.wraps(original)
    def rule(trace: Any, *tracers: Any, jaxpr: Any, **params: Any) -> Any:
        unknown = [not tracer.is_known() for tracer in tracers]
        if effect not in jaxpr.effects or not any(unknown):
            return original(trace, *tracers, jaxpr=jaxpr, **params)
        # With one more result that does, which leads to what computes all.
        tangent = jaxpr.invars[unknown.index(True)]
        jaxpr = jaxpr.replace(
            outvars=[*jaxpr.outvars, tangent], debug_info=jaxpr.debug_info.with_unknown_names()
        )
        *results, extra = original(trace, *tracers, jaxpr=jaxpr, **params)
        trace.effect_handles.append(pe.EffectHandle([extra], extra.recipe))
        return results

    return rule


def _keep_branches(original: Any) -> Any:
    """The same for a `cond`."""

    @functools.wraps(original)
    def rule(trace: Any, index: Any, *tracers: Any, branches: Any, **params: Any) -> Any:
        unknown = [not tracer.is_known() for tracer in tracers]
        communicates = any(effect in branch.effects for branch in branches)
        if not communicates or not any(unknown) or not index.is_known():
            return original(trace, index, *tracers, branches=branches, **params)
        branches = tuple(_with_result(branch, unknown.index(True)) for branch in branches)
        *results, extra = original(trace, index, *tracers, branches=branches, **params)
        trace.effect_handles.append(pe.EffectHandle([extra], extra.recipe))
        return results

    return rule


def _keep_rematerialized_branches(original: Any) -> Any:
    """And inside `jax.checkpoint`."""

    @functools.wraps(original)
    def rule(saveable: Any, unknown: Any, instantiated: Any, eqn: Any) -> Any:
        if effect not in eqn.effects or unknown[0] or not any(unknown):
            return original(saveable, unknown, instantiated, eqn)
        place = list(unknown).index(True)
        branches = tuple(_with_result(branch, place - 1) for branch in eqn.params["branches"])
        extra = jaxprs.Var(eqn.invars[place].aval)
        eqn = eqn.replace(
            outvars=[*eqn.outvars, extra], params={**eqn.params, "branches": branches}
        )
        known, staged, out_unknown, out_instantiated, residuals = original(
            saveable, unknown, instantiated, eqn
        )
        return known, staged, out_unknown[:-1], out_instantiated[:-1], residuals

    return rule


def _with_result(closed: Any, place: int) -> Any:
    """A program that returns one of its arguments, too."""
    jaxpr = closed.jaxpr
    return jaxprs.replace(
        closed,
        outvars=[*jaxpr.outvars, jaxpr.invars[place]],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )


def install() -> None:
    """Replaces what JAX does; another JAX that does it elsewhere is warned of."""
    rules: Any = pe.partial_eval_jaxpr_custom_rules
    module: Any = loops
    unknown_programs: Any = pe.custom_partial_eval_rules
    found = hasattr(module, "_scan_known_hoisting") and hasattr(pe, "EffectHandle")
    if not found or loops.scan_p not in rules or remat.remat_p not in unknown_programs:
        _library.warn(
            "with this version of JAX, operations in a scan may be moved "
            "out of it, and in jax.checkpoint be forgotten, when they are differentiated",
        )
        return
    module._scan_known_hoisting = _keep_known(module._scan_known_hoisting)
    rules[loops.scan_p] = _keep_rematerialized(rules[loops.scan_p])
    unknown_programs[remat.remat_p] = _keep_program(unknown_programs[remat.remat_p])
    if conditionals.cond_p in unknown_programs:
        unknown_programs[conditionals.cond_p] = _keep_branches(
            unknown_programs[conditionals.cond_p]
        )
    if conditionals.cond_p in rules:
        rules[conditionals.cond_p] = _keep_rematerialized_branches(rules[conditionals.cond_p])
    name = "partial_eval_jaxpr_nounits"
    setattr(pe, name, _split_nothing(getattr(pe, name)))
