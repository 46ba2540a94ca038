"""JAX's coordination service in whole jobs: who may bring it up, and that all ends in order."""

from __future__ import annotations

import socket

import pytest
from jobs import job, twice

CLIENT = """if True:
    import sys, jax, mpi_cuda
    from jax._src import distributed
    from jax.experimental import multihost_utils
    jax.distributed.initialize(*eval(sys.argv[1]))
    rank, client = jax.process_index(), distributed.global_state.client
    assert jax.process_count() == 2 == distributed.global_state.num_processes
    with multihost_utils.live_devices(jax.devices()) as devices:
        assert devices == jax.devices()
    assert not multihost_utils.reached_preemption_sync_point(1)
    client.wait_at_barrier("end", 10_000)
    print("met")
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_initialize_without_arguments_before_the_backend() -> None:
    result = job("openmpi", CLIENT, "()")
    assert result.returncode == 0 and twice("met", result), result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_initialize_without_arguments_is_the_first_thing_that_is_done(mpi: str) -> None:
    """JAX itself finds the ranks of Open MPI, and not those of MPICH."""
    result = job(mpi, CLIENT.replace(", mpi_cuda", ""), "()")
    assert result.returncode == 0 and twice("met", result), result.stderr
    assert result.stderr == ""


def test_initialize_with_arguments_leaves_no_lines_at_the_end() -> None:
    rank = "int(__import__('os').environ['PMI_RANK'])"
    result = job("mpich", CLIENT, f"('127.0.0.1:{free_port()}', 2, {rank})")
    assert result.returncode == 0 and twice("met", result), result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_a_wrong_number_of_processes_is_refused_before_the_service_waits_for_them(mpi: str) -> None:
    code = """if True:
        import os, sys, jax
        name = "PMI_RANK" if "PMI_RANK" in os.environ else "OMPI_COMM_WORLD_RANK"
        try:
            jax.distributed.initialize(sys.argv[1], 3, int(os.environ[name]))
        except ValueError as error:
            assert "says num_processes=3, and MPI says 2" in str(error), error
            print("refused")
    """
    result = job(mpi, code, f"127.0.0.1:{free_port()}", limit=30)
    assert result.returncode == 0 and twice("refused", result), result


def test_a_shutdown_of_what_nobody_has_started_does_nothing() -> None:
    result = job("mpich", "import jax; jax.devices(); jax.distributed.shutdown(); print('met')")
    assert result.returncode == 0 and twice("met", result), result.stderr
    assert result.stderr == ""


ONE_ASKS = """if True:
    import time, jax
    # The last rank asks when the others are at their end.
    if jax.process_index() == 3:
        time.sleep(1)
        print(jax.distributed.is_initialized())
"""


@pytest.mark.parametrize(("mpi", "nodes"), [("openmpi", "2"), ("mpich", "")])
def test_one_rank_may_ask_alone(mpi: str, nodes: str) -> None:
    result = job(mpi, ONE_ASKS, ranks=4, **({"MPI_CUDA_PRETEND_NODES": nodes} if nodes else {}))
    assert result.returncode == 0 and result.stdout.split() == ["True"], result.stderr
    assert result.stderr == ""


KILLED = """if True:
    import os, signal, time, jax, jax.numpy as jnp, mpi_cuda as m
    rank = jax.process_index()
    assert rank == m.COMM_WORLD.rank and jax.distributed.is_initialized()
    m.barrier()
    if rank == 0:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    m.allreduce(jnp.ones(3), m.SUM)[0].block_until_ready()
"""


def test_the_death_of_rank_0_is_told_in_our_words() -> None:
    """JAX's own client would end the others at once, with a stack trace."""
    result = job("openmpi", KILLED)
    assert result.returncode != 0
    assert "rank 0, which this waits for, has died" in result.stderr, result.stderr
    assert "distributed service" not in result.stderr, result.stderr
    assert "coordination" not in result.stderr, result.stderr


STOPPED = """if True:
    import os, signal, time, jax
    from jax.experimental import multihost_utils
    jax.devices()
    for step in range(200):
        if multihost_utils.reached_preemption_sync_point(step):
            print("stopped")
            break
        if step == 3 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
"""


def test_sigterm_stops_all_ranks_at_one_step() -> None:
    result = job("mpich", STOPPED)
    assert result.returncode == 0 and twice("stopped", result), result.stderr
