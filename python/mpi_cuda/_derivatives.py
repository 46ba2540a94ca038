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
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from mpi_cuda import _neighbors, _operations, _vector
from mpi_cuda._arguments import OPS, Comm, known_comm, known_topology
from mpi_cuda._jax_patches import linear
from mpi_cuda._jax_patches.effect import effect
from mpi_cuda._library import ATTRIBUTE_ANY
from mpi_cuda._primitives import STARTS, Result, primitives, stand_ins

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
    if not linear.is_differentiable(jax.typeof(primals[0])):
        return outs, zeros
    out_tangents = _of_tangent(name, primals[0], tangents[0], params)
    return outs, out_tangents + zeros[len(out_tangents) :]


def _of_tangent(name: str, primal: Any, tangent: Any, params: dict[str, Any]) -> Any:
    # In place of a template, something that ties what the transpose makes of it to the operand.
    params = {**params, "token": False, "template": True, "derived": True}
    operands = [ad.instantiate_zeros(tangent)]
    if name != "recv":
        operands.append(linear.nothing(primal))
    return primitives[name].bind(*operands, **params)


def _transpose(
    name: str, adjoint: Adjoint, cotangents: Any, x: Any, *rest: Any, **params: Any
) -> Any:
    attributes = dict(params["attributes"])
    _require_sum(name, attributes)
    ct = _tied(cotangents[0], rest, params)
    with linear.derived():
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
    return total if comm.rank == root else linear.nothing(total, ct.shape, ct.dtype)


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
    return back if comm.rank == root else linear.nothing(back, x.shape, x.dtype)


def _allgatherv(ct: Any, x: Any, comm: Comm, attributes: dict[str, Any]) -> Any:
    counts, size = attributes["counts"], comm.size
    own = (counts[comm.rank],) * size
    parts = _vector.alltoallv(ct, counts, own, comm=comm, token=False)[0]
    return parts.reshape((size, own[0], *ct.shape[1:])).sum(axis=0, dtype=x.dtype)


def _alltoallv(ct: Any, x: Any, comm: Comm, attributes: dict[str, Any]) -> Any:
    back = attributes["recv_counts"], attributes["send_counts"]
    return _vector.alltoallv(ct, *back, comm=comm, token=False)[0]


def _gatherv(ct: Any, x: Any, comm: Comm, attributes: dict[str, Any]) -> Any:
    counts, root = attributes["counts"], attributes["root"]
    back = _vector.scatterv(ct, counts, root, comm=comm, token=False)[0]
    return back if comm.rank == root else back + ct


def _neighbor_alltoall(ct: Any, x: Any, comm: Comm, _: Any) -> Any:
    topology = known_topology(comm.number)
    assert topology is not None
    if topology.is_cartesian:
        # What came from the rank before goes back to it.
        return _neighbors.neighbor_alltoall(ct, comm=comm, token=False)[0]
    # Along the edges of a graph the other way.
    sent, received = np.array(topology.sources, int), np.array(topology.destinations, int)
    counts = [np.bincount(ranks, minlength=comm.size).tolist() for ranks in (sent, received)]
    by_rank = ct[np.argsort(sent, kind="stable")]
    back = _vector.alltoallv(by_rank, *counts, comm=comm, token=False)[0]
    return back[np.argsort(np.argsort(received, kind="stable"))]


def _neighbor_allgather(ct: Any, x: Any, comm: Comm, attributes: dict[str, Any]) -> Any:
    return _neighbor_alltoall(ct, x, comm, attributes).sum(axis=0, dtype=x.dtype)


def _scatterv(ct: Any, x: Any, comm: Comm, attributes: dict[str, Any]) -> Any:
    counts, root = attributes["counts"], attributes["root"]
    back = _vector.gatherv(ct, counts, root, comm=comm, token=False)[0]
    return back if comm.rank == root else linear.nothing(back, x.shape, x.dtype)


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
    "allgatherv": _allgatherv,
    "alltoall": _alltoall,
    "alltoallv": _alltoallv,
    "bcast": _bcast,
    "exscan": _exscan,
    "gather": _gather,
    "gatherv": _gatherv,
    "neighbor_allgather": _neighbor_allgather,
    "neighbor_alltoall": _neighbor_alltoall,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "scan": _scan,
    "scatter": _scatter,
    "scatterv": _scatterv,
    "sendrecv": _sendrecv,
}


def _tied(ct: Any, rest: Any, params: dict[str, Any]) -> Any:
    """A cotangent, never zero by itself, that depends on the operand (`_jvp`)."""
    ct = ad.instantiate_zeros(ct)
    if params["template"] and isinstance(rest[0], jax.core.Tracer):
        ct = ct + linear.nothing(rest[0], ct.shape, ct.dtype)
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

_identity_p = linear.Linear("mpi_cuda_allreduce_transpose")
_identity_p.def_effectful_abstract_eval(lambda x, **_: (x, {effect}))
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


# What one rank sends another receives: neither knows the map alone, unless it is told.


