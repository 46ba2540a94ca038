"""JAX's programs (jaxprs): what is in them, and how one is made.

Up to JAX 0.10 a program with its constants is a class of its own, `ClosedJaxpr`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax._src import core

from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="programs are read and made",
        used=("core.Jaxpr", "core.Var", "core.jaxprs_in_params", "core.new_jaxpr_eqn"),
        without="an error at import",
        test="test_a_function_called_twice_and_nested_jit",
    ),
)


Var = core.Var
new_equation = core.new_jaxpr_eqn
# The programs among the parameters of an equation.
in_params = core.jaxprs_in_params


def bare(program: Any) -> Any:
    """The program without its constants."""
    return getattr(program, "jaxpr", program)


def program(
    invars: Sequence[Any],
    outvars: Sequence[Any],
    eqns: Sequence[Any],
    effects: set[Any],
    debug_info: Any,
) -> Any:
    """A program without constants."""
    jaxpr = core.Jaxpr([], invars, outvars, eqns, effects, debug_info=debug_info, is_high=False)
    close: Any = getattr(core, "ClosedJaxpr", lambda jaxpr, _: jaxpr)
    return close(jaxpr, ())


def replace(program: Any, **changes: Any) -> Any:
    """The program with other variables, equations or effects."""
    jaxpr = bare(program)
    changed = jaxpr.replace(**changes)
    return changed if jaxpr is program else program.replace(jaxpr=changed)
