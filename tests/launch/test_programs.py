"""Programs of whole jobs: deferred, compiled, loaded from another run, and what is said of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from jobs import MPIS, job, on_one, twice


@on_one("mpich")
def test_a_waiting_operation_is_named(mpi: str) -> None:
    code = """if True:
        import time, jax.numpy as jnp, mpi_cuda as m
        if m.COMM_WORLD.rank == 0:
            m.recv(jnp.zeros((2, 3)), 1, tag=4)[0].block_until_ready()
        else:
            time.sleep(2)
            m.send(jnp.zeros((2, 3)), 0, tag=4)
    """
    result = job(mpi, code, MPI_CUDA_WARN_AFTER="0.5")
    expected = "rank 0 is waiting in recv into float32[2,3] from rank 1 with tag 4"
    assert result.returncode == 0 and expected in result.stderr, result.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_log_debug_says_what_served_each_operation(mpi: str) -> None:
    code = """if True:
        import jax.numpy as jnp, mpi_cuda as m
        print(m.allreduce(jnp.ones(3), m.SUM)[0], m.scan(jnp.ones(3), m.SUM)[0])
    """
    result = job(mpi, code, MPI_CUDA_LOG="debug")
    for rank in range(2):
        for operation, served in (("allreduce", "shared memory"), ("scan", mpi)):
            said = rf"launch \d+: {operation} of float32\[3\] .*done by {served} in"
            assert re.search(rf"rank {rank}: mpi_cuda: {said}", result.stderr), result.stderr


RESTARTED = """if True:
    import jax, jax.numpy as jnp, mpi_cuda as m
    from jax.extend import backend
    from mpi4py import MPI
    rank, comm = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD
    kept = m.allreduce(jnp.ones(3), m.SUM)[0] + 1
    backend.clear_backends()
    # The first client lives as long as its array; what is dispatched now runs on the second.
    if rank == 0:
        y = m.recv(jax.ShapeDtypeStruct((3,), jnp.float32), 1)[0]
        comm.send("now", 1)
        print(float(y.sum()), float(kept.sum()))
    else:
        comm.recv()
        m.send(jnp.ones(3), 0)
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_a_second_client_while_the_first_one_lives(mpi: str) -> None:
    result = job(mpi, RESTARTED)
    assert result.returncode == 0 and result.stdout == "3.0 9.0\n", result.stderr


MANY = """if True:
    import jax, jax.numpy as jnp, mpi_cuda as m
    from mpi4py import MPI
    comm, count = MPI.COMM_WORLD, 1024 + 28 + 2
    receive = jax.jit(lambda x: m.notoken.recv(x, 1))
    x = jnp.zeros(())
    if comm.rank == 0:
        # The last ones wait a second each, since what is deferred holds its inputs.
        received = [receive(x) for _ in range(count)]
        comm.send("now", 1)
        print([float(y) for y in received] == list(range(count)))
    else:
        comm.recv()
        for i in range(count):
            m.send(jnp.float32(i), 0)
"""


NARROW = MANY.replace("1024 + 28 + 2", "40").replace(
    'comm.send("now", 1)',
    """small = jax.jit(lambda x: x.astype(jnp.int4))
        try:
            small(x)
        except RuntimeError as error:
            assert "less than 8 bits" in str(error), error
        comm.send("now", 1)
        received[-1].block_until_ready()
        assert int(small(x)) == 0""",
)


def test_a_program_that_cannot_be_deferred_is_refused_after_a_while() -> None:
    assert NARROW != MANY
    result = job("openmpi", NARROW, limit=150)
    assert result.returncode == 0 and result.stdout == "True\n", result.stderr


def test_beyond_a_thousand_deferred_launches_dispatch_is_slow_but_goes_on() -> None:
    result = job("openmpi", MANY)
    assert result.returncode == 0 and result.stdout == "True\n", result.stderr


SERIALIZED = """if True:
    import pickle, sys, jax, jax.numpy as jnp, mpi_cuda as m
    from jax.experimental import serialize_executable as serial
    from mpi4py import MPI
    world, (mode, path) = MPI.COMM_WORLD, sys.argv[1:]
    path += str(world.rank)
    x = jnp.arange(3.0) + world.rank
    if mode == "write":
        alone, both = world.Split(world.rank), world.Clone()
        sum_alone = m.notoken.allreduce(x, m.SUM, comm=alone)
        program = jax.jit(lambda x: m.notoken.allreduce(x, m.SUM, comm=both)).lower(x).compile()
        payload = serial.serialize(program)
        pickle.dump(payload, open(path, "wb"))
    else:
        payload = pickle.load(open(path, "rb"))
        devices = jax.local_devices()
        program = serial.deserialize_and_load(*payload, execution_devices=devices)
        if mode == "other":
            # Made and used in another order than where the program was compiled.
            both, alone = world.Clone(), world.Split(world.rank)
            m.notoken.allreduce(x, m.SUM, comm=both)
            m.notoken.allreduce(x, m.SUM, comm=alone)
        try:
            print(float(program(x)[0]))
        except Exception as error:
            print("no communicator has this number" in str(error) or error)
"""


