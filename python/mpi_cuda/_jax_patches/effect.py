"""The effect of operations, which keeps them in trace order.

It is the effect of `io_callback(ordered=True)`: JAX threads one token through operations and
ordered callbacks alike, into `jit`, loops and branches, and never deletes an operation.
"""

from __future__ import annotations

from typing import Any

from jax._src import callback, effects

from mpi_cuda._jax_patches import jaxprs
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="operations have the effect of ordered callbacks",
        used=(
            "callback.OrderedIOEffect",
            "callback._OrderedIOEffect",
            "callback.io_callback_p",
            "callback.pure_callback_p",
            "effects.custom_derivatives_allowed_effects",
            "effects.partial_eval_kept_effects",
            "effects.remat_allowed_effects",
        ),
        without="an error at import",
        test="test_both_styles_and_callbacks_share_one_order",
    ),
)


class CommunicationEffect(callback.OrderedIOEffect):
    """Equal to the effect of ordered callbacks, so that one token orders both."""

    # Python asks the left operand first unless the right one is of a subclass, so that ours is
    # always asked; only the hash has to agree.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, callback.OrderedIOEffect)

    def __hash__(self) -> int:
        return hash(callback._OrderedIOEffect)


effects.remat_allowed_effects.add_type(CommunicationEffect)
effects.custom_derivatives_allowed_effects.add_type(CommunicationEffect)
# So that the tangent of a send, which has no result, is kept.
effects.partial_eval_kept_effects.add_type(CommunicationEffect)

effect = CommunicationEffect()


def is_ordered_callback(eqn: Any) -> bool:
    """Whether an equation is a callback with the effect of operations."""
    return eqn.primitive is callback.io_callback_p


def has_host_callback(program: Any) -> bool:
    """Whether a program has callbacks; those keep JAX's own tokens between programs."""
    for eqn in jaxprs.bare(program).eqns:
        if eqn.primitive in (callback.io_callback_p, callback.pure_callback_p):
            return True
        if "callback" in eqn.primitive.name:
            return True
        if any(map(has_host_callback, jaxprs.in_params(eqn.params))):
            return True
    return False


def only_operations(program: Any) -> bool:
    """Whether a program has the effect, and no ordered callbacks, which have the same one."""
    return effect in program.effects and not has_host_callback(program)