def _refuse(name: str) -> None:
    paired = name in ("recv", "send")
    remedy = ", pass paired=True to send and recv on both sides" if paired else ""
    raise NotImplementedError(
        f"mpi_cuda.{name} cannot be differentiated, since this rank does not see what its peer "
        "does with the message: use mpi_cuda.sendrecv on both sides (with PROC_NULL where "
        f"nothing comes or goes){remedy}, or stop_gradient on what is passed"
    )


def _message_jvp(name: str, primals: Any, tangents: Any, **params: Any) -> Any:
    return _jvp(name, primals, tangents, **params) if params["paired"] else _refuse(name)


def _send_transpose(_: Any, x: Any, *rest: Any, **params: Any) -> Any:
    if not params["paired"]:
        _refuse("send")
    attributes, aval = dict(params["attributes"]), x.aval
    comm, template = known_comm(attributes["comm"]), jnp.zeros(aval.shape, aval.dtype)
    if params["template"] and isinstance(rest[0], jax.core.Tracer):
        template = linear.nothing(rest[0], aval.shape, aval.dtype)
    back = {"source": attributes["dest"], "recvtag": attributes["tag"], "status": 0}
    with linear.derived():
        ct = _operations.bind(
            *("recv", comm, None, (aval.shape, aval.dtype), False),
            **{"template": template, "paired": True, **back},
        )[0]
    return [ct] + [None] * len(rest)


def _recv_transpose(cotangents: Any, x: Any, *rest: Any, **params: Any) -> Any:
    if not params["paired"]:
        _refuse("recv")
    attributes = dict(params["attributes"])
    back = {"dest": attributes["source"], "tag": attributes["recvtag"]}
    with linear.derived():
        _operations.bind(
            *("send", known_comm(attributes["comm"]), ad.instantiate_zeros(cotangents[0])),
            *(None, False),
            **{"paired": True, **back},
        )
    return [ad.Zero(x.aval)] + [None] * len(rest)


def _define_message(name: str, transpose: Callable[..., Any]) -> None:
    ad.primitive_jvps[primitives[name]] = lambda primals, tangents, **params: _message_jvp(
        name, primals, tangents, **params
    )
    ad.primitive_transposes[primitives[name]] = transpose


_define_message("send", _send_transpose)
_define_message("recv", _recv_transpose)


def _never(name: str) -> Callable[..., None]:
    return lambda *_, **__: _refuse(name)


for _name in ("isend", "irecv", "wait", "wait_send"):
    ad.primitive_jvps[primitives[_name]] = _never(_name)
    ad.primitive_transposes[primitives[_name]] = _never(_name)


# The tangent of a collective that was started is made where it is started, by the blocking one: the
# ranks start in one order, but each may wait in another. What stands in for the result brings it to
# `wait`.


def _start_jvp(name: str, primals: Any, tangents: Any, **params: Any) -> Any:
    _require_sum(name, dict(params["attributes"]))
    outs = primitives[name].bind(*primals, **{**params, "derived": False})
    return outs, [ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outs]


def _start_transpose(_: Any, *args: Any, **__: Any) -> Any:
    # The cotangent comes through what stands in for the result.
    return [ad.Zero(arg.aval) if ad.is_undefined_primal(arg) else None for arg in args]


def _stand_in_jvp(name: str, primals: Any, tangents: Any, **params: Any) -> Any:
    outs = stand_ins[name].bind(*primals, **{**params, "derived": False})
    return outs, _of_tangent(name, primals[0], tangents[0], params)


def _stand_in_transpose(name: str, cotangents: Any, x: Any, **params: Any) -> Any:
    return ad.primitive_transposes[primitives[name]](cotangents, x, **params)


def _wait_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    if "started" not in params:
        _refuse("wait")
    name, attributes = params["started"]
    _require_sum(f"i{name}", dict(attributes))
    outs = primitives["wait"].bind(*primals, **{**params, "derived": False})
    out_tangents: list[Any] = [ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outs]
    if params["template"] and linear.is_differentiable(jax.typeof(outs[0])):
        out_tangents[0] = tangents[1]
    return outs, out_tangents


def _wait_transpose(cotangents: Any, number: Any, *rest: Any, **params: Any) -> Any:
    if "started" not in params:
        _refuse("wait")
    back = [cotangents[0]] * params["template"]
    return [None, *back] + [None] * (len(rest) - len(back))


def _define_start(start: str, name: str) -> None:
    ad.primitive_jvps[primitives[start]] = lambda primals, tangents, **params: _start_jvp(
        start, primals, tangents, **params
    )
    ad.primitive_transposes[primitives[start]] = _start_transpose
    if name in stand_ins:
        ad.primitive_jvps[stand_ins[name]] = lambda primals, tangents, **params: _stand_in_jvp(
            name, primals, tangents, **params
        )
        ad.primitive_transposes[stand_ins[name]] = lambda cts, x, **params: _stand_in_transpose(
            name, cts, x, **params
        )


for _start, _name in STARTS.items():
    _define_start(_start, _name)
ad.primitive_jvps[primitives["wait"]] = _wait_jvp
ad.primitive_transposes[primitives["wait"]] = _wait_transpose
