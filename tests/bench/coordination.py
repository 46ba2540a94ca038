"""What JAX's coordination service costs a job that asks for it.

Usage: mpirun -n N python tests/bench/coordination.py. Prints, over the ranks, the longest time in
milliseconds from the first question for the client to its answer, and how many threads rank 0 and
the others have more than before.
"""

from __future__ import annotations

import os
import time

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

import mpi_cuda as m


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def main() -> None:
    m.barrier()
    # What makes the answers known is compiled before.
    multihost_utils.process_allgather(np.zeros(3))
    before, start = threads(), time.perf_counter()
    assert distributed.global_state.client is not None
    seconds = time.perf_counter() - start
    time.sleep(0.5)
    own = np.array([1e3 * seconds, threads() - before, before])
    all_ranks = multihost_utils.process_allgather(own)
    if jax.process_index() == 0:
        others = all_ranks[1:, 1].max() if len(all_ranks) > 1 else 0
        print(
            f"{len(all_ranks)} ranks: {all_ranks[:, 0].max():.0f} ms, {all_ranks[0, 1]:.0f} more "
            f"threads on rank 0 (of {all_ranks[0, 2]:.0f}), {others:.0f} on the others"
        )


if __name__ == "__main__":
    main()
