"""The operations as JAX primitives: one table, one lowering, one batching rule.

A primitive takes the data it sends (if any), then the user's token (if any), and returns the data
it receives (if any), then that token. `result` is the shape and dtype of what it receives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ffi
from jax.interpreters import batching, mlir

from mpi_cuda import _library
from mpi_cuda._arguments import OPS
from mpi_cuda._jax_patches import jax_core, linear, uniform
from mpi_cuda._jax_patches.effect import effect

TOKEN = jax.core.ShapedArray((), np.dtype(np.int32))


@dataclasses.dataclass(frozen=True)
class Result:
    """Shape and dtype of what an operation receives."""

    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """How an operation behaves under `vmap`: where the batch dimension goes.

    Behind that many dimensions, on the operand (`operand`) and on the result (`result`): 0 is in
    front; more where MPI splits or joins the dimension in front. None: nowhere, since it is the
    number of a message, which is one for the whole batch.
    """

    operand: int | None = 0
    result: int | None = 0


RULES = {
    "allgather": Rule(result=1),
    "allreduce": Rule(),
    "alltoall": Rule(operand=1, result=1),
    "barrier": Rule(),
    "bcast": Rule(),
    "exscan": Rule(),
    "gather": Rule(result=1),
    "irecv": Rule(operand=None, result=None),
    "isend": Rule(result=None),
    "recv": Rule(),
    "reduce": Rule(),
    "reduce_scatter": Rule(operand=1),
    "scan": Rule(),
    "scatter": Rule(operand=1),
    "send": Rule(),
    "sendrecv": Rule(),
    "wait": Rule(operand=None),
    "wait_send": Rule(operand=None),
    # Behind the rows, whose counts stay as they are.
    "allgatherv": Rule(operand=1, result=1),
    "alltoallv": Rule(operand=1, result=1),
    "gatherv": Rule(operand=1, result=1),
    "scatterv": Rule(operand=1, result=1),
    "neighbor_allgather": Rule(result=1),
    "neighbor_alltoall": Rule(operand=1, result=1),
}

# The starts of collectives, and what they start. Their result is the number of what was started.
STARTS = {
    f"i{name}": name
    for name in (
        *("allgather", "allreduce", "alltoall", "barrier", "bcast", "exscan", "gather", "reduce"),
        *("reduce_scatter", "scan", "scatter"),
    )
}
for _start, _started in STARTS.items():
    RULES[_start] = Rule(operand=RULES[_started].operand, result=None)
# Their first argument is the number of what was started.
ENDS = ("wait", "wait_send")

# They have derivatives (`_derivatives`).
LINEAR = frozenset(
    (
        *("allgather", "allreduce", "alltoall", "bcast", "exscan", "gather", "reduce"),
        *("reduce_scatter", "scan", "scatter", "sendrecv"),
        *("allgatherv", "alltoallv", "gatherv", "scatterv"),
        *("neighbor_allgather", "neighbor_alltoall"),
    )
)
SUM_NUMBER = OPS["SUM"].number

# Their first argument gives only shape and dtype; it is an operand so that vmap sees it.
TEMPLATES = ("irecv", "recv", "sendrecv", "wait")

primitives: dict[str, Operation] = {}


def _abstract_eval(*avals: Any, result: Result | None, token: bool, **_: Any) -> Any:
    data = [] if result is None else [jax.core.ShapedArray(result.shape, result.dtype)]
    return data + [TOKEN] * token, {effect}


def _refuse_automatic_partitioning(name: str, context: Any) -> None:
    """An operation is one rank's: without meaning where XLA divides arrays among ranks."""
    manual: frozenset[Any] = getattr(context, "manual_axes", frozenset())
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        devices = getattr(context, "num_devices", 1)
    else:
        devices = math.prod(n for axis, n in dict(mesh.shape).items() if axis not in manual)
    if devices > 1:
        raise NotImplementedError(
            f"mpi_cuda.{name} stands in code that JAX partitions automatically over {devices} "
            "devices, where it is not said which part of an array each rank passes: put it into "
            "jax.shard_map over all axes of the mesh, or pass it arrays of this rank's own device"
        )


def _remedy() -> str:
    from mpi_cuda._jax_patches import backends

    if backends.is_one_ours() and _library.load().mpi_cuda_on_gpu():
        return (
            "pass arrays that are on the GPU, and call no operation inside of a host callback, "
            "whose arrays are on the CPU"
        )
    return "start with JAX_PLATFORMS=mpi_cuda"


