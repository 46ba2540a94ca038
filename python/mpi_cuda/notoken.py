"""The operations without tokens: the same arguments without `token`, ordered automatically.

They run in the order in which the program calls them, together with the operations with tokens
and with ordered callbacks. `send` and `barrier` return nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from mpi_cuda import (
    _halo,
    _library,
    _neighbors,
    _nonblocking,
    _nonblocking_collectives,
    _operations,
    _vector,
)

__all__ = [
    "allgather",
    "allgatherv",
    "allreduce",
    "alltoall",
    "alltoallv",
    "barrier",
    "bcast",
    "exscan",
    "gather",
    "gatherv",
    "halo_exchange",
    "iallgather",
    "iallreduce",
    "ialltoall",
    "ibarrier",
    "ibcast",
    "iexscan",
    "igather",
    "irecv",
    "ireduce",
    "ireduce_scatter",
    "iscan",
    "iscatter",
    "isend",
    "neighbor_allgather",
    "neighbor_alltoall",
    "recv",
    "reduce",
    "reduce_scatter",
    "scan",
    "scatter",
    "scatterv",
    "send",
    "sendrecv",
    "sendrecv_replace",
    "wait",
]


def _without_token(operation: Callable[..., Any]) -> Callable[..., Any]:
    is_collective = hasattr(operation, "__wrapped__")
    # The refusals of collectives are told here: without one more call.
    bare, name = inspect.unwrap(operation), operation.__name__

    @functools.wraps(operation)
    def function(*args: Any, **kwargs: Any) -> Any:
        launches = _library.launches.value
        try:
            if "token" in kwargs:
                raise RuntimeError(
                    f"mpi_cuda.notoken.{name} takes no token: operations are ordered "
                    f"automatically; use mpi_cuda.{name} for explicit tokens"
                )
            result = bare(*args, token=False, **kwargs)
        except BaseException as error:
            if is_collective:
                _operations.tell_refused(name, kwargs.get("comm"), error, launches)
            raise
        return result[0] if isinstance(result, tuple) else None

    signature = inspect.signature(operation)
    parameters = [p for p in signature.parameters.values() if p.name != "token"]
    function.__signature__ = signature.replace(parameters=parameters)
    return function


allgather = _without_token(_operations.allgather)
allgatherv = _without_token(_vector.allgatherv)
allreduce = _without_token(_operations.allreduce)
alltoall = _without_token(_operations.alltoall)
alltoallv = _without_token(_vector.alltoallv)
barrier = _without_token(_operations.barrier)
bcast = _without_token(_operations.bcast)
exscan = _without_token(_operations.exscan)
gather = _without_token(_operations.gather)
gatherv = _without_token(_vector.gatherv)
halo_exchange = _without_token(_halo.halo_exchange)
iallgather = _without_token(_nonblocking_collectives.iallgather)
iallreduce = _without_token(_nonblocking_collectives.iallreduce)
ialltoall = _without_token(_nonblocking_collectives.ialltoall)
ibarrier = _without_token(_nonblocking_collectives.ibarrier)
ibcast = _without_token(_nonblocking_collectives.ibcast)
iexscan = _without_token(_nonblocking_collectives.iexscan)
igather = _without_token(_nonblocking_collectives.igather)
irecv = _without_token(_nonblocking.irecv)
ireduce = _without_token(_nonblocking_collectives.ireduce)
ireduce_scatter = _without_token(_nonblocking_collectives.ireduce_scatter)
iscan = _without_token(_nonblocking_collectives.iscan)
iscatter = _without_token(_nonblocking_collectives.iscatter)
isend = _without_token(_nonblocking.isend)
neighbor_allgather = _without_token(_neighbors.neighbor_allgather)
neighbor_alltoall = _without_token(_neighbors.neighbor_alltoall)
recv = _without_token(_operations.recv)
reduce = _without_token(_operations.reduce)
reduce_scatter = _without_token(_operations.reduce_scatter)
scan = _without_token(_operations.scan)
scatter = _without_token(_operations.scatter)
scatterv = _without_token(_vector.scatterv)
send = _without_token(_operations.send)
sendrecv = _without_token(_operations.sendrecv)
sendrecv_replace = _without_token(_operations.sendrecv_replace)
wait = _without_token(_nonblocking.wait)
