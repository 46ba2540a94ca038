"""Jobs that would wait for ever end, and say who waits for whom."""

from __future__ import annotations

import re
import subprocess
import textwrap
import time

import pytest
from jobs import MPIS, in_turn, job, on_one, twice

STUCK = 35

BEGIN = """if True:
    import os, signal, sys, threading, time
    import jax, jax.numpy as jnp, mpi_cuda as m
    from mpi_cuda import notoken as nt
    R, S, X = m.COMM_WORLD.rank, m.COMM_WORLD.size, jnp.ones(3)
    nt.allreduce(X, m.SUM).block_until_ready()
"""


def run(
    mpi: str,
    code: str,
    ranks: int = 2,
    nodes: int = 1,
    options: tuple[str, ...] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs that on some ranks, which behave as if they were on several nodes."""
    lines = "".join(f"    {line}\n" for line in code.strip().splitlines())
    if nodes > 1:
        variables["MPI_CUDA_PRETEND_NODES"] = str(nodes)
    return job(mpi, BEGIN + lines, ranks=ranks, options=options, **variables)


@pytest.mark.parametrize(("mpi", "ranks", "nodes"), in_turn((2, 1), (3, 1), (3, 2)))
def test_a_circle_of_receives(mpi: str, ranks: int, nodes: int) -> None:
    result = run(mpi, "nt.recv(X, (R + 1) % S).block_until_ready()", ranks, nodes)
    circle = " waits for ".join(str(rank % ranks) for rank in range(ranks + 1))
    assert result.returncode == STUCK, result.stderr
    assert f"deadlock: {circle}." in result.stderr, result.stderr
    for rank in range(ranks):
        said = f"rank {rank} is waiting in recv into float32[3] from rank {(rank + 1) % ranks}"
        assert said in result.stderr, result.stderr


USERS = """from mpi4py import MPI
dup = MPI.COMM_WORLD.Dup()
nt.allreduce(X, m.SUM, comm=dup).block_until_ready()
"""

PROGRAMS = {
    "a barrier against a receive": (
        "m.barrier() if R == 0 else nt.recv(X, 0).block_until_ready()\njax.effects_barrier()",
        "deadlock: 0 waits for 1 waits for 0",
    ),
    "a wrong tag": (
        "if R == 0: nt.recv(X, 1, tag=3).block_until_ready()\n"
        "if R == 1: nt.send(X, 0, tag=4); nt.recv(X, 0, tag=5).block_until_ready()",
        "deadlock: 0 waits for 1 waits for 0",
    ),
    "a receive from a rank that has ended": (
        "if R == 0: nt.recv(X, 1).block_until_ready()",
        "rank 1 of the world, which this waits for, has ended its program",
    ),
    "a receive from anybody": (
        "if R == 0: nt.recv(X).block_until_ready()",
        "rank 0 waits in vain: rank 1 has ended its program",
    ),
    "a missing collective": (
        "if R == 0: nt.allreduce(X, m.SUM).block_until_ready()",
        "rank 1, which this waits for, has ended its program",
    ),
    "a missing program": (
        "add = jax.jit(lambda x: x.sum())\n"
        "mesh = jax.make_mesh((S,), ('x',))\n"
        "where = jax.NamedSharding(mesh, jax.P('x'))\n"
        "x = jax.make_array_from_callback((S,), where, lambda i: jnp.ones(S)[i])\n"
        "if R == 0: add(x).block_until_ready()",
        "rank 1, which this waits for, has ended its program",
    ),
    "an exception in a thread": (
        "if R == 0: nt.recv(X, 1).block_until_ready()\n"
        "threading.Thread(target=lambda: 1 / 0).start()",
        "rank 1 of the world, which this waits for, has ended its program",
    ),
    "a rank that leaves by os._exit": (
        "if R == 0: nt.allreduce(X, m.SUM).block_until_ready()\ntime.sleep(1)\nos._exit(0)",
        "this rank leaves by os._exit(0) while others wait for it",
    ),
    "a message that nobody receives": (
        "if R == 0: nt.send(jnp.ones(1 << 22), 1)",
        "rank 0 waits in vain: rank 1 has ended its program",
    ),
    "a wait for a message that nobody receives": (
        "if R == 0: nt.wait(nt.isend(jnp.ones(1 << 22), 1)); jax.effects_barrier()",
        "rank 0 waits in vain: rank 1 has ended its program",
    ),
    "messages that nobody receives or waits for": (
        "if R == 0: nt.isend(jnp.ones(1 << 22), 1); nt.isend(jnp.ones(1 << 22), 1)",
        "rank 0 waits in vain: rank 1 has ended its program",
    ),
    "waits for messages that are received only then": (
        "big = jnp.ones(1 << 22)\n"
        "nt.wait(nt.isend(big, 1 - R)); nt.recv(big, 1 - R).block_until_ready()",
        "deadlock: 0 waits for 1 waits for 0",
    ),
    "a start that another rank comes to only after a message": (
        "if R == 0: nt.ibarrier(); nt.send(X, 1)\n"
        "else: nt.recv(X, 0).block_until_ready(); nt.ibarrier()",
        "deadlock: 0 waits for 1 waits for 0",
    ),
    "a receive from anybody of a communicator of the user's": (
        f"{USERS}if R == 0: nt.recv(X, comm=dup).block_until_ready()",
        "rank 0 waits in vain: rank 1 has ended its program",
    ),
    "a long message on a communicator of the user's": (
        f"{USERS}if R == 0: nt.send(jnp.ones(1 << 22), 1, comm=dup); jax.effects_barrier()",
        "rank 0 waits in vain: rank 1 has ended its program",
    ),
    "a long message of one of two threads": (
        "if R == 0:\n"
        "    nap = lambda: time.sleep(30)\n"
        "    threading.Thread(target=nap, daemon=True).start()\n"
        "    nt.send(jnp.ones(1 << 22), 1); jax.effects_barrier()",
        "rank 0 waits in vain: rank 1 has ended its program",
    ),
}


# What is on its way, and how the job ends, is an MPI's own.
BOTH = ("a missing collective", "a rank that leaves by os._exit", "a message that nobody receives")
ENDED = dict.fromkeys(in_turn(*PROGRAMS))
ENDED |= dict.fromkeys((mpi, name) for mpi in MPIS for name in BOTH)


@pytest.mark.parametrize(("mpi", "program"), ENDED)
def test_what_never_ends_is_ended(mpi: str, program: str) -> None:
    code, expected = PROGRAMS[program]
    result = run(mpi, code)
    assert result.returncode != 0 and expected in result.stderr, result.stderr


@pytest.mark.parametrize(("mpi", "nodes"), [("mpich", 1), ("openmpi", 2)])
def test_a_collective_on_a_communicator_of_the_users_without_a_rank(mpi: str, nodes: int) -> None:
    """The rank is so late that the others do not compare with it any more."""
    code = f"""{USERS}
if R == 0: nt.allreduce(X, m.SUM, comm=dup).block_until_ready()
else: time.sleep(12)
"""
    result = run(mpi, code, nodes=nodes)
    assert result.returncode == STUCK, result.stderr
    assert "rank 0 waits in vain: rank 1 has ended its program" in result.stderr, result.stderr


@on_one("mpich")
def test_who_has_done_its_part_of_a_collective_is_not_missed(mpi: str) -> None:
    """Across nodes a rank ends a gather before all have begun it."""
    code = """
if R == 1: time.sleep(7)
nt.gather(X, 0).block_until_ready()
if R == 0: nt.send(X, 2)
if R == 2: nt.recv(X, 0).block_until_ready()
print("fine")
"""
    result = run(mpi, code, ranks=3, nodes=3)
    assert result.returncode == 0 and result.stdout.count("fine") == 3, result.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_messages_in_the_background_are_no_deadlock(mpi: str) -> None:
    code = """
big = jnp.ones(1 << 22)
if R == 0:
    request = nt.isend(big, 1, tag=1)
    nt.recv(X, 1, tag=2).block_until_ready()
    nt.wait(request)
else:
    time.sleep(5)
    nt.recv(big, 0, tag=1).block_until_ready()
    time.sleep(5)
    nt.send(X, 0, tag=2)
jax.effects_barrier()
print("fine")
"""
    result = run(mpi, code, MPI_CUDA_WARN_AFTER="0.5")
    assert result.returncode == 0 and result.stdout.count("fine") == 2, result.stderr


WAITS = {
    "recv": "nt.recv(X, 1).block_until_ready()",
    "allreduce": "nt.allreduce(X, m.SUM).block_until_ready()",
    "send": "nt.send(jnp.ones(1 << 22), 1); jax.effects_barrier()",
    "on another communicator": "nt.recv(X, comm=m.COMM_WORLD).block_until_ready()",
}


@pytest.mark.parametrize(("mpi", "wait"), in_turn(*WAITS))
def test_a_rank_that_finalizes_mpi_is_missed(mpi: str, wait: str) -> None:
    """MPI_Finalize waits for the other ranks, so such a rank lives, and Python does not answer."""
    code = f"""
if R == 0: {WAITS[wait]}
from mpi4py import MPI
MPI.Finalize()
"""
    result = run(mpi, code)
    assert result.returncode != 0, result.stderr
    assert re.search(r"rank 1.* has called MPI_Finalize", result.stderr), result.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_a_rank_that_finalizes_mpi_is_missed_by_other_nodes(mpi: str) -> None:
    """Rank 0 ends the job from within MPI_Finalize."""
    code = """
if R == 1: nt.allreduce(X, m.SUM).block_until_ready()
from mpi4py import MPI
MPI.Finalize()
"""
    result = run(mpi, code, nodes=2)
    assert result.returncode == STUCK, result.stderr
    assert "rank 1 waits in vain: rank 0 has called MPI_Finalize" in result.stderr, result.stderr


@on_one("mpich")
def test_a_rank_whose_main_thread_has_failed_beside_another_thread(mpi: str) -> None:
    code = """
if R == 1:
    threading.Thread(target=lambda: time.sleep(40)).start()
    raise ValueError("beside a thread")
nt.recv(X, 1).block_until_ready()
"""
    start = time.monotonic()
    result = run(mpi, code, MPI_CUDA_WARN_AFTER="3")
    assert result.returncode == 1 and time.monotonic() - start < 30, result.stderr
    words = "main thread has failed with ValueError: beside a thread"
    assert f"rank 1 is in Python: its {words}" in result.stderr, result.stderr
    assert "the main thread of rank 1 has failed with ValueError" in result.stderr, result.stderr


@on_one("openmpi")
def test_a_thread_beside_a_main_thread_that_has_failed_may_end_its_work(mpi: str) -> None:
    code = """
def late():
    time.sleep(3)
    nt.send(X, 0)
    time.sleep(6)
    print("written")
if R == 1:
    threading.Thread(target=late).start()
    raise ValueError("beside a thread")
nt.recv(X, 1).block_until_ready()
time.sleep(20)
"""
    result = run(mpi, code)
    assert result.returncode == 1 and "written" in result.stdout, result


# What is said of those across nodes, where it differs.
ACROSS_NODES = {
    "a receive from a rank that has ended": None,
    "a missing collective": "rank 0 waits in vain: rank 1 has ended its program",
    "a rank that leaves by os._exit": None,
}


@pytest.mark.parametrize(("mpi", "program"), in_turn(*ACROSS_NODES))
def test_what_never_ends_across_nodes_is_ended(mpi: str, program: str) -> None:
    code, expected = PROGRAMS[program]
    result = run(mpi, code, nodes=2)
    expected = ACROSS_NODES[program] or expected
    assert result.returncode != 0 and expected in result.stderr, result.stderr


# Ranks 0 and 1 are on one node, 2 and 3 on another one; one of them waits for one that is killed.
@pytest.mark.parametrize(
    ("mpi", "step"),
    [
        ("openmpi", "nt.bcast(X, 0)"),
        ("mpich", "nt.bcast(X, 0)"),
        ("mpich", "nt.allreduce(X, m.BAND)"),
    ],
)
def test_what_only_one_node_compares_ends_the_job(mpi: str, step: str) -> None:
    """All know an allreduce behind an allreduce, so nobody tells the others of it."""
    code = f"""
for _ in range(3): nt.allreduce(X, m.SUM).block_until_ready()
if R == 0: nt.allreduce(X, m.SUM).block_until_ready()
else: {step}.block_until_ready()
"""
    result = run(mpi, code, nodes=2)
    assert result.returncode == STUCK, result.stderr
    assert "rank 1 compares one with other nodes that rank 0 does not know" in result.stderr
    kind = step[3 : step.index("(")]
    assert f"rank 1 is waiting in {kind} of float32[3]" in result.stderr, result.stderr
    if "BAND" in step:
        assert ", which it refused: there is no BAND of float32" in result.stderr, result.stderr


def test_a_rank_that_has_ended_is_named_to_those_of_its_node() -> None:
    """They do not ask the other nodes first, which nobody of this one would take part in."""
    code = "if R != 1: nt.bcast(X, 0).block_until_ready()"
    result = run("openmpi", code, ranks=3, nodes=2)
    assert result.returncode not in (0, STUCK), result.stderr
    assert "rank 1, which this waits for, has ended its program" in result.stderr, result.stderr


@pytest.mark.parametrize(("killed", "waits"), [(0, 2), (2, 1), (3, 0)])
def test_a_rank_of_another_node_that_is_killed_is_missed(killed: int, waits: int) -> None:
    code = f"""
if R == {killed}:
    time.sleep(0.5)
    # A child has all that its parent had open, and lives longer.
    if os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(10)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Timer(5, os._exit, [1]).start()
if R == {waits}:
    nt.recv(X, {killed}).block_until_ready()
time.sleep(10)
"""
    # Else the launcher ends the job first, which Slurm's does not; and MPI_Abort ends no others.
    goes_on = ("--mca", "orte_enable_recovery", "1")
    result = run("openmpi", code, ranks=4, nodes=2, options=goes_on)
    expected = f"rank {killed}( of the world, which this waits for,)? has died"
    assert re.search(expected, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("name", "call", "length"),
    [
        ("allreduce", "nt.allreduce(y, m.MAX)", 30_000),
        ("bcast", "nt.bcast(y, 0)", 100),
    ],
)
def test_a_rank_that_is_killed_among_collectives_is_missed(
    name: str, call: str, length: int
) -> None:
    """The others wait in memory that they share with it: for what it gives, or to be read by it."""
    code = f"""
X = jnp.ones((3, {length}))
if R == 1: threading.Timer(1, os.kill, [os.getpid(), signal.SIGKILL]).start()
step = jax.jit(lambda x: jax.lax.fori_loop(0, 1 << 28, lambda _, y: {call}, x))
step(X).block_until_ready()
"""
    goes_on = ("--mca", "orte_enable_recovery", "1")
    result = run("openmpi", code, ranks=3, options=goes_on)
    # Whether it is missed in the collective or while the ranks compare the next one.
    missed = f"waiting in {name} of float32.*|{name} of float32.* failed on rank 0.*"
    assert re.search(missed, result.stderr), result.stderr
    died = "rank 0 waits in vain: rank 1 has died|rank 1, which this waits for, has died"
    assert re.search(died, result.stderr), result.stderr


@on_one("mpich")
def test_what_waits_is_reported_with_what_the_others_do(mpi: str) -> None:
    code = """
def busy():
    time.sleep(3)

if R == 0:
    nt.allreduce(X, m.SUM).block_until_ready()
else:
    busy()
    nt.allreduce(X, m.SUM).block_until_ready()
"""
    result = run(mpi, code, MPI_CUDA_WARN_AFTER="1")
    assert result.returncode == 0, result.stderr
    assert "rank 0 is waiting in allreduce of float32[3] with SUM" in result.stderr, result.stderr
    # `python -c` has no file, so its lines are nobody's.
    assert "rank 1 is in Python" in result.stderr, result.stderr
    assert "deadlock" not in result.stderr, result.stderr


@pytest.mark.parametrize(("mpi", "ranks", "nodes"), [("openmpi", 2, 1), ("mpich", 3, 2)])
def test_a_job_may_be_ended_after_a_time(mpi: str, ranks: int, nodes: int) -> None:
    code = "nt.recv(X, 1).block_until_ready() if R == 0 else time.sleep(60)"
    result = run(mpi, code, ranks, nodes, MPI_CUDA_ABORT_AFTER="2")
    assert result.returncode == STUCK, result.stderr
    assert "MPI_CUDA_ABORT_AFTER is 2: the job ends" in result.stderr, result.stderr
    assert "rank 0 is waiting in recv into float32[3] from rank 1" in result.stderr, result.stderr
    others = "rank 1 is in Python" if ranks == 2 else "ranks 1-2 are in Python"
    assert others in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("mpi", "nodes", "limit"), [("openmpi", 1, 1), ("mpich", 1, 6), ("mpich", 2, 6)]
)
def test_a_job_is_ended_at_its_time(mpi: str, nodes: int, limit: int) -> None:
    """The ranks are asked after 2, 3, 5 and 9 seconds whether the job can go on."""
    code = "nt.recv(X, 1).block_until_ready() if R == 0 else time.sleep(60)"
    result = run(mpi, code, nodes=nodes, MPI_CUDA_ABORT_AFTER=str(limit))
    assert result.returncode == STUCK, result.stderr
    assert f"an operation has waited for {limit} s, and MPI_CUDA_ABORT_AFTER" in result.stderr


@pytest.mark.parametrize(("mpi", "nodes"), [("mpich", 1), ("openmpi", 2)])
def test_long_messages_and_slow_ranks_are_no_deadlock(mpi: str, nodes: int) -> None:
    code = """
big = jnp.ones(1 << 26)
for _ in range(3):
    if R == 0:
        nt.send(big, 1)
        nt.recv(X, 1).block_until_ready()
    else:
        nt.recv(big, 0).block_until_ready()
        time.sleep(3)
        nt.send(X, 0)
print("fine")
"""
    result = run(mpi, code, nodes=nodes, MPI_CUDA_WARN_AFTER="0.5")
    assert result.returncode == 0 and result.stdout.count("fine") == 2, result.stderr


@on_one("mpich")
def test_a_thread_that_has_launched_nothing_yet_may_help(mpi: str) -> None:
    code = """
def late():
    time.sleep(6)
    nt.send(X, 0, comm=m.COMM_WORLD).block_until_ready()
if R == 0:
    nt.recv(X, 1, comm=m.COMM_WORLD).block_until_ready()
    nt.send(X, 1)
else:
    thread = threading.Thread(target=late)
    thread.start()
    nt.recv(X, 0).block_until_ready()
    thread.join()
"""
    result = run(mpi, code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("mpi", MPIS)
def test_a_rank_that_waits_to_join_says_so(mpi: str) -> None:
    code = """if True:
        import os, time
        if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
            time.sleep(50)
        import jax
        jax.devices()
    """
    result = job(mpi, code, MPI_CUDA_WARN_AFTER="1", MPI_CUDA_ABORT_AFTER="3")
    assert result.returncode == 35, result.stderr
    said = result.stderr.splitlines()
    waits = [line for line in said if "this rank has waited for 1 s to join the 2 ranks" in line]
    assert len(waits) == 1 and "imports mpi4py" in waits[0], result.stderr
    assert "MPI_CUDA_ABORT_AFTER has passed" in result.stderr


SLOW_REDUCTION = """
from mpi4py import MPI
def add(a, b, _):
    end = time.monotonic() + 5
    while time.monotonic() < end:
        time.sleep(0.05)
    np.frombuffer(b, np.float32)[:] += np.frombuffer(a, np.float32)
import numpy as np
total = nt.reduce(X, MPI.Op.Create(add, commute=True), 0)
if sys.argv[1] == "message":
    total = nt.send(total, 1) if R == 0 else nt.recv(X, 0)
print("done" if R == 0 or total.sum() in (3, 6) else total)
"""


@pytest.mark.parametrize(("mpi", "then"), in_turn("message", "end"))
def test_a_rank_that_computes_a_reduction_of_the_users_is_not_stuck(mpi: str, then: str) -> None:
    """The other one has done its part, and waits for the result, or has ended."""
    code = "".join(f"    {line}\n" for line in SLOW_REDUCTION.strip().splitlines())
    result = job(mpi, BEGIN + code, then)
    assert result.returncode == 0 and twice("done", result), result


@on_one("mpich")
def test_a_rank_that_waits_in_a_reduction_of_the_users_is_stuck(mpi: str) -> None:
    code = """
    from mpi4py import MPI
    add = MPI.Op.Create(lambda a, b, _: None, commute=True)
    (nt.allreduce(X, add) if R == 0 else nt.recv(X, 0)).block_until_ready()
    """
    result = run(mpi, textwrap.dedent(code))
    assert result.returncode == STUCK, result
    assert "deadlock: 0 waits for 1 waits for 0" in result.stderr, result.stderr
