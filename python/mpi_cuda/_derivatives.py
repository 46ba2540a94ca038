"""Derivatives of the operations (docs/derivatives.md).

An operation is a linear map from the arrays of all ranks to the arrays of all ranks (reductions
only with SUM). Its tangent is the operation itself, on tangents; its transpose is the adjoint map,
for the scalar product that sums over ranks: Σ ⟨A x, y⟩ = Σ ⟨x, Aᵀ y⟩. One exception, as in mpi4jax:
the transpose of allreduce SUM is the identity, which is right where every rank holds the same loss.

Tangents and cotangents that are zero are sent all the same, since other ranks wait for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax._src import core
from jax.interpreters import ad, batching, mlir

from mpi_cuda import _linear, _operations, _order
from mpi_cuda._arguments import ATTRIBUTE_ANY, OPS, Comm, known_comm
from mpi_cuda._primitives import Result, primitives

SUM = OPS["SUM"]
Adjoint = Callable[[jax.Array, Any, Comm, dict[str, int]], jax.Array]


def _require_sum(name: str, attributes: dict[str, int]) -> None:
    if attributes.get("op", SUM.number) != SUM.number:
        names = {op.number: op.name for op in OPS.values()}
        reduction = names.get(attributes["op"], "a user-defined reduction")
        raise NotImplementedError(
            f"mpi_cuda.{name} can be differentiated only with SUM; {reduction} is not linear"
        )


def _jvp(name: str, primals: Any, tangents: Any, **params: Any) -> Any:
    _require_sum(name, dict(params["attributes"]))
    # Of an outer derivative, an operation that an inner one made is one like any other.
    outs = primitives[name].bind(*primals, **{**params, "derived": False})
    zeros = [ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outs]
    if not _linear.is_differentiable(jax.typeof(primals[0])):
        return outs, zeros
    # In place of a template, something that ties what the transpose makes of it to the operand.
    tangent_params = {**params, "token": False, "template": True, "derived": True}
    tie = _linear.nothing(primals[0])
    tangent = ad.instantiate_zeros(tangents[0])
    return outs, primitives[name].bind(tangent, tie, **tangent_params) + zeros[1:]


def _transpose(
    name: str, adjoint: Adjoint, cotangents: Any, x: Any, *rest: Any, **params: Any
) -> Any:
    attributes = dict(params["attributes"])
    _require_sum(name, attributes)
    ct = _tied(cotangents[0], rest, params)
    with _linear.derived():
        back = adjoint(ct, x.aval, known_comm(attributes["comm"]), attributes)
    return [back] + [None] * len(rest)


def _allgather(ct: Any, x: Any, comm: Comm, _: Any) -> Any:
    return _operations.reduce_scatter(ct, SUM, comm=comm, token=False)[0]


def _reduce_scatter(ct: Any, x: Any, comm: Comm, _: Any) -> Any:
    return _operations.allgather(ct, comm=comm, token=False)[0]


def _alltoall(ct: Any, x: Any, comm: Comm, _: Any) -> Any:
    return _operations.alltoall(ct, comm=comm, token=False)[0]


def _bcast(ct: Any, x: Any, comm: Comm, attributes: dict[str, int]) -> Any:
    root = attributes["root"]
    total = _operations.reduce(ct, SUM, root, comm=comm, token=False)[0]
    return total if comm.rank == root else _linear.nothing(total, ct.shape, ct.dtype)


def _reduce(ct: Any, x: Any, comm: Comm, attributes: dict[str, int]) -> Any:
    root = attributes["root"]
    back = _operations.bcast(ct, root, comm=comm, token=False)[0]
    # Elsewhere the result is the operand itself.
    return back if comm.rank == root else back + ct


def _gather(ct: Any, x: Any, comm: Comm, attributes: dict[str, int]) -> Any:
    root = attributes["root"]
    back = _operations.scatter(ct, root, comm=comm, token=False)[0]
    return back if comm.rank == root else back + ct


def _scatter(ct: Any, x: Any, comm: Comm, attributes: dict[str, int]) -> Any:
    root = attributes["root"]
    back = _operations.gather(ct, root, comm=comm, token=False)[0]
    return back if comm.rank == root else _linear.nothing(back, x.shape, x.dtype)


def _scan(ct: Any, x: Any, comm: Comm, _: Any) -> Any:
    everything = _operations.allgather(ct, comm=comm, token=False)[0]
    return everything[comm.rank :].sum(axis=0, dtype=x.dtype)


def _exscan(ct: Any, x: Any, comm: Comm, _: Any) -> Any:
    everything = _operations.allgather(ct, comm=comm, token=False)[0]
    return everything[comm.rank + 1 :].sum(axis=0, dtype=x.dtype)


def _sendrecv(ct: Any, x: Any, comm: Comm, attributes: dict[str, int]) -> Any:
    if attributes["source"] == ATTRIBUTE_ANY:
        raise NotImplementedError(
            "mpi_cuda.sendrecv from ANY_SOURCE has no transpose: name the source to differentiate"
        )
    any_tag = attributes["recvtag"] == ATTRIBUTE_ANY
    swapped: dict[str, Any] = {
        "source": attributes["dest"],
        "dest": attributes["source"],
        "tag": attributes["tag"] if any_tag else attributes["recvtag"],
        "recvtag": ATTRIBUTE_ANY if any_tag else attributes["tag"],
        "status": 0,
    }
    return _operations.bind("sendrecv", comm, ct, (x.shape, x.dtype), False, **swapped)[0]


ADJOINTS: dict[str, Adjoint] = {
    "allgather": _allgather,
    "alltoall": _alltoall,
    "bcast": _bcast,
    "exscan": _exscan,
    "gather": _gather,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "scan": _scan,
    "scatter": _scatter,
    "sendrecv": _sendrecv,
}


_linear.install(_order.only_operations)


def _tied(ct: Any, rest: Any, params: dict[str, Any]) -> Any:
    """A cotangent, never zero by itself, that depends on the operand (`_jvp`)."""
    ct = ad.instantiate_zeros(ct)
    if params["template"] and isinstance(rest[0], core.Tracer):
        ct = ct + _linear.nothing(rest[0], ct.shape, ct.dtype)
    return ct


def _define(name: str, adjoint: Adjoint) -> None:
    ad.primitive_jvps[primitives[name]] = lambda primals, tangents, **params: _jvp(
        name, primals, tangents, **params
    )
    ad.primitive_transposes[primitives[name]] = lambda cts, *args, **params: _transpose(
        name, adjoint, cts, *args, **params
    )


for _name, _adjoint in ADJOINTS.items():
    _define(_name, _adjoint)


# The transpose of allreduce SUM is the identity, whose transpose is the sum again.

_identity_p = _linear.Linear("mpi_cuda_allreduce_transpose")
_identity_p.def_effectful_abstract_eval(lambda x, **_: (x, {_order.effect}))
_identity_p.def_impl(lambda x, **_: x)


def _identity_lowering(ctx: Any, x: Any, **_: Any) -> Any:
    # The effect only keeps it: its own transpose communicates.
    ctx.set_tokens_out(ctx.tokens_in)
    return [x]


mlir.register_lowering(_identity_p, _identity_lowering)
batching.primitive_batchers[_identity_p] = lambda args, dims, **params: (
    _identity_p.bind(args[0], **params),
    dims[0],
)


def _identity_transpose(ct: Any, _: Any, **params: Any) -> Any:
    ct = ad.instantiate_zeros(ct)
    # Under vmap the shape is not that of the original operation.
    result = Result(jax.typeof(ct).shape, jax.typeof(ct).dtype)
    params |= {"result": result, "token": False, "template": False, "derived": True}
    return [primitives["allreduce"].bind(ct, **params)[0]]


def _allreduce_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    return _jvp("allreduce", primals, tangents, **params)


def _allreduce_transpose(cotangents: Any, x: Any, *rest: Any, **params: Any) -> Any:
    ct = _tied(cotangents[0], rest, params)
    # It does not communicate, so that it need not be batched on every rank.
    return [_identity_p.bind(ct, **{**params, "derived": False})] + [None] * len(rest)


ad.deflinear2(_identity_p, _identity_transpose)
ad.primitive_jvps[primitives["allreduce"]] = _allreduce_jvp
ad.primitive_transposes[primitives["allreduce"]] = _allreduce_transpose


# What one rank sends another receives: neither rank alone knows the map.


def _refuse(name: str) -> Callable[..., Any]:
    def rule(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"mpi_cuda.{name} cannot be differentiated, since this rank does not see what its peer "
            "does with the message: use mpi_cuda.sendrecv on both sides (with PROC_NULL where "
            "nothing comes or goes), or stop_gradient on what is passed"
        )

    return rule


for _name in ("send", "recv", "isend", "irecv", "wait", "wait_send"):
    ad.primitive_jvps[primitives[_name]] = _refuse(_name)
    ad.primitive_transposes[primitives[_name]] = _refuse(_name)
