"""`vmap` of loops and branches that communicate.

JAX refuses it for every program with an ordered effect. It is only wrong where the predicate is
batched: then both branches run, and a loop runs until the last of the batch is done, so that this
rank would communicate where the program does not. That is refused by name here; the rest works.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from jax._src.interpreters import batching
from jax._src.lax.control_flow import conditionals, loops

from mpi_cuda._jax_patches import jaxprs
from mpi_cuda._jax_patches.effect import effect, only_operations
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="the rules of `cond` and `while_loop` let operations pass where no predicate is "
        "batched",
        used=(
            "interpreters.batching.batch_jaxpr",
            "interpreters.batching.fancy_primitive_batchers",
            "lax.control_flow.conditionals.cond_p",
            "lax.control_flow.loops.while_p",
        ),
        without="`vmap` of loops and branches that communicate is refused",
        test="test_loops_and_branches_whose_predicate_is_not_batched",
    ),
)


def _names(jaxpr: Any) -> Iterator[str]:
    """The operations in a program, in order."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if effect in eqn.effects and "attributes" in eqn.params:
            yield name.removeprefix("mpi_cuda_")
        for program in jaxprs.in_params(eqn.params):
            yield from _names(jaxprs.bare(program))


def _without_effect(closed: Any) -> Any:
    """The program as JAX's rule takes it; what it makes of it has the effect again."""
    return jaxprs.replace(closed, effects={e for e in closed.effects if e != effect})


def _refuse(what: str, *programs: Any) -> None:
    names = dict.fromkeys(name for program in programs for name in _names(program.jaxpr))
    raise NotImplementedError(
        f"mpi_cuda: {', '.join(names)} inside a {what} whose predicate is batched by vmap: "
        f"{'both branches' if what == 'cond' else 'iterations past the end'} would run, and "
        "communicate; take the predicate out of the batch, or communicate outside"
    )


def _cond(original: Callable[..., Any]) -> Callable[..., Any]:
    def rule(axis_data: Any, args: Any, dims: Any, *, branches: Any, **params: Any) -> Any:
        if any(map(only_operations, branches)):
            if dims[0] is not None and "branches_platforms" not in params:
                _refuse("cond", *branches)
            branches = tuple(_without_effect(b) if only_operations(b) else b for b in branches)
        return original(axis_data, args, dims, branches=branches, **params)

    return rule


def _while_loop(original: Callable[..., Any]) -> Callable[..., Any]:
    def rule(
        axis_data: Any,
        args: Any,
        dims: Any,
        cond_nconsts: int,
        cond_jaxpr: Any,
        body_nconsts: int,
        body_jaxpr: Any,
    ) -> Any:
        programs = (cond_jaxpr, body_jaxpr)
        if any(map(only_operations, programs)):
            cond_jaxpr, body_jaxpr = (
                _without_effect(p) if only_operations(p) else p for p in programs
            )
            batched = [dim is not None for dim in dims]
            consts = cond_nconsts + body_nconsts
            carry = batched[consts:]
            # A part of the carry is batched if it comes in batched or an iteration makes it so.
            while True:
                _, out = batching.batch_jaxpr(
                    body_jaxpr, axis_data, batched[cond_nconsts:consts] + carry, instantiate=carry
                )
                if list(out) == carry:
                    break
                carry = list(map(operator.or_, carry, out))
            _, (predicate,) = batching.batch_jaxpr(
                cond_jaxpr, axis_data, batched[:cond_nconsts] + carry, instantiate=False
            )
            if predicate:
                _refuse("while_loop", *programs)
        return original(axis_data, args, dims, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr)

    def with_names(axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
        return rule(axis_data, args, dims, **params)

    return with_names


def install() -> None:
    """Replaces JAX's rules; if they are gone in another JAX, it refuses more."""
    rules: Any = getattr(batching, "fancy_primitive_batchers", {})
    for primitive, wrap in ((conditionals.cond_p, _cond), (loops.while_p, _while_loop)):
        if primitive in rules:
            rules[primitive] = wrap(rules[primitive])
