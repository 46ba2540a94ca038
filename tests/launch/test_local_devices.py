"""Several devices for each rank (`MPI_CUDA_LOCAL_DEVICES`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import MPIS, in_turn, job

COLLECTIVES = (Path(__file__).parent / "local_devices.py").read_text()

START = """if True:
    import jax, jax.numpy as jnp, numpy as np, mpi_cuda, threading, time
    from jax import lax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    rank, count = jax.process_index(), jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("d",))
    whole = np.arange(3.0 * count).reshape(count, 3)
    x = jax.make_array_from_callback(
        whole.shape, NamedSharding(mesh, P("d")), lambda index: whole[index])
    def on(body, outs=P("d")):
        return jax.jit(jax.shard_map(
            body, mesh=mesh, in_specs=P("d"), out_specs=outs, check_vma=False))
    def error(call):
        try:
            jax.block_until_ready(call())
        except Exception as e:
            # As one, since MPIs mix parts of the ranks' lines.
            words = str(e).replace(chr(10), " ")
            print(f"ERROR {rank} {type(e).__name__} {words}" + chr(10), end="", flush=True)
    total = on(lambda x: lax.psum(x, "d"), P())
"""


@pytest.mark.parametrize(
    ("mpi", "devices", "part"),
    in_turn(
        (2, "along_one_axis"),
        (4, "along_one_axis"),
        (4, "along_two_axes"),
        (2, "along_two_axes"),
        (2, "the_partitioners"),
        (4, "the_partitioners"),
    ),
)
def test_collectives_of_all_devices_have_the_numbers_of_numpy(
    mpi: str, devices: int, part: str
) -> None:
    done = job(mpi, COLLECTIVES, part, limit=85, MPI_CUDA_LOCAL_DEVICES=str(devices))
    assert done.returncode == 0, done.stderr
    # MPIs mix parts of the ranks' lines.
    assert done.stdout.count(f"has seen {2 * devices}") == 2


def test_one_rank_has_several_devices_without_an_mpi() -> None:
    code = START + '    print("SUM", np.asarray(total(x)).tolist())'
    done = job(None, code, MPI_CUDA_LOCAL_DEVICES="4", MPI_CUDA_SINGLETON="1")
    assert done.returncode == 0, done.stderr
    assert "SUM [[18.0, 22.0, 26.0]]" in done.stdout


@pytest.mark.parametrize("mpi", MPIS)
def test_operations_are_between_ranks_from_each_device(mpi: str) -> None:
    code = (
        START
        + """
    for device in jax.local_devices():
        one = jax.device_put(jnp.float32(rank + 1), device)
        total_of_ranks = jax.jit(lambda x: mpi_cuda.allreduce(x, mpi_cuda.SUM)[0])(one)
        assert float(total_of_ranks) == 3 and total_of_ranks.device == device
    thread = threading.Thread(target=lambda: print("PLUS", jax.jit(lambda x: x + 1)(one)))
    thread.start()
    thread.join()
    operation = lambda x: mpi_cuda.allreduce(x, mpi_cuda.SUM)[0]
    error(lambda: on(operation)(x))
    # Of three devices, of which one rank has but one: both refuse.
    some = Mesh(np.array(jax.devices()[:3]), ("d",))
    three = jax.make_array_from_callback(
        (3, 3), NamedSharding(some, P("d")), lambda index: whole[:3][index])
    error(lambda: jax.jit(jax.shard_map(
        operation, mesh=some, in_specs=P("d"), out_specs=P("d"), check_vma=False))(three))
    # Callbacks of the devices of a rank run in no order.
    local = Mesh(np.array(jax.local_devices()), ("d",))
    here = jax.device_put(np.ones((2, 3), np.float32), NamedSharding(local, P("d")))
    def calls(x):
        return np.asarray(jax.jit(operation)(jnp.asarray(x)))
    def called(x):
        return jax.pure_callback(calls, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    error(lambda: jax.jit(jax.shard_map(
        called, mesh=local, in_specs=P("d"), out_specs=P("d"), check_vma=False))(here))
    thread = threading.Thread(target=lambda: error(lambda: total(x)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(total(x), whole.sum(0, keepdims=True))
    """
    )
    done = job(mpi, code, MPI_CUDA_LOCAL_DEVICES="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PLUS") == 2
    assert done.stdout.count("has operations of mpi_cuda or mpi4jax, which are between ranks") == 4
    assert done.stdout.count("devices, whose callbacks run in no order") >= 2
    assert done.stdout.count("MPI_CUDA_THREAD_ORDER=one") == 2


@pytest.mark.parametrize(
    ("mpi", "body", "words"),
    in_turn(
        (
            "lax.cond(lax.axis_index('d') % 2 == 0, lambda x: lax.psum(x, 'd'), lambda x: x, x)",
            "all_reduce of float32[1,3] on device {first} of rank {rank}: device {second} of this "
            "rank has ended its program without it",
        ),
        (
            "lax.cond(lax.axis_index('d') % 2 == 0, lambda x: lax.psum(x, 'd'), "
            "lambda x: lax.pmax(x, 'd'), x)",
            "use a predicate or a loop condition that is the same on all devices of a rank",
        ),
        (
            "lax.psum(jax.pure_callback(fails, jax.ShapeDtypeStruct(x.shape, x.dtype), x), 'd')",
            "on purpose",
        ),
    ),
)
def test_devices_of_a_rank_that_do_not_meet_are_told(mpi: str, body: str, words: str) -> None:
    code = (
        START
        + f"""
    def fails(x):
        if x[0, 0] == 3:
            raise ValueError("on purpose")
        return x
    error(lambda: on(lambda x: {body})(x))
    """
    )
    done = job(mpi, code, MPI_CUDA_LOCAL_DEVICES="2")
    for rank in range(2):
        (line,) = (
            line for line in done.stdout.splitlines() if line.startswith(f"ERROR {rank} JaxRuntime")
        )
        said = words.format(first=2 * rank, second=2 * rank + 1, rank=rank)
        assert said in line or "on purpose" in words, line


@pytest.mark.parametrize("mpi", MPIS)
def test_a_report_names_rank_and_device(mpi: str) -> None:
    code = (
        START
        + """
    def sleeps(x):
        if x[0, 0] == 9:
            time.sleep(12)
        return x
    shape = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    late = on(lambda x: lax.psum(jax.pure_callback(sleeps, shape, lax.psum(x, 'd') * 0 + x), 'd'))
    late(x).block_until_ready()
    """
    )
    done = job(mpi, code, MPI_CUDA_LOCAL_DEVICES="2", MPI_CUDA_WARN_AFTER="4")
    assert done.returncode == 0, done.stderr
    assert "on device 2 of rank 1, which waits for device(s) 3 of the same rank" in done.stderr


@pytest.mark.parametrize(("mpi", "value"), in_turn("0", "-1", "two", "257", "1.5"))
def test_other_values_are_refused(mpi: str, value: str) -> None:
    done = job(mpi, "import jax; jax.devices()", MPI_CUDA_LOCAL_DEVICES=value)
    assert done.returncode != 0
    assert f"MPI_CUDA_LOCAL_DEVICES={value} is not understood" in done.stdout + done.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_ranks_that_disagree_are_told(mpi: str) -> None:
    code = """if True:
        import os
        rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
        os.environ["MPI_CUDA_LOCAL_DEVICES"] = str(1 + int(rank))
        import jax
        jax.devices()
    """
    done = job(mpi, code)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "MPI_CUDA_LOCAL_DEVICES" in text and "1" in text and "2" in text


@pytest.mark.parametrize(
    ("mpi", "variable", "value"),
    in_turn(("MPI_CUDA_TOPOLOGY", "local"), ("MPI_CUDA_PRETEND_DEVICE", "1")),
)
def test_settings_for_one_device_are_refused(mpi: str, variable: str, value: str) -> None:
    code = "import jax; jax.devices()"
    done = job(mpi, code, MPI_CUDA_LOCAL_DEVICES="2", **{variable: value})
    assert done.returncode != 0
    assert "leave one of the two out" in done.stdout + done.stderr
