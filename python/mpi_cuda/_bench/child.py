"""One process of gloo's (`gloo.py`), which no launcher knows: `python -m mpi_cuda._bench.child`."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpi_cuda._bench import timing
from mpi_cuda._bench.operations import Problem
from mpi_cuda._bench.programs import Collectives


class _Peers:
    """The processes, over gloo."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather_numbers(self, own: list[float]) -> list[list[float]]:
        """What each passes; collective. In bytes, since JAX's numbers have 32 bits."""
        from jax.experimental import multihost_utils

        bytes_ = np.frombuffer(np.array(own, np.float64).tobytes(), np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(bytes_)).reshape(self.size, -1)
        return [np.frombuffer(row.tobytes(), np.float64).tolist() for row in rows]


def main(spec: dict[str, Any]) -> None:
    """Measures, and writes the times on rank 0."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    rank, size = spec["rank"], spec["size"]
    dtype = np.dtype(jnp.dtype(spec["dtype"]))
    jax.config.update("jax_enable_x64", dtype.itemsize > 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(spec["address"], size, rank)
    library, peers = Collectives("gloo", rank, spec["launch"]), _Peers(rank, size)
    rows = []
    for name, count in spec["problems"]:
        problem = Problem(name, count, dtype, size)
        found = timing.measure([library], problem, peers, **spec["how"])
        rows.append(found["gloo"])
    if rank == 0:
        Path(spec["file"]).write_text(json.dumps(rows))


def _end_with_parent() -> None:
    # Python's own stream cannot be waited for by a thread when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
