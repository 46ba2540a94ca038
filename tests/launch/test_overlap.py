"""All-reduces of programs for several devices that are started, and waited for later
(`MPI_CUDA_OVERLAP`): results are the same, and ranks that do not agree are told."""

from __future__ import annotations

import pytest
from jobs import MPIS, in_turn, job

STEP = """if True:
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    mesh = Mesh(np.array(jax.devices()), ("d",))
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    put = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i])
    rng = np.random.default_rng(0)
    size = (256, 256)
    # Whole numbers, whose sums are the same in any order.
    weights = [put(rng.integers(-2, 3, size).astype(np.float32), everywhere) for _ in range(4)]
    scales = [put(np.float32([1, 2, 3]), everywhere), put(np.ones(4, np.int32), everywhere)]
    x = put(rng.integers(-2, 3, (8 * jax.device_count(), 256)).astype(np.float32), rows)

    def grads(weights, x):
        # Straight through the signs.
        out = []
        for w in weights:
            y = x @ w
            out.append(x.T @ y)
            x = jnp.sign(y)
        return out

    def step(weights, scales, x):
        gs = grads(weights, x)
        new = [w - jnp.sign(g) for w, g in zip(weights, gs)]
        count = jnp.sum(x > 0)
        return new, [s + s.dtype.type(1) for s in scales], [jnp.sum(g) for g in gs], count

    step = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    for _ in range(3):
        weights, scales, sums, count = step(weights, scales, x)
    if jax.process_index() == 0:
        print("RESULT", [float(jnp.sum(w * w)) for w in weights], [float(s) for s in sums],
              int(count))
"""


def result(out: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT")]
    return line


@pytest.mark.parametrize("mpi", MPIS)
def test_a_step_has_the_same_result_and_computes_between_start_and_end(mpi: str) -> None:
    jobs = {
        overlap: job(mpi, STEP, MPI_CUDA_OVERLAP=overlap, MPI_CUDA_LOG="debug")
        for overlap in ("0", "1")
    }
    for done in jobs.values():
        assert done.returncode == 0, done.stderr
    assert result(jobs["0"].stdout) == result(jobs["1"].stdout)
    assert "XLA's iallreduce" not in jobs["0"].stderr
    assert jobs["1"].stderr.count("XLA's iallreduce") >= 2 * 3 * 4
    assert jobs["1"].stderr.count("XLA's wait") == jobs["1"].stderr.count("XLA's iallreduce")


@pytest.mark.parametrize(("mpi", "nodes"), in_turn("1", "2"))
def test_jobs_of_several_nodes_overlap_if_asked_to(mpi: str, nodes: str) -> None:
    done = job(
        mpi, STEP, MPI_CUDA_OVERLAP="nodes", MPI_CUDA_PRETEND_NODES=nodes, MPI_CUDA_LOG="debug"
    )
    assert done.returncode == 0, done.stderr
    assert ("XLA's iallreduce" in done.stderr) == (nodes == "2")


@pytest.mark.parametrize("mpi", MPIS)
def test_ranks_that_disagree_are_told(mpi: str) -> None:
    code = """if True:
        import os
        rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
        os.environ["MPI_CUDA_OVERLAP"] = rank
        import jax
        jax.devices()
    """
    done = job(mpi, code)
    assert done.returncode != 0
    assert "MPI_CUDA_OVERLAP" in done.stderr