@on_one("mpich")
def test_a_program_of_another_run_finds_its_communicator_or_none(mpi: str, tmp_path) -> None:
    def run(mode: str) -> subprocess.CompletedProcess[str]:
        result = job(mpi, SERIALIZED, mode, str(tmp_path / "program"))
        assert result.returncode == 0, result.stderr
        return result

    run("write")
    assert twice("1.0", run("other"))
    assert twice("True", run("none"))


CACHED = """if True:
    import jax, jax.numpy as jnp, mpi_cuda as m
    from jax.experimental import io_callback
    from mpi4py import MPI
    comm, seen = MPI.COMM_WORLD, []

    @jax.jit
    def noted(x):
        # What the callback computes runs beside the program that is waiting for it.
        io_callback(lambda x: seen.append(float((x[0] * 3 + 1) ** 2)), None, x, ordered=True)
        return x + 1

    if comm.rank == 0:
        y = noted(m.notoken.recv(jax.ShapeDtypeStruct((3,), jnp.float32), 1))
        comm.send("dispatched", 1)
        print(float(y.sum()))
    else:
        comm.recv()
        m.notoken.send(jnp.ones(3), 0)
    jax.effects_barrier()
    assert comm.rank or seen == [16], seen
"""


@on_one("mpich")
def test_callbacks_of_deferred_programs_use_those_of_the_compilation_cache(
    mpi: str, tmp_path: Path
) -> None:
    """XLA:CPU cannot copy a program that was loaded, which is what the second run has."""
    for _ in range(2):
        result = job(
            mpi,
            CACHED,
            JAX_COMPILATION_CACHE_DIR=str(tmp_path),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        )
        assert result.returncode == 0 and result.stdout == "6.0\n", result.stderr
        assert list(tmp_path.glob("jit_dynamic_slice*")), "nothing was cached"


SWAPPED = """if True:
    import time, jax, jax.numpy as jnp, numpy as np
    from functools import partial
    from jax import lax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    mesh = Mesh(np.array(jax.devices()), ("x",))
    ones = lambda _: np.ones(3, np.float32)
    x = jax.make_array_from_callback((6,), NamedSharding(mesh, P("x")), ones)
    mapped = partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    add, most = (jax.jit(mapped(lambda x, f=f: f(x, "x") + 0 * x)) for f in (lax.psum, lax.pmax))
    for _ in range(3):
        most(add(x)).block_until_ready()
    if jax.process_index() == 1:
        time.sleep(0.5)
        add, most = most, add
    print(most(add(x)).block_until_ready())
"""


@on_one("openmpi")
def test_programs_that_have_run_before_in_another_order_are_named(mpi: str) -> None:
    result = job(mpi, SWAPPED, limit=30)
    assert result.returncode != 0 and not result.stdout
    assert "Rank 0: all-reduce f32[3] SUM" in result.stderr, result.stderr
    assert "Rank 1: all-reduce f32[3] MAX" in result.stderr, result.stderr


COMPILED = """if True:
    import os, jax, jax.numpy as jnp, numpy as np
    from jax import lax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    def alone(x): return x + 1
    def together(x): return lax.psum(x, "x")
    jax.jit(alone)(jnp.ones(3)).block_until_ready()
    mesh = Mesh(np.array(jax.devices()), ("x",))
    x = jax.make_array_from_callback((6,), NamedSharding(mesh, P("x")), lambda _: np.ones(3))
    jax.jit(jax.shard_map(together, mesh=mesh, in_specs=P("x"), out_specs=P()))(x)
"""


def test_a_program_of_one_device_is_compiled_once_and_of_several_twice(tmp_path: Path) -> None:
    """XLA dumps each module that it compiles."""
    job("openmpi", COMPILED, XLA_FLAGS=f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text")
    names = [path.name for path in tmp_path.glob("*.before_optimizations.txt")]
    # Both ranks dump into one folder, and a name has the module's number.
    counts = {f: len({n for n in names if f"jit_{f}." in n}) for f in ("alone", "together")}
    assert counts == {"alone": 1, "together": 2}, names


def test_threads_that_share_one_order() -> None:
    """A framework's own pool launches: what its programs are called may depend on the rank."""
    code = """if True:
        import threading, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        rank, devices = jax.process_index(), jax.devices()
        sharding = NamedSharding(jax.make_mesh((2,), ("x",)), P("x"))
        x = jax.make_array_from_callback((4,), sharding, lambda index: np.arange(4.0)[index])
        def total(x):
            return x.sum()
        total.__name__ = f"total_{rank}"
        found = []
        thread = threading.Thread(target=lambda: found.append(float(jax.jit(total)(x))))
        thread.start()
        thread.join()
        print(*found)
    """
    result = job("mpich", code, MPI_CUDA_THREAD_ORDER="one")
    assert twice("6.0", result), result.stderr


@on_one("mpich")
def test_a_start_of_more_than_one_call_is_refused_on_all_ranks(mpi: str) -> None:
    """With the limit of what goes in parts, which is 1 GiB otherwise."""
    code = """if True:
        import jax.numpy as jnp, mpi_cuda as m
        from mpi_cuda import notoken as nt
        for length in (16, 17):
            try:
                print(float(nt.wait(nt.iallreduce(jnp.ones(length), m.SUM)).sum()))
            except Exception as error:
                print("at most 64 bytes" in str(error) and "has 68; use allreduce" in str(error))
    """
    result = job(mpi, code, MPI_CUDA_PART_BYTES="64")
    assert twice("32.0 True", result), result.stdout + result.stderr
