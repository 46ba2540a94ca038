"""How ranks start: which MPI, whose process, what they must agree on."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from jobs import MPIS, job, on_one, twice

import mpi_cuda._library


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


def test_the_wrong_launcher_is_refused() -> None:
    code = "import jax; print(jax.process_count())"
    first = f"from mpi4py import MPI; {code}"
    for program in (code, first):
        result = job("mpich", program, MPI4PY_LIBMPI="libmpi.so.40")
        assert result.returncode != 0
        assert "one of 2 by its launcher" in result.stderr, result.stderr
        assert "MPI_CUDA_SINGLETON=1" in result.stderr, result.stderr
        assert "libmpi.so.40" in result.stderr and "MPI4PY_LIBMPI" in result.stderr, result.stderr
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
    assert re.search(r"/libmpi\.so\.40\S* and /\S*/libmpich\.so\.12\S*: one", result.stderr)


def test_a_shim_that_was_cut_off_is_refused(tmp_path) -> None:
    """Loading it would be a SIGBUS."""
    name = "libmpi_cuda_shim_mpich.so"
    whole = mpi_cuda._library.FOLDER / name
    (tmp_path / name).write_bytes(whole.read_bytes()[:8192])
    # And what nothing reads is said.
    named = {"MPI_CUDA_SHIM_DIR": str(tmp_path), "MPI_CUDA_SHIMDIR": "x", "MPI_CUDA_STARTUP": "no"}
    result = job("mpich", "import jax; jax.devices()", **named)
    assert result.returncode != 0
    assert f"{tmp_path / name}: the file has 8192 bytes" in result.stderr, result.stderr
    other = mpi_cuda._library.FOLDER / "libmpi_cuda_shim_openmpi.so"
    (tmp_path / name).write_bytes(other.read_bytes())
    result = job("mpich", "import jax; jax.devices()", MPI_CUDA_SHIM_DIR=str(tmp_path))
    assert "the file is the shim of another ABI than mpich" in result.stderr, result.stderr
    (tmp_path / name).write_bytes(whole.read_bytes()[:8192])
    result = job(None, "import jax; jax.devices()", **named)
    assert result.returncode == 0, result.stderr
    assert "Do you mean MPI_CUDA_SHIM_DIR?" in result.stderr, result.stderr
    assert "MPI_CUDA_STARTUP=no counts as 1" in result.stderr, result.stderr


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


@on_one("mpich")
def test_a_child_process_is_refused_with_the_remedy(mpi: str) -> None:
    result = job(mpi, CHILD)
    assert twice("fine", result), result.stderr


CHILD_FIRST = """if True:
    import subprocess, sys
    code = "import jax; print(len(jax.devices()))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print(child.stderr, file=sys.stderr)
    import jax.numpy as jnp, mpi_cuda as m
    print(m.allreduce(jnp.float32(1), m.SUM)[0])
