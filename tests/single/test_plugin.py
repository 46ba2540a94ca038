"""The plugin in a process of its own: when it is selected, its settings, its worlds."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MPI_CUDA", "JAX"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_installed_but_not_selected_changes_nothing() -> None:
    result = run(
        "import jax; print(jax.devices(), jax.default_backend()); "
        "print('mpi' in open('/proc/self/maps').read()); import sys; "
        "print([name for name in sys.modules if name.startswith('mpi_cuda.')])",
        JAX_PLATFORMS="cpu",
    )
    assert result.stdout == "[CpuDevice(id=0)] cpu\nFalse\n[]\n" and result.stderr == ""
    result = run("import jax; print(jax.devices()[0].client.platform_version)")
    assert "MPI ranks" not in result.stdout and result.returncode == 0


def test_selected_prints_nothing() -> None:
    code = "import jax; f = jax.jit(lambda x: x @ x.T + 1); f(jax.numpy.ones((9, 9)))"
    result = run(code, JAX_PLATFORMS="mpi_cuda")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_too_few_threads_are_said_in_words() -> None:
    """A limit of addresses, which holds for root too: a thread needs some for its stack."""
    code = """if True:
        import resource, jax, mpi_cuda
        mpi_cuda.COMM_WORLD
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (40 << 20),) * 2)
        jax.devices()
    """
    result = run(code, JAX_PLATFORMS="mpi_cuda", NPROC="2")
    assert result.returncode == 1, result
    needs = r"XLA's client needs 16 threads for 2 core\(s\), .* \(ulimit -v\) \d{9,}\. Have the one"
    assert re.search(needs, result.stderr), result.stderr


def test_both_platforms() -> None:
    code = """if True:
        import jax, jax.numpy as jnp, numpy as np
        ours, cpu = jax.devices()[0], jax.devices("cpu")[0]
        assert "MPI ranks" in ours.client.platform_version
        assert "MPI ranks" not in cpu.client.platform_version
        for device in (ours, cpu):
            x = jax.device_put(np.eye(3, dtype=np.float32), device)
            print(float(jnp.linalg.eigh(x)[0].sum()))
            print(jax.pure_callback(lambda x: x + 1, jax.ShapeDtypeStruct((), x.dtype), x[0, 0]))
    """
    result = run(code, JAX_PLATFORMS="mpi_cuda,cpu")
    assert result.stdout == "3.0\n2.0\n3.0\n2.0\n", result.stderr


def test_backends_of_others_need_not_be_like_ours() -> None:
    code = """if True:
        import jax, jax._src.xla_bridge as bridge
        class Other:
            platform = "other"
            def device_count(self): return 1
            def process_index(self): return 0
            def devices(self): return ["one"]
            local_devices = devices
        bridge.register_backend_factory("other", Other, priority=1)
        jax.config.update("jax_platforms", "other,mpi_cuda")
        print(type(bridge.get_backend("other")).__name__, len(jax.devices("cpu")))
    """
    result = run(code, JAX_PLATFORMS="mpi_cuda")
    assert result.stdout == "Other 1\n", result.stderr


def test_log_info_says_what_was_found() -> None:
    result = run("import jax; jax.devices()", JAX_PLATFORMS="mpi_cuda", MPI_CUDA_LOG="info")
    for text in ("rank 0 of 1", "device cpu", "PJRT 0.", "Open MPI", "multiple"):
        assert text in result.stderr, result.stderr


def test_an_inner_plugin_is_chosen_by_its_wheel() -> None:
    code = "import jax; jax.devices()"
    logged = {"JAX_PLATFORMS": "mpi_cuda", "MPI_CUDA_LOG": "info"}
    files = {
        "lammps-jax-pjrt-cpu": "lammps_jax_pjrt_cpu/pjrt_c_api_cpu_plugin.so",
        "xla-cpu-pjrt": "xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so",
    }
    for wheel, file in files.items():
        result = run(code, MPI_CUDA_INNER_PLUGIN=wheel, **logged)
        assert f"{file} (PJRT" in result.stderr and result.returncode == 0, result.stderr
    assert files["lammps-jax-pjrt-cpu"] in run(code, **logged).stderr
    # One for devices that are not there, or not asked for, is not replaced by another.
    absent = run(code, MPI_CUDA_INNER_PLUGIN="xla-cuda12-pjrt", **logged)
    assert "MPI_CUDA_INNER_PLUGIN=xla-cuda12-pjrt, but " in absent.stderr, absent.stderr
    other = run(code, MPI_CUDA_INNER_PLUGIN="xla-cpu-pjrt", MPI_CUDA_DEVICE="cuda", **logged)
    assert "MPI_CUDA_DEVICE says Cuda: leave out one" in other.stderr, other.stderr


def test_without_any_mpi(tmp_path) -> None:
    """No shim that loads: a world of size 1, in which collectives work."""
    code = """if True:
        import shutil, sys, mpi_cuda._library as library
        from pathlib import Path
        folder = Path(FOLDER)
        shutil.copy(library.LIBRARY, folder)
        library.LIBRARY = folder / library.LIBRARY.name
        import jax, jax.numpy as jnp, mpi_cuda as m
        print(m.allreduce(jnp.ones(2), m.SUM)[0], jax.process_count())
        print(m.sendrecv(jnp.ones(2), jnp.ones(2), m.PROC_NULL, m.PROC_NULL)[0])
        coming, _ = m.irecv(jnp.ones(2), m.PROC_NULL)
        print(m.wait(m.isend(jnp.ones(2), m.PROC_NULL)[0])[0], m.wait(coming)[0])
        started = [m.iallgather(jnp.ones(2))[0], m.iexscan(jnp.ones(2), m.PROD)[0], m.ibarrier()[0]]
        print([m.wait(request)[0] for request in reversed(started)])
        try:
            m.send(jnp.ones(2), 0).block_until_ready()
        except Exception as error:
            print("needs an MPI" in str(error))
    """.replace("FOLDER", repr(str(tmp_path)))
    result = run(code, JAX_PLATFORMS="mpi_cuda", MPI_CUDA_LOG="info")
    left = "[None, Array([1., 1.], dtype=float32), Array([[1., 1.]], dtype=float32)]\nTrue\n"
    assert result.stdout == "[1. 1.] 1\n[0. 0.]\nNone [0. 0.]\n" + left, result.stderr
    assert "MPI no MPI" in result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MPI_CUDA_TOPOLOGY", "flat", "it takes: global, local"),
        ("MPI_CUDA_WARN_AFTER", "soon", "it takes: 60, seconds"),
        ("MPI_CUDA_INNER_PLUGIN", "/nowhere.so", "is not a file"),
        ("MPI_CUDA_DEVICE", "cuda", "MPI_CUDA_DEVICE=cuda, but"),
        ("XLA_FLAGS", "--xla_no_such_flag=1", "xla_no_such_flag"),
        ("MPI_CUDA_PART_BYTES", "63", "it takes: 1073741824, bytes from 64"),
        ("MPI_CUDA_PRETEND_SIZE", "0", "it takes: ranks"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(variable, value, expected) -> None:
    result = run("import jax; jax.devices()", JAX_PLATFORMS="mpi_cuda", **{variable: value})
    assert result.returncode == 1
    assert expected in result.stderr, result.stderr
    assert variable in result.stderr


def test_known_xla_flags_pass() -> None:
    result = run(
        "import jax; print(jax.numpy.ones(2) + 1)",
        JAX_PLATFORMS="mpi_cuda",
        XLA_FLAGS="--xla_cpu_enable_fast_math=false",
    )
    assert result.returncode == 0, result.stderr


WORLD = """if True:
    import sys, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    def state():
        rows = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
        return int(rows["Threads"]), int(rows["VmRSS"].split()[0]) // 1024
    devices, (threads, mebibytes) = jax.devices(), state()
    numbers = list(range(len(devices)))
    assert [d.id for d in devices] == [d.process_index for d in devices] == numbers
    assert "7" in str(devices[7]) and jax.local_devices() == devices[:1]
    assert float(jax.jit(lambda x: x + 1)(1.0)) == 2
    spread = NamedSharding(Mesh(np.array(devices), "x"), PartitionSpec("x"))
    array = jax.ShapeDtypeStruct((len(devices), 3), jnp.float32, sharding=spread)
    summed = jax.jit(lambda x: x.sum(0)).lower(array).compile().as_text()
    assert "all-reduce" in summed and f"num_partitions={len(devices)}" in summed
    print(len(devices), threads, state()[0], mebibytes)
