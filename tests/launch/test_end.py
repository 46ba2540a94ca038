"""How jobs end: by an exception, by an exit, and with work that nobody waits for."""

from __future__ import annotations

import re
import time

import pytest
from jobs import MPIS, in_turn, job, on_one, twice

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


@pytest.mark.parametrize(
    ("mpi", "ending", "said"),
    in_turn(
        ("raise", "ValueError: boom"),
        ("hook", "my own hook"),
        ("sys.exit", ""),
        ("SystemExit", "boom"),
        ("interrupt", "KeyboardInterrupt"),
    ),
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


@on_one("openmpi")
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
    """The limit is 2 s; a busy test machine gets twice that."""
    result = job(mpi, RAISING)
    raised = re.search(r"raised at ([\d.]+)", result.stderr)
    assert raised and result.returncode != 0, result.stderr
    assert time.time() - float(raised[1]) < 4


NOT_WAITED = """if True:
    import jax, jax.numpy as jnp, mpi_cuda as m
    x = jnp.arange(1 << 20, dtype=jnp.float32)
    m.iallreduce(x[:2], m.SUM)
    if m.COMM_WORLD.rank == 0:
        m.isend(x, 1, tag=1)
        m.irecv(x, 1, tag=2)
    else:
        print(float(m.recv(x, 0, tag=1)[0][-1]))
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_what_nobody_waits_for(mpi: str) -> None:
    """What was sent arrives; a receive and a collective are named."""
    result = job(mpi, NOT_WAITED)
    assert result.returncode == 0 and result.stdout == "1048575.0\n", result.stderr
    said = "rank 0: mpi_cuda: irecv of float32 from rank 1 with tag 2 was never waited for"
    assert said in result.stderr, result.stderr
    for rank in range(2):
        said = f"rank {rank}: mpi_cuda: iallreduce of float32[2] with SUM was never waited for"
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


@pytest.mark.parametrize(
    ("mpi", "ending"), in_turn("sys.exit(3)", "raise SystemExit(3)", "exit(3 + 256)")
)
def test_the_status_of_the_job_is_that_of_the_exit(mpi: str, ending: str) -> None:
    code = f"""if True:
        import sys, jax.numpy as jnp, mpi_cuda as m
        m.allreduce(jnp.ones(3), m.SUM)[0].block_until_ready()
        if m.COMM_WORLD.rank == 0:
            {ending}
        m.recv(jnp.ones(3), 0)[0].block_until_ready()
    """
    result = job(mpi, code)
    assert result.returncode == 3, result


@pytest.mark.parametrize(
    ("mpi", "last"),
    in_turn(
        "sys.stdout = None",
        "sys.stdout = sys.stderr = None",
        "sys.stdout.close()",
        "sys.stderr.close()",
    ),
)
def test_a_good_job_ends_well_whatever_its_streams_are(mpi: str, last: str) -> None:
    code = f"""if True:
        import sys, jax.numpy as jnp, mpi_cuda as m
        assert m.allreduce(jnp.float32(1), m.SUM)[0] == 2
        print("fine")
        sys.stdout.flush()
        {last}
    """
    result = job(mpi, code)
    assert result.returncode == 0 and twice("fine", result), result


FORKED = """if True:
    import logging, os, sys, jax, jax.numpy as jnp, mpi_cuda as m
    x = m.allreduce(jnp.ones(1000), m.SUM)[0].block_until_ready()
    native = jax.jit(lambda x: x @ x)(x).block_until_ready()
    child = os.fork()
    if child == 0:
        print("child", flush=False)
        ending = sys.argv[1]
        if ending == "exit":
            sys.exit(7)
        if ending == "message":
            sys.exit("a message")
        if ending == "raise":
            raise ValueError("in the child")
        if ending == "release":
            del x, native
            import gc
            gc.collect()
    else:
        wanted = {"exit": 7, "message": 1, "raise": 1}.get(sys.argv[1], 0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == wanted, status
        assert m.allreduce(jnp.float32(1), m.SUM)[0] == 2
"""


@pytest.mark.parametrize(("mpi", "ending"), in_turn("exit", "message", "raise", "release", "end"))
def test_a_forked_child_leaves_with_its_own_status(mpi: str, ending: str) -> None:
    result = job(mpi, FORKED, ending, limit=30)
    assert result.returncode == 0 and twice("child", result), result
    if ending == "raise":
        assert result.stderr.count("ValueError: in the child") == 2, result.stderr


@pytest.mark.parametrize(
    ("mpi", "mistake"), in_turn("dest=np.int64(1 << 40)", "missing", "tag=np.int64(-7)")
)
def test_an_error_before_the_operation_that_nobody_reads(mpi: str, mistake: str) -> None:
    """As a program without our Python functions may have it."""
    if mistake == "missing":
        call = 'jax.ffi.ffi_call("mpi_cuda_allreduce", (), has_side_effect=True)(x)'
    else:
        result = "jax.ShapeDtypeStruct((), jnp.int32)"
        call = f'jax.ffi.ffi_call("mpi_cuda_send", {result}, has_side_effect=True)(x, {mistake})'
    code = f"""if True:
        import jax, jax.numpy as jnp, numpy as np, mpi_cuda as m
        m.allreduce(jnp.ones(3), m.SUM)[0].block_until_ready()
        jax.jit(lambda x: [{call}, x][1] + 1)(jnp.ones(3))
    """
    result = job(mpi, code)
    assert result.returncode == 1 and "mpi_cuda" in result.stderr, result


NOT_RECEIVED = """if True:
    import jax, jax.numpy as jnp, mpi_cuda as m
    rank = m.COMM_WORLD.rank
    if rank == 0:
        m.send(jnp.ones(1 << 20), 1, tag=5)
    else:
        import time
        time.sleep(2)
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_a_rank_at_its_end_does_not_wait_for_ever(mpi: str) -> None:
    result = job(mpi, NOT_RECEIVED, MPI_CUDA_EXIT_TIMEOUT="1")
    assert result.returncode == 1, result
    assert "rank 0 has come to its end and has waited longer than 1 s" in result.stderr
    assert "in send of float32[1048576] to rank 1 with tag 5" in result.stderr, result.stderr


NOT_RECEIVED_EITHER = """if True:
    import sys, time, jax, jax.numpy as jnp, mpi_cuda as m
    if m.COMM_WORLD.rank == 0:
        send = jax.jit(lambda x: [m.isend(x, 1, tag=tag)[0].number for tag in range(12)])
        jax.block_until_ready(send(jnp.ones(1 << 20)))
        print(time.time(), flush=True)
    else:
        time.sleep(30)
"""


@pytest.mark.parametrize(("mpi", "device"), in_turn("", "1"))
def test_messages_that_nobody_receives_have_one_limit(mpi: str, device: str) -> None:
    """Not one after the other: that would be 12 s."""
    variables = {"MPI_CUDA_PRETEND_DEVICE": device} if device else {}
    result = job(mpi, NOT_RECEIVED_EITHER, MPI_CUDA_EXIT_TIMEOUT="1", **variables)
    took = time.time() - float(result.stdout)
    assert result.returncode == 1 and 1 <= took < 5, (took, result)
    assert "rank 0 has come to its end and has waited longer than 1 s" in result.stderr
    for tag in range(8):
        assert f"isend of float32[1048576] to rank 1 with tag {tag} on" in result.stderr
    assert "; and in 4 more: the job ends" in result.stderr, result.stderr


STUCK = """if True:
    import atexit, os, sys, time
    if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
        # Exit handlers run in reverse order: this one after the end of our part.
        atexit.register(time.sleep, 60)
        from mpi4py import MPI
    import jax.numpy as jnp, mpi_cuda as m
    print(m.allreduce(jnp.ones(1), m.SUM)[0][0])
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_a_rank_that_waits_in_finalize_though_all_have_ended_says_so(mpi: str) -> None:
    # Long enough for the start, which it limits too.
    result = job(mpi, STUCK, MPI_CUDA_WARN_AFTER="1", MPI_CUDA_ABORT_AFTER="8")
    assert result.returncode != 0 and result.stdout.split() == ["2.0"] * 2, result
    waits = "rank 0 has waited in MPI_Finalize for {} s, though the programs of all ranks have"
    for said in (waits.format("[12]"), waits.format("([89]|1.)") + ".*: the job ends"):
        assert re.search(said, result.stderr), result.stderr


@on_one("openmpi")
def test_a_rank_with_nothing_left_to_do_waits_for_the_others(mpi: str) -> None:
    code = """if True:
        import time, jax.numpy as jnp, mpi_cuda as m
        m.allreduce(jnp.ones(3), m.SUM)[0].block_until_ready()
        if m.COMM_WORLD.rank == 0:
            time.sleep(4)
            print("worked")
    """
    result = job(mpi, code, MPI_CUDA_EXIT_TIMEOUT="1")
    assert result.returncode == 0 and result.stdout == "worked\n", result


STOPPED = """if True:
    import os, signal, time, jax, jax.numpy as jnp, mpi_cuda as m
    from mpi_cuda import notoken as nt
    m.stop_on(signal.SIGTERM, signal.SIGUSR2)
    rank, half = m.COMM_WORLD.rank, jax.jit(lambda x: nt.allreduce(x, m.SUM) / 2)
    x = jnp.float32(1)
    for step in range(1000):
        x = half(x)
        if step == 20 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if m.stop_requested():
            break
    assert m.stop_requested() and x == 1
    print(step)
"""


@on_one("mpich")
def test_all_ranks_stop_in_the_same_step(mpi: str) -> None:
    result = job(mpi, STOPPED)
    assert result.returncode == 0, result
    assert twice("20", result) or twice("21", result), result


def test_asking_inside_a_program_is_refused() -> None:
    code = """if True:
        import jax, jax.numpy as jnp, mpi_cuda as m
        try:
            jax.jit(lambda x: x + m.stop_requested())(jnp.ones(3))
        except RuntimeError as error:
            print("outside of jax.jit" in str(error) or error)
    """
    assert twice("True", job("openmpi", code))


EARLY = """if True:
    import os, sys
    if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
        raise RuntimeError("before JAX")
    import jax
    jax.devices()
"""


@pytest.mark.parametrize("mpi", MPIS)
def test_a_rank_that_fails_before_mpi_has_begun_ends_the_job(mpi: str) -> None:
    result = job(mpi, EARLY, limit=30)
    assert result.returncode == 1 and "RuntimeError: before JAX" in result.stderr, result.stderr


def test_a_child_of_a_rank_that_fails_does_not_end_the_job() -> None:
    code = """if True:
        import subprocess, sys
        for options in ({}, {"close_fds": False}):
            child = subprocess.run([sys.executable, "-c", "1 / 0"], **options)
            assert child.returncode == 1
        import jax
        print(len(jax.devices()), "devices")
    """
    result = job("mpich", code)
    assert result.returncode == 0 and twice("2 devices", result), result.stderr