def _lowering(
    name: str,
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    result: Result | None,
    token: bool,
    template: bool,
    attributes: tuple[tuple[str, int | tuple[int, ...]], ...],
    **_: Any,
) -> Sequence[Any]:
    backend: Any = ctx.module_context.get_backend()
    if not _library.is_ours(backend):
        raise RuntimeError(
            f"mpi_cuda.{name} needs the backend mpi_cuda, and this program is compiled for "
            f"{backend.platform}: {_remedy()}"
        )
    _refuse_automatic_partitioning(name, ctx.module_context.axis_context)
    avals = list(ctx.avals_in)
    values = list(operands)
    if template:
        position = len(values) - 1 - token
        del avals[position], values[position]
    order = ctx.tokens_in.get(effect)
    call_context = ctx.replace(
        avals_in=[*avals, jax_core.abstract_token],
        avals_out=[*ctx.avals_out, jax_core.abstract_token],
    )
    # One number, or an array of them.
    numbers: dict[str, Any] = {key: np.asarray(value, np.int64)[()] for key, value in attributes}
    numbers |= uniform.take_pending()
    if numbers.get("status"):
        # The name alone says that the launch is waited for, since its caller reads the status then.
        numbers["mpi_cuda_reads_status"] = np.int64(1)
    call = ffi.build_ffi_lowering_function(f"mpi_cuda_{name}", has_side_effect=True)(
        call_context, *values, order, **numbers
    )
    *results, order = call.results
    tokens = mlir.TokenSet({effect: order})
    ctx.set_tokens_out(ctx.tokens_in.update_tokens(tokens))
    return results


def _batch(
    name: str,
    args: Sequence[Any],
    dims: Sequence[Any],
    *,
    result: Result | None,
    token: bool,
    template: bool,
    batch_as: str,
    primitive: linear.Linear,
    **params: Any,
) -> Any:
    args, dims = list(args), list(dims)
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    if token and dims[-1] is not None:
        # A token carries no data: any of the batch will do.
        args[-1] = jax.lax.index_in_dim(args[-1], 0, dims[-1], keepdims=False)
        dims[-1] = None
    rule = RULES[batch_as]
    rest = {"token": token, "template": template, "batch_as": batch_as, **params}
    data = len(args) - token
    if all(d is None for d in dims[:data]):
        outs = primitive.bind(*args, result=result, **rest)
        return outs, [None] * len(outs)
    ends = name in ENDS
    for i in range(data):
        is_template = template and i == data - 1
        if (rule.operand is None or ends) and not is_template:
            if dims[i] is not None:
                raise ValueError(
                    f"mpi_cuda.{name}: the request was batched by vmap; start and wait in one "
                    "vmap, or both outside; jax.lax.map waits for what a scan has stacked"
                )
            continue
        args[i] = batching.bdim_at_front(args[i], dims[i], size)
        # The template of a collective's end is like its result (`StandIn`), if it has a tangent.
        behind = (rule.result if ends else 0) if is_template else rule.operand
        if behind and not (is_template and args[i].ndim <= behind):
            args[i] = jnp.moveaxis(args[i], 0, behind)
    if result is not None and rule.result is not None:
        shape = list(result.shape)
        shape.insert(rule.result, size)
        result = Result(tuple(shape), result.dtype)
    outs = primitive.bind(*args, result=result, **rest)
    out_dims: list[int | None] = [] if result is None else [rule.result]
    return outs, out_dims + [None] * token


class Operation(linear.Linear):
    """One of the operations."""

    def is_linear(self, params: dict[str, Any]) -> bool:
        """Reductions only with SUM; a message alone only if its peer is said to do the same; none
        from ANY_SOURCE."""
        name, attributes = self.name.removeprefix("mpi_cuda_"), dict(params["attributes"])
        if name == "wait" and "started" in params:
            name, attributes = params["started"][0], dict(params["started"][1])
        name = STARTS.get(name, name)
        if name in ("recv", "send"):
            return bool(params["paired"])
        if name not in LINEAR or attributes.get("source") == _library.ATTRIBUTE_ANY:
            return False
        return attributes.get("op", SUM_NUMBER) == SUM_NUMBER


def _define(name: str) -> Operation:
    primitive = Operation(f"mpi_cuda_{name}")
    primitive.multiple_results = True
    primitive.def_effectful_abstract_eval(_abstract_eval)
    primitive.def_impl(lambda *args, **params: jax_core.apply_primitive(primitive, *args, **params))
    mlir.register_lowering(
        primitive, lambda ctx, *args, **params: _lowering(name, ctx, *args, **params)
    )
    batching.primitive_batchers[primitive] = lambda args, dims, **params: _batch(
        name, args, dims, primitive=primitive, **params
    )
    return primitive


for _name in RULES:
    primitives[_name] = _define(_name)


class StandIn(linear.Linear):
    """Zeros with shape and dtype of the result of a collective that was started. Its request takes
    them along to `wait`. Their tangent is that of the result (`_derivatives`), so that it is made
    where the collective is started: all ranks start in one order, and wait in any."""


def _zeros(*_: Any, result: Result, **__: Any) -> Any:
    return [jnp.zeros(result.shape, result.dtype)]


def _define_stand_in(name: str) -> StandIn:
    primitive = StandIn(f"mpi_cuda_{name}_stand_in")
    primitive.multiple_results = True
    primitive.def_impl(_zeros)
    primitive.def_abstract_eval(
        lambda *_, result, **__: [jax.core.ShapedArray(result.shape, result.dtype)]
    )
    mlir.register_lowering(primitive, mlir.lower_fun(_zeros, True))
    batching.primitive_batchers[primitive] = lambda args, dims, **params: _batch(
        name, args, dims, primitive=primitive, **params
    )
    return primitive


stand_ins = {name: _define_stand_in(name) for name in STARTS.values() if name in LINEAR}