"""


def test_devices_of_other_ranks_cost_nothing() -> None:
    states = []
    for size in (8, 8192):
        result = run(WORLD, JAX_PLATFORMS="mpi_cuda", MPI_CUDA_PRETEND_SIZE=str(size))
        assert result.returncode == 0, result.stderr
        states.append([int(number) for number in result.stdout.split()])
    few, many = states
    assert (few[0], many[0]) == (8, 8192)
    # One device has as many threads in any world, before and after it compiles for all.
    assert many[1] <= few[1] + 1 and many[2] <= few[2] + 1, states
    assert many[3] < few[3] + 64, states


def test_a_plugin_that_cannot_partition_for_a_large_world_says_so() -> None:
    names = {"MPI_CUDA_PRETEND_SIZE": "1025", "MPI_CUDA_INNER_PLUGIN": "xla-cpu-pjrt"}
    result = run(WORLD, JAX_PLATFORMS="mpi_cuda", **names)
    assert "at most 1024 devices, and this world has 1025" in result.stderr, result.stderr


LARGE = """if True:
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    spread = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    array = jax.ShapeDtypeStruct((len(jax.devices()), 3, 3), jnp.float32, sharding=spread)
    print("all-gather" in jax.jit(jnp.linalg.cholesky).lower(array).compile().as_text())
    def inspected(x):
        jax.debug.inspect_array_sharding(x, callback=print)
        return x
    jax.jit(inspected).lower(array).compile()