"""


def test_a_child_that_is_before_its_rank_is_told_or_refused() -> None:
    """MPICH's children lack the connection to the launcher; Open MPI's join, and their rank is the
    second then."""
    result = job("mpich", CHILD_FIRST)
    assert twice("2.0", result), result.stderr
    assert "it is a child of a rank, and cannot join" in result.stderr, result.stderr
    result = job("openmpi", CHILD_FIRST)
    assert result.returncode != 0
    assert "has joined the MPI job as this rank already" in result.stderr, result.stderr


FORKED_FIRST = """if True:
    import os, jax, jax.numpy as jnp
    pid = os.fork()
    if pid == 0:
        try:
            jnp.ones(2)
        except RuntimeError as error:
            assert "was forked from rank process" in str(error), error
            print("refused", flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    print(jax.process_count())
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_a_child_that_was_forked_before_its_rank_has_joined_is_refused(mpi: str) -> None:
    result = job(mpi, FORKED_FIRST)
    assert result.returncode == 0 and twice("refused 2", result), result


def test_a_child_that_was_forked_before_jax_was_imported_may_be_the_rank() -> None:
    code = FORKED_FIRST.replace("import os, jax, jax.numpy as jnp", "import os").replace(
        "            jnp.ones(2)", "            import jax; print(jax.process_count(), flush=True)"
    )
    result = job("openmpi", code.replace("    print(jax.process_count())\n", ""))
    # How such a job ends is the launcher's affair, which knows the first process alone.
    assert "forked" not in result.stderr and twice("2", result), result


CHILD_WITH_MPI4PY = """if True:
    import subprocess, sys, jax
    if sys.argv[1] == "after":
        jax.devices()
    code = "import mpi4py; mpi4py.rc.initialize = %s; from mpi4py import MPI; print('there')"
    def run(initialize):
        command = [sys.executable, "-c", code % initialize]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)
    refused = run(True)
    assert "child of" in refused.stderr and "a rank" in refused.stderr, refused
    assert run(False).stdout == "there\\n"
    print(jax.process_count())
"""


@pytest.mark.parametrize(("mpi", "when"), [("mpich", "before"), *((mpi, "after") for mpi in MPIS)])
def test_mpi4py_in_a_child_is_refused_unless_it_initialises_nothing(mpi: str, when: str) -> None:
    result = job(mpi, CHILD_WITH_MPI4PY.replace('"a rank"', '"rank"'), when)
    assert result.returncode == 0 and twice("2", result), result


def test_a_job_that_a_rank_starts_under_mpich_is_another_one() -> None:
    code = """if True:
        import os, subprocess, sys, jax
        if jax.process_index() == 0:
            own = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "HYD"))}
            code = "from mpi4py import MPI; import jax; print(jax.process_count())"
            command = ["mpirun.mpich", "-n", "2", sys.executable, "-c", code]
            print(subprocess.run(command, env=own, capture_output=True, text=True).stdout)
    """
    result = job("mpich", code)
    assert result.returncode == 0 and twice("2", result), result


def test_alone_without_a_program_for_other_nodes(tmp_path: Path) -> None:
    """Open MPI 4 starts a daemon, and looks for ssh first."""
    for name in ("sh", "uname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    result = job(None, "import jax; print(jax.process_count())", PATH=str(tmp_path))
    assert result.returncode == 0 and result.stdout == "1\n", result.stderr


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
    try:
        jax.distributed.initialize("127.0.0.1:" + sys.argv[2], 2, process)
        assert jax.process_index() == rank and jax.process_count() == 2
        print("agreed")
    except ValueError as error:
        assert f"says process_id={process}, and MPI says {rank}" in str(error), error
        print("refused")
"""


@pytest.mark.parametrize(("kind", "answer"), [("right", "agreed"), ("wrong", "refused")])
def test_jax_distributed_agrees_or_is_refused(kind: str, answer: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = job("openmpi", DISTRIBUTED, kind, str(port))
    assert twice(answer, result), result.stderr


def test_log_info_has_one_line_per_rank() -> None:
    result = job("openmpi", "import jax; jax.devices()", MPI_CUDA_LOG="info")
    lines = [line for line in result.stderr.splitlines() if "mpi_cuda: rank" in line]
    assert len(lines) == 2 and all("of 2" in line and "Open MPI v4" in line for line in lines)


def test_ranks_of_a_node_find_each_other_where_mpi_denies_it() -> None:
    """As MPICH 5 built with UCX does, which Debian has."""
    result = job(
        "mpich",
        "import jax; jax.devices()\n"
        "from mpi4py import MPI\n"
        "assert MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == 1",
        ranks=3,
        MPIR_CVAR_NOLOCAL="1",
        MPI_CUDA_LOG="info",
    )
    assert result.returncode == 0, result.stderr
    for rank in range(3):
        assert f"rank {rank} of 3 (node-local {rank})" in result.stderr, result.stderr


LOGGED = """if True:
    import jax.numpy as jnp, mpi_cuda as m
    m._library.log("before the start")
    m.allreduce(jnp.ones(3), m.SUM)[0].block_until_ready()
    m._library.log("from Python\\nin two lines")
    m._library.warn("as a warning")
"""


def test_lines_of_the_log_carry_time_host_and_rank() -> None:
    before = datetime.now(UTC)
    result = job("mpich", LOGGED, MPI_CUDA_LOG="debug", TZ="XYZ-05:30")
    after = datetime.now(UTC)
    assert result.returncode == 0, result.stderr
    said: dict[str, list[str]] = {"rank 0": [], "rank 1": [], "pid": []}
    for line in result.stderr.splitlines():
        # A warning of Python's begins with its place in the program, and ends with who gives it.
        warning = re.search(r"Warning: mpi_cuda: (.*) \[(.*)\]$", line)
        prefix, ours, text = line.partition(": mpi_cuda: ")
        if warning:
            text, prefix = warning.groups()
        if not ours:
            assert "mpi_cuda: " not in line, result.stderr
            continue
        time, host, kind, number = prefix.split()
        assert before - timedelta(milliseconds=1) <= datetime.fromisoformat(time) <= after, line
        assert time[23:] == "+05:30" and host == socket.gethostname(), line
        said["pid" if kind == "pid" else f"{kind} {number}"].append(text)
    assert said["pid"] == ["before the start"] * 2, result.stderr
    for rank in range(2):
        lines = said[f"rank {rank}"]
        expected = (f"rank {rank} of 2 ", "launch ", "from Python", "as a warning")
        assert [words for words in expected if any(line.startswith(words) for line in lines)] == [
            *expected
        ], result.stderr


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
            jnp.ones(5) * 7
            os._exit(9)
        except RuntimeError as error:
            if "forked" not in str(error):
                os._exit(8)
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


@on_one("mpich")
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
    for name in ["SHM_COLLECTIVES", "SHM_MESSAGES"]:
        result = job(mpi, code.replace("PART_BYTES", name).replace("64 + rank", "rank"))
        assert result.returncode != 0
        assert f"MPI_CUDA_{name} is " in result.stderr, result.stderr
    code = code.replace("PART_BYTES", "TOPOLOGY").replace(
        "str(64 + rank)", "['global', 'local'][rank]"
    )
    result = job(mpi, code)
    assert result.returncode != 0
    words = (
        "MPI_CUDA_TOPOLOGY (0 global, 1 local) is 1 on rank 1 and differs between ranks (0 to 1)"
    )
    assert words in result.stderr, result.stderr


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


BEFORE = """if True:
    import sys, jax, jax.numpy as jnp, mpi_cuda as m
    assert m.allreduce(jnp.float32(1), m.SUM)[0] == 2
    for _ in range(2):
        try:
            from mpi4py import MPI
        except ImportError as error:
            print("Open MPI" in str(error) and "MPICH" in str(error) or error)
    assert m.allreduce(jnp.float32(1), m.SUM)[0] == 2
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_mpi4py_of_the_other_mpi_is_refused_after_the_start(mpi: str) -> None:
    other = "mpich" if mpi == "openmpi" else "openmpi"
    result = job(mpi, BEFORE, MPI4PY_MPIABI=other)
    assert result.returncode == 0 and twice("TrueTrue", result), result


#: What a program that asks for any MPI gets on Debian.
LIBMPI = Path("/usr/lib/x86_64-linux-gnu/libmpi.so")


def test_mpi4py_that_took_the_other_mpi_before_us_is_refused() -> None:
    """Without the start-up file it opens Debian's `libmpi.so`, which is Open MPI."""
    if not LIBMPI.resolve().name.startswith("libmpi.so.40"):
        pytest.skip(f"{LIBMPI} is not Open MPI")
    code = "from mpi4py import MPI; import jax; jax.devices()"
    result = job("mpich", code, MPI_CUDA_STARTUP="0")
    assert result.returncode not in (0, -11, 139), result
    assert "is one of 2 by its launcher (a PMI launcher" in result.stderr, result.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_handles_of_another_mpi_are_refused(mpi: str) -> None:
    """Where the module was imported past the check, as without our start-up file."""
    code = """if True:
        import types, jax, jax.numpy as jnp, mpi_cuda as m
        from mpi4py import MPI
        from mpi_cuda import _arguments
        version = MPI.Get_library_version()
        other = "MPICH Version: 4" if "Open MPI" in version else "Open MPI v4"
        class Other:
            def __getattr__(self, name):
                return getattr(MPI, name)
            Get_library_version = staticmethod(lambda: other)
            __file__ = "/some/where/MPI.so"
        import sys
        sys.modules["mpi4py.MPI"] = Other()
        try:
            m.barrier(comm=MPI.COMM_WORLD)
        except RuntimeError as error:
            print("Open MPI" in str(error) and "MPICH" in str(error) or error)
    """
    result = job(mpi, code)
    assert result.returncode == 0 and twice("True", result), result


@pytest.mark.parametrize("first", ["from mpi4py import MPI", "pass"])
def test_tasks_without_process_management_are_refused(first: str) -> None:
    """What `srun --mpi=none -n 2` sets; `tests/slurm/run` tries it with Slurm itself."""
    code = f"{first}\nimport jax\njax.devices()"
    slurm = {"SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_NODELIST": "n0"}
    result = job(None, code, **slurm, SLURM_STEP_NUM_TASKS="2", SLURM_JOB_ID="1")
    assert result.returncode != 0
    assert "srun --mpi=pmix" in result.stderr and "--mpi=pmi2" in result.stderr, result.stderr
    result = job(None, code, **slurm, SLURM_STEP_NUM_TASKS="1", SLURM_JOB_ID="1")
    assert result.returncode == 0, result.stderr


@on_one("openmpi")
def test_joining_with_mpi4py_imports_no_jax(mpi: str) -> None:
    """The program may still set variables that JAX reads when it is imported."""
    code = """if True:
        import sys
        from mpi4py import MPI
        print("mpi_cuda._library" in sys.modules, "jax" in sys.modules)
    """
    result = job(mpi, code)
    assert result.returncode == 0 and twice("True False", result), result
