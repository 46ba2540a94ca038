"""Whole jobs: how ranks start and end, under both MPIs, with no variables set by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

MPIS = ["openmpi", "mpich"]
OWN = ("MPI_CUDA", "MPI4PY", "JAX", "PMI", "PMIX", "OMPI_COMM")


def environment(**variables: str) -> dict[str, str]:
    """That of a user who set nothing but the platform."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(OWN)}
    return own | {"JAX_PLATFORMS": "mpi_cuda", **variables}


def job(
    mpi: str | None, code: str, *arguments: str, ranks: int = 2, limit: float = 60, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `code` on some ranks."""
    launcher = [] if mpi is None else [f"mpirun.{mpi}", "-n", str(ranks)]
    return subprocess.run(
        [*launcher, sys.executable, "-c", code, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=limit,
    )


def twice(text: str, result: subprocess.CompletedProcess[str]) -> bool:
    """Whether both ranks printed that and nothing else; MPIs mix the lines of ranks."""
    return "".join(result.stdout.split()) == "".join((text + text).split())


@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize("first", ["from mpi4py import MPI", "pass"])
def test_the_world_with_and_without_mpi4py_first(mpi: str, first: str) -> None:
    result = job(
        mpi,
        f"{first}\nimport jax, jax.numpy as jnp, mpi_cuda as m\n"
        "assert jax.process_count() == 2\n"
        "y, _ = m.allreduce(jnp.arange(2.0), m.SUM)\n"
        "from mpi4py import MPI\n"
        "assert MPI.COMM_WORLD.Get_size() == 2 and y[1] == 2\n"
        "assert MPI.COMM_WORLD.allreduce(1) == 2",
    )
    assert result.returncode == 0, result.stderr


ENDINGS = """if True:
    import sys, time, jax, jax.numpy as jnp, mpi_cuda as m
    jax.devices()
    x, ending = jnp.arange(1 << 18, dtype=jnp.float32), sys.argv[1]
    try:
        sys.exit(4)
    except SystemExit:
        pass
    if m.COMM_WORLD.rank == 0:
        if ending == "raise":
            raise ValueError("boom")
        if ending == "hook":
            sys.excepthook = lambda *_: print("my own hook", file=sys.stderr)
            raise ValueError("boom")
        if ending == "sys.exit":
            sys.exit(3)
        if ending == "SystemExit":
            raise SystemExit("boom")
        if ending == "interrupt":
            import os, signal
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        if ending == "send":
            m.send(x, 1)
    elif ending == "send":
        time.sleep(1)
        assert float(m.recv(x, 0)[0][-1]) == (1 << 18) - 1
        print("received")
    else:
        m.recv(x, 0)[0].block_until_ready()
"""


@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("raise", "ValueError: boom"),
        ("hook", "my own hook"),
        ("sys.exit", ""),
        ("SystemExit", "boom"),
        ("interrupt", "KeyboardInterrupt"),
    ],
)
def test_a_failing_rank_ends_the_job(mpi: str, ending: str, said: str) -> None:
    start = time.monotonic()
    result = job(mpi, ENDINGS, ending)
    assert result.returncode != 0 and said in result.stderr
    # The start takes about a second on two cores; a hang would take the limit.
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("mpi", MPIS)
def test_a_script_that_ends_after_dispatching_a_send_loses_nothing(mpi: str) -> None:
    result = job(mpi, ENDINGS, "send")
    assert result.returncode == 0 and "received" in result.stdout, result.stderr


def test_an_error_nobody_reads_is_raised_at_exit() -> None:
    code = """if True:
        import jax, jax.numpy as jnp, mpi_cuda as m
        jax.jit(lambda x: m.notoken.allreduce(x, m.BOR) and None)(jnp.ones(3))
    """.replace(" and None", "[:0]")
    result = job("openmpi", code)
    assert result.returncode != 0 and "there is no BOR of float32" in result.stderr


def test_the_wrong_launcher_is_refused() -> None:
    code = "import jax; print(jax.process_count())"
    result = job("mpich", code, MPI4PY_LIBMPI="libmpi.so.40")
    assert result.returncode == 0 and twice("2", result), result.stderr
    first = "from mpi4py import MPI; import jax; print(jax.process_count())"
    result = job("mpich", first, MPI4PY_LIBMPI="libmpi.so.40")
    assert result.returncode != 0
    assert "one of 2 by its launcher" in result.stderr and "MPI_CUDA_SINGLETON=1" in result.stderr
    result = job("mpich", first, MPI4PY_LIBMPI="libmpi.so.40", MPI_CUDA_SINGLETON="1")
    assert result.returncode == 0 and twice("1", result), result.stderr


def test_two_mpis_in_one_process_are_refused_with_both_names() -> None:
    result = job(
        None,
        "import ctypes\n"
        "for name in ('libmpi.so.40', 'libmpich.so.12'):\n"
        "    ctypes.CDLL(name, ctypes.RTLD_GLOBAL)\n"
        "import jax\njax.devices()",
    )
    assert result.returncode != 0
    assert "libmpi.so.40 and" in result.stderr and "libmpich.so.12:" in result.stderr


def test_a_missing_shim_is_refused_under_a_launcher(tmp_path) -> None:
    code = f"""if True:
        import shutil, mpi_cuda._library as library
        from pathlib import Path
        folder = Path({str(tmp_path)!r})
        library.LIBRARY = Path(shutil.copy(library.LIBRARY, folder))
        import jax
        jax.devices()
    """
    result = job("openmpi", code, ranks=1)
    assert result.returncode == 0, result.stderr
    result = job("openmpi", code, ranks=2)
    assert result.returncode != 0 and "libmpi_cuda_shim_openmpi.so" in result.stderr


CHILD = """if True:
    import multiprocessing, subprocess, sys, jax
    jax.devices()
    code = "import jax; print(len(jax.devices()))"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert refused.returncode != 0, refused
    assert "is a child of rank process" in refused.stderr, refused.stderr
    import os
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    allowed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert allowed.stdout == "1\\n", allowed.stderr
    print("fine")
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_a_child_process_is_refused_with_the_remedy(mpi: str) -> None:
    result = job(mpi, CHILD)
    assert twice("fine", result), result.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_callbacks_that_are_still_running_at_the_end_finish(mpi: str) -> None:
    code = """if True:
        import time, jax, jax.numpy as jnp
        def slow(x):
            time.sleep(0.5)
            print("finished")
        x = jnp.ones((200, 200))
        jax.jit(lambda x: jax.debug.callback(slow, (x @ x).sum()))(x)
    """
    result = job(mpi, code)
    assert result.returncode == 0 and twice("finished", result), result.stderr


def test_a_thread_level_too_low_is_refused() -> None:
    code = """if True:
        import mpi4py
        mpi4py.rc.thread_level = "serialized"
        from mpi4py import MPI
        import jax
        jax.devices()
    """
    result = job("openmpi", code)
    assert result.returncode != 0
    assert "thread level serialized" in result.stderr and "rc.thread_level" in result.stderr


@pytest.mark.parametrize("mpi", MPIS)
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


def test_local_topology() -> None:
    code = """if True:
        import jax, jax.numpy as jnp, mpi_cuda as m
        assert len(jax.devices()) == 1 and jax.process_count() == 1
        print(float(m.allreduce(1.0, m.SUM)[0]), m.COMM_WORLD.size)
    """
    result = job("openmpi", code, MPI_CUDA_TOPOLOGY="local")
    assert twice("2.0 2", result), result.stderr


DISTRIBUTED = """if True:
    import sys, jax
    from mpi4py import MPI
    rank, wrong = MPI.COMM_WORLD.Get_rank(), sys.argv[1] == "wrong"
    process = 1 - rank if wrong else rank
    jax.distributed.initialize("127.0.0.1:" + sys.argv[2], 2, process)
    try:
        assert jax.process_index() == rank and jax.process_count() == 2
        print("agreed")
    except RuntimeError as error:
        assert "jax.distributed says" in str(error), error
        print("refused")
"""


@pytest.mark.parametrize(("kind", "answer"), [("right", "agreed"), ("wrong", "refused")])
def test_jax_distributed_agrees_or_is_refused(kind: str, answer: str) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = job("openmpi", DISTRIBUTED, kind, str(port))
    assert twice(answer, result), result.stderr


def test_log_info_has_one_line_per_rank() -> None:
    result = job("openmpi", "import jax; jax.devices()", MPI_CUDA_LOG="info")
    lines = [line for line in result.stderr.splitlines() if line.startswith("mpi_cuda: rank")]
    assert len(lines) == 2 and all("of 2" in line and "Open MPI v4" in line for line in lines)


@pytest.mark.parametrize("mpi", MPIS)
def test_log_debug_says_what_served_each_operation(mpi: str) -> None:
    code = "import jax.numpy as jnp, mpi_cuda as m; print(m.allreduce(jnp.ones(3), m.SUM)[0][0])"
    result = job(mpi, code, MPI_CUDA_LOG="debug")
    for rank in range(2):
        said = rf"rank {rank}, launch \d+: allreduce of float32\[3\] with SUM .*done by {mpi} in"
        assert re.search(said, result.stderr), result.stderr


RAISING = """if True:
    import sys, time, jax.numpy as jnp, mpi_cuda as m
    m.allreduce(jnp.ones(3), m.SUM)[0].block_until_ready()
    if m.COMM_WORLD.rank == 0:
        sys.stderr.write(f"raised at {time.time()}\\n")
        raise ValueError
    m.recv(jnp.ones(3), 0)[0].block_until_ready()
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_the_job_ends_soon_after_an_exception(mpi: str) -> None:
    """The promise is 2 s; a busy test machine gets twice that."""
    result = job(mpi, RAISING)
    raised = re.search(r"raised at ([\d.]+)", result.stderr)
    assert raised and result.returncode != 0, result.stderr
    assert time.time() - float(raised[1]) < 4


NOT_WAITED = """if True:
    import jax, jax.numpy as jnp, mpi_cuda as m
    x = jnp.arange(1 << 20, dtype=jnp.float32)
    if m.COMM_WORLD.rank == 0:
        m.isend(x, 1, tag=1)
        m.irecv(x, 1, tag=2)
    else:
        print(float(m.recv(x, 0, tag=1)[0][-1]))
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_messages_that_nobody_waits_for(mpi: str) -> None:
    """What was sent arrives; a receive is named."""
    result = job(mpi, NOT_WAITED)
    assert result.returncode == 0 and result.stdout == "1048575.0\n", result.stderr
    said = "rank 0: irecv of float32 from rank 1 with tag 2 was never waited for"
    assert said in result.stderr, result.stderr


FINALIZED = """if True:
    from mpi4py import MPI
    import jax, jax.numpy as jnp, mpi_cuda as m
    rank = MPI.COMM_WORLD.rank
    request, _ = m.irecv(jnp.ones(3), 1 - rank, tag=9)
    jax.block_until_ready(request.number)
    MPI.Finalize()
    try:
        m.wait(request)[0].block_until_ready()
    except Exception as error:
        print("MPI was finalized before" in str(error) or error)
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_mpi_is_finalized_while_a_message_is_awaited(mpi: str) -> None:
    result = job(mpi, FINALIZED)
    assert twice("True", result), result.stdout + result.stderr


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


def test_a_missing_header_is_named_with_the_remedy(tmp_path) -> None:
    """The build script itself, as cargo built it."""
    scripts = Path(__file__).parents[2].glob("target/release/build/pjrt_sys-*/build-script-build")
    script = max(scripts, key=lambda path: path.stat().st_mtime)
    names = ("OUT_DIR", "VIRTUAL_ENV", "PATH", "CARGO_MANIFEST_DIR")
    env = dict.fromkeys(names, str(tmp_path / "package"))
    result = subprocess.run([script], env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    for said in ("pjrt_c_api.h", "MPI_CUDA_PJRT_HEADER", "xla-cpu-pjrt"):
        assert said in result.stderr, result.stderr
    env["MPI_CUDA_PJRT_HEADER"] = "/nowhere/pjrt_c_api.h"
    result = subprocess.run([script], env=env, capture_output=True, text=True, timeout=60)
    assert "MPI_CUDA_PJRT_HEADER=/nowhere/pjrt_c_api.h is not a file" in result.stderr


FORKED = """if True:
    import os, jax.numpy as jnp, mpi_cuda as m
    m.allreduce(jnp.ones(3), m.SUM)[0].block_until_ready()
    child = os.fork()
    if child == 0:
        try:
            m.allreduce(jnp.ones(3), m.SUM)
        except Exception as error:
            os._exit(7 if "forked" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    print(float(m.allreduce(jnp.float32(1), m.SUM)[0]))
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_a_forked_child_is_refused_and_the_parent_goes_on(mpi: str) -> None:
    result = job(mpi, FORKED)
    assert result.returncode == 0 and twice("2.0", result), result.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_settings_that_ranks_must_share_are_compared(mpi: str) -> None:
    code = """if True:
        import os
        rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
        os.environ["MPI_CUDA_PART_BYTES"] = str(64 + rank)
        import jax
        jax.devices()
    """
    result = job(mpi, code)
    assert result.returncode != 0
    assert "differs between ranks (64 to 65)" in result.stderr, result.stderr


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


@pytest.mark.parametrize("mpi", MPIS)
def test_a_program_of_another_run_finds_its_communicator_or_none(mpi: str, tmp_path) -> None:
    def run(mode: str) -> subprocess.CompletedProcess[str]:
        result = job(mpi, SERIALIZED, mode, str(tmp_path / "program"))
        assert result.returncode == 0, result.stderr
        return result

    run("write")
    assert twice("1.0", run("other"))
    assert twice("True", run("none"))


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


@pytest.mark.parametrize("mpi", MPIS)
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


TRANSFER = """if True:
    import jax, jax.numpy as jnp, mpi_cuda as m
    y, _ = m.allreduce(jnp.ones(5000), m.SUM)
    assert y[-1] == 2
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_direct_transfer_without_a_cuda_aware_mpi_is_refused(mpi: str) -> None:
    name = {"openmpi": "Open MPI", "mpich": "MPICH"}[mpi]
    for variable in ({"MPI_CUDA_TRANSFER": "direct"}, {"MPI4JAX_USE_CUDA_MPI": "1"}):
        result = job(mpi, TRANSFER, MPI_CUDA_PRETEND_DEVICE="1", **variable)
        assert result.returncode != 0
        assert "direct transfer was asked for" in result.stderr, result.stderr
        assert name in result.stderr and "MPI_CUDA_TRANSFER=staged" in result.stderr
        # Memory of the host reaches every MPI.
        assert job(mpi, TRANSFER, **variable).returncode == 0


def test_the_transfer_that_is_used_is_said() -> None:
    said = {"MPI_CUDA_PRETEND_DEVICE": "1", "MPI_CUDA_LOG": "info"}
    for variable, why in (
        ({}, "has no CUDA support"),
        ({"MPI_CUDA_TRANSFER": "staged", "MPI4JAX_USE_CUDA_MPI": "1"}, "as asked for"),
        ({"MPI4JAX_USE_CUDA_MPI": "yes"}, "as asked for"),
    ):
        result = job("openmpi", TRANSFER, **said, **variable)
        assert result.returncode == 0, result.stderr
        assert re.search(rf"rank 1: transfer staged \(.*{why}\)", result.stderr), result.stderr
        assert ("is not understood" in result.stderr) == ("yes" in variable.values())
    assert "transfer" not in job("openmpi", TRANSFER, MPI_CUDA_LOG="info").stderr


EIGHT = """if True:
    import tempfile
    import jax, jax.numpy as jnp, numpy as np, mpi_cuda as m
    from jax import lax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    n, rank = jax.process_count(), jax.process_index()
    mesh = Mesh(np.array(jax.devices()).reshape(2, n // 2), ("a", "b"))
    rows = np.arange(n * 16, dtype=np.float32).reshape(n, 16)
    spec = P(("a", "b"))
    sharding = NamedSharding(mesh, spec)
    x = jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
    ring = [(i, (i + 1) % n) for i in range(n)]
    def program(x):
        gathered = lax.all_gather(x, "b").sum(0)
        return lax.psum(x, "a") + gathered + lax.ppermute(x, ("a", "b"), ring)
    program = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec))
    with jax.profiler.trace(tempfile.mkdtemp()):
        for _ in range(20):
            y = program(x)
        assert m.allreduce(jnp.float32(1), m.SUM)[0] == n
    grid = rows.reshape(2, n // 2, 16)
    want = (grid.sum(0)[None] + grid.sum(1)[:, None]).reshape(n, 16) + np.roll(rows, 1, 0)
    np.testing.assert_allclose(np.asarray(y.addressable_shards[0].data)[0], want[rank])
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_eight_ranks_and_a_profile(mpi: str) -> None:
    result = job(mpi, EIGHT, ranks=8, limit=120)
    assert result.returncode == 0, result.stderr


PROBE = """if True:
    import os, runpy, sys
    # As who calls it without: JAX is imported with the package, before the probe can say.
    os.environ.pop("JAX_PLATFORMS", None)
    sys.argv[1:] = ["probe"]
    runpy.run_module("mpi_cuda", run_name="__main__")
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_a_probe_lets_auto_transfer_directly(mpi: str, tmp_path: Path) -> None:
    device = {
        "MPI_CUDA_PRETEND_DEVICE": "aware",
        "MPI_CUDA_PROOF_DIR": str(tmp_path),
        "MPI_CUDA_LOG": "info",
    }

    def transfer() -> str:
        result = job(mpi, TRANSFER, **device)
        assert result.returncode == 0, result.stderr
        return re.findall(r"rank 1: transfer (.*)", result.stderr)[0]

    assert transfer().startswith("staged (direct is not proven with")
    result = job(mpi, PROBE, **device)
    assert result.returncode == 0 and "the arrays as they are" in result.stdout, result.stderr
    assert transfer().startswith("direct (it was tried with")
    # As if the job had died in it: not used, and the next probe tries the next way.
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace("\narrays", "\ntrying arrays"))
    assert re.match("staged .* did not end; run the probe again", transfer())
    result = job(mpi, PROBE, **device)
    assert result.returncode == 0 and "as they are" not in result.stdout, result.stdout
    assert transfer().startswith("direct, through copies on the device (it was tried")
    file.write_text(file.read_text().replace("\ncopies", "\ntrying copies"))
    assert job(mpi, PROBE, **device).returncode == 1
    assert "each job that tried it died" in transfer()


def test_a_probe_needs_a_device(tmp_path: Path) -> None:
    result = job("openmpi", PROBE, MPI_CUDA_PROOF_DIR=str(tmp_path))
    assert result.returncode != 0 and "MPI_CUDA_DEVICE=cuda" in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_ranks_with_and_without_a_device_are_refused() -> None:
    code = (
        "import os\nif os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    os.environ['MPI_CUDA_PRETEND_DEVICE'] = '1'\n"
        "import jax; jax.devices()"
    )
    result = job("openmpi", code)
    assert result.returncode != 0
    assert re.search(r"MPI_CUDA_DEVICE.* is 1 on rank 1", result.stderr), result.stderr


def test_ranks_whose_transfers_differ_are_refused(tmp_path: Path) -> None:
    code = (
        "import os\nif os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    os.environ['MPI_CUDA_TRANSFER'] = 'staged'\n"
        "import jax; jax.devices()"
    )
    device = {"MPI_CUDA_PRETEND_DEVICE": "aware", "MPI_CUDA_PROOF_DIR": str(tmp_path)}
    result = job("openmpi", code, MPI_CUDA_TRANSFER="direct", **device)
    assert result.returncode != 0
    assert re.search(r"MPI_CUDA_TRANSFER.* is 1 on rank 1", result.stderr), result.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_chunks_that_differ_between_ranks_are_refused(mpi: str) -> None:
    code = (
        "import os\nrank = os.environ.get('OMPI_COMM_WORLD_RANK') or os.environ['PMI_RANK']\n"
        "os.environ['MPI_CUDA_CHUNK_BYTES'] = str(4096 * (1 + int(rank)))\n"
        "import jax; jax.devices()"
    )
    result = job(mpi, code, MPI_CUDA_PRETEND_DEVICE="1")
    assert result.returncode != 0
    assert "MPI_CUDA_CHUNK_BYTES is 8192 on rank 1" in result.stderr, result.stderr
    assert job(mpi, code).returncode == 0


ONE_BEFORE = """if True:
    import numpy as np
    from mpi4py import MPI
    import jax, jax.numpy as jnp, mpi_cuda as m
    world = MPI.COMM_WORLD
    data = np.asarray(jnp.arange(4.0)) if world.rank == 0 else None
    data = world.bcast(data)
    assert m.allreduce(jnp.asarray(data), m.SUM)[0][-1] == 6
"""
ONE_ALONE = """if True:
    from mpi4py import MPI
    import jax.numpy as jnp
    if MPI.COMM_WORLD.rank == 1:
        assert jnp.arange(3.0).sum() == 3
    MPI.COMM_WORLD.Barrier()
"""


@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize("code", [ONE_BEFORE, ONE_ALONE], ids=["before", "alone"])
def test_a_rank_may_use_jax_while_others_wait_in_mpi4py(mpi: str, code: str) -> None:
    result = job(mpi, code, limit=30)
    assert result.returncode == 0, result.stderr