"""


def test_what_jax_partitions_itself_has_a_limit_and_says_so() -> None:
    """Above it every device computes a whole batch, and what nobody else can do is refused."""
    names = {"MPI_CUDA_PRETEND_SIZE": "1025", "MPI_CUDA_INNER_PLUGIN": "lammps-jax-pjrt-cpu"}
    result = run(LARGE, JAX_PLATFORMS="mpi_cuda", **names)
    assert result.stdout.split() == ["True"], result.stderr
    words = "InspectSharding is partitioned by the XLA of the framework, which failed: the program"
    assert f"{words} is for 1025 devices, and that XLA has threads for each" in result.stderr


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.8.3", "ImportError: mpi_cuda needs JAX 0.9.0 or newer, and this is JAX 0.8.3"),
        ("99.0.0", "mpi_cuda: JAX 99.0.0 is newer than"),
    ],
)
def test_another_jax_than_those_tested_is_said(version: str, words: str) -> None:
    result = run(
        f"import jax; jax.__version__ = {version!r}; import mpi_cuda; jax.devices()",
        JAX_PLATFORMS="mpi_cuda",
    )
    assert result.stderr.count(words) == 1, result.stderr


def test_a_jax_that_has_changed_inside_is_said_to_be_it() -> None:
    code = """if True:
        import jax
        from jax._src import {module}
        jax.__version__ = "99.0.0"
        del {module}.{name}
        import mpi_cuda
        jax.devices()
    """
    for module, name in (("core", "Primitive"), ("xla_bridge", "register_plugin")):
        result = run(code.format(module=module, name=name), JAX_PLATFORMS="mpi_cuda")
        assert "ImportError: mpi_cuda cannot work with JAX 99.0.0" in result.stderr, result.stderr
        assert f"has no attribute '{name}'" in result.stderr, result.stderr
