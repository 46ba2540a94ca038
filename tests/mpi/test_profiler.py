"""Profiles of `jax.profiler` have events of ours for each operation and each collective."""

from __future__ import annotations

import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import _library
from mpi_cuda import notoken as nt

sys.path.insert(0, str(next(p for p in Path(__file__).parents if p.name == "tests")))
from profiles import Event, events, named, only, ours, trace_of

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
LEFT, RIGHT = (RANK - 1) % SIZE, (RANK + 1) % SIZE
EVERYBODY = "0" if SIZE == 1 else f"0-{SIZE - 1}"

needs_two = pytest.mark.skipif(SIZE < 2, reason="another rank is waited for")
needs_one_node = pytest.mark.skipif(
    bool(_library.load().mpi_cuda_several_nodes()), reason="only ranks of a node see each other"
)


@jax.jit
def step(x: jax.Array) -> jax.Array:
    total = nt.allreduce(x, m.SUM)
    return nt.sendrecv(total, total, LEFT, RIGHT, sendtag=4, recvtag=4)


def quiet() -> jax.profiler.ProfileOptions:
    """Without Python's own functions, which fill a profile."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


def taken(folder: Path) -> list[Event]:
    return events(only(folder, "*.xplane.pb"))


def test_an_operation_says_what_it_is(tmp_path: Path) -> None:
    x = jnp.ones((10, 7))
    step(x).block_until_ready()
    with jax.profiler.trace(tmp_path, profiler_options=quiet()):
        with jax.profiler.TraceAnnotation("interval"):
            step(x).block_until_ready()
    found = taken(tmp_path)
    (interval,) = named(found, "interval")
    (reduced,), (exchanged,) = (named(found, f"mpi_cuda.{k}") for k in ("allreduce", "sendrecv"))
    assert interval.has(reduced) and interval.has(exchanged)
    assert reduced.end <= exchanged.start
    for one in (reduced, exchanged):
        assert one.line == f"MPI rank {RANK}: the default communicator"
        told = {name: one.stats[name] for name in ("bytes", "count", "dtype", "program", "ranks")}
        assert told == {
            "bytes": 280,
            "count": 70,
            "dtype": "float32",
            "program": "jit_step",
            "ranks": EVERYBODY,
        }
        assert (one.stats["rank"], one.stats["size"]) == (RANK, SIZE)
        assert one.stats["launch"] == reduced.stats["launch"] > 0
    assert reduced.stats["reduction"] == "SUM"
    peers = {name: exchanged.stats[name] for name in ("dest", "source", "send_tag", "recv_tag")}
    assert peers == {"dest": str(RIGHT), "source": str(LEFT), "send_tag": 4, "recv_tag": "4"}
    # What the viewers of traces read has them too.
    shown = {e["name"]: e for e in trace_of(only(tmp_path, "*.trace.json.gz")) if "name" in e}
    event = shown["mpi_cuda.allreduce"]
    assert abs(event["ts"] * 1000 - reduced.start) < 1000
    assert abs(event["dur"] * 1000 - reduced.length) < 1000
    assert event["args"]["bytes"] == "280"
    assert event["pid"] == shown["interval"]["pid"]


def test_a_wait_says_which_collective_it_ends(tmp_path: Path) -> None:
    program = jax.jit(lambda x: nt.wait(nt.ibcast(x, 0)))
    program(jnp.ones(3)).block_until_ready()
    with jax.profiler.trace(tmp_path, profiler_options=quiet()):
        program(jnp.ones(3)).block_until_ready()
    found = taken(tmp_path)
    (start,), (wait,) = named(found, "mpi_cuda.ibcast"), named(found, "mpi_cuda.wait")
    assert (start.stats["bytes"], start.stats["root"]) == (12, 0)
    assert (wait.stats["ends"], wait.stats["result_bytes"]) == ("ibcast", 12)
    assert start.end <= wait.start


@needs_two
def test_a_collective_of_a_sharded_program_says_what_it_is(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(SIZE), "i")
    x = jax.make_array_from_callback(
        (4 * SIZE,), NamedSharding(mesh, P("i")), lambda _: np.ones(4, np.float32)
    )

    def program(part: jax.Array) -> jax.Array:
        total = lax.psum(part, "i")
        every = lax.all_gather(total, "i")
        return lax.ppermute(every.sum(0), "i", [(k, (k + 1) % SIZE) for k in range(SIZE)])

    run = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=P("i"), out_specs=P("i")))
    run(x).block_until_ready()
    with jax.profiler.trace(tmp_path, profiler_options=quiet()):
        run(x).block_until_ready()
    found = taken(tmp_path)
    (begin,) = named(found, "xla.begin")
    assert "all-reduce f32[4] SUM" in begin.stats["collectives"]
    assert begin.stats["program"] == "jit_program"
    (reduced,) = named(found, "xla.all-reduce")
    assert (reduced.stats["bytes"], reduced.stats["reduction"]) == (16, "SUM")
    (gathered,) = named(found, "xla.all-gather")
    assert (gathered.stats["bytes"], gathered.stats["result_bytes"]) == (16, 16 * SIZE)
    for one in (reduced, gathered):
        assert one.stats["ranks"] == EVERYBODY
        assert one.stats["launch"] == begin.stats["launch"]
    (permuted,) = named(found, "xla.collective-permute")
    assert (permuted.stats["dest"], permuted.stats["source"]) == (str(RIGHT), str(LEFT))
    assert begin.end <= reduced.start <= gathered.start <= permuted.start


@needs_two
@needs_one_node
def test_waiting_is_apart_from_moving(tmp_path: Path) -> None:
    """Rank 1 comes late by 0.5 s; what the others wait is no part of what moves their data."""
    x = jnp.ones(5000)
    mean = jax.jit(lambda x: nt.allreduce(x, m.SUM) / SIZE)
    mean(x).block_until_ready()
    with jax.profiler.trace(tmp_path, profiler_options=quiet()):
        # Once the profile of every rank has begun, which takes its time.
        MPI.COMM_WORLD.Barrier()
        if RANK == 1:
            time.sleep(0.5)
        mean(x).block_until_ready()
    found = ours(taken(tmp_path))
    (reduced,) = named(found, "mpi_cuda.allreduce")
    within = [one for one in found if one is not reduced and reduced.has(one)]
    waits, moves = (named(within, name) for name in ("waiting", "moving"))
    assert len(within) == len(waits) + len(moves) and len(moves) == 1
    assert all(wait.end <= moves[0].start for wait in waits)
    waited = sum(wait.length for wait in waits)
    assert abs(waited - reduced.stats["waiting_ns"]) < 1000
    if RANK == 1:
        assert waited < 250e6
    else:
        assert 250e6 < waited < reduced.length
    assert moves[0].length < 250e6


@needs_two
def test_a_message_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    """Rank 0 sends late by 0.5 s: what the receiver, and who exchanges with it, waits is no part of
    what moves the data."""
    x = jnp.ones(50_000)
    receive = jax.jit(lambda x: nt.recv(x, 0, tag=3))
    later = jax.jit(lambda x: nt.wait(nt.irecv(x, 0, tag=4)))
    exchange = jax.jit(lambda x, peer: nt.sendrecv(x, x, peer, peer), static_argnums=1)
    if RANK < 2:
        exchange(x, 1 - RANK).block_until_ready()
    with jax.profiler.trace(tmp_path, profiler_options=quiet()):
        MPI.COMM_WORLD.Barrier()
        if RANK == 0:
            time.sleep(0.5)
            nt.send(x, 1, tag=3)
            jax.effects_barrier()
            time.sleep(0.5)
            nt.send(x, 1, tag=4)
            jax.effects_barrier()
            time.sleep(0.5)
            exchange(x, 1).block_until_ready()
        elif RANK == 1:
            np.testing.assert_array_equal(receive(x), x)
            np.testing.assert_array_equal(later(x), x)
            np.testing.assert_array_equal(exchange(x, 0), x)
    if RANK != 1:
        return
    found = ours(taken(tmp_path))
    for name in ("mpi_cuda.recv", "mpi_cuda.wait", "mpi_cuda.sendrecv"):
        (whole,) = named(found, name)
        within = [one for one in found if one is not whole and whole.has(one)]
        assert [one.name for one in within] == ["waiting", "moving"]
        assert 250e6 < within[0].length == whole.stats["waiting_ns"]
        assert within[1].length < 250e6
        assert whole.stats["source"] == "0"


def test_nothing_is_lost(tmp_path: Path) -> None:
    """More operations than the flight recorder keeps."""

    @jax.jit
    def many(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 3000, lambda _, x: nt.allreduce(x, m.MAX), x)

    many(jnp.ones(2)).block_until_ready()
    with jax.profiler.trace(tmp_path, profiler_options=quiet()):
        many(jnp.ones(2)).block_until_ready()
    found = named(ours(taken(tmp_path)), "mpi_cuda.allreduce")
    places = [one.stats["place"] for one in found]
    assert places == list(range(places[0], places[0] + 3000))
    assert all(one.end <= following.start for one, following in pairwise(found))
    # And after it nothing is kept.
    many(jnp.ones(2)).block_until_ready()
    with jax.profiler.trace(tmp_path / "empty", profiler_options=quiet()):
        pass
    assert ours(taken(tmp_path / "empty")) == []


def test_clocks_agree_with_jaxs(tmp_path: Path) -> None:
    """An operation that is waited for lies within what JAX itself has measured around it."""
    x = jnp.ones(2)
    run = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    run(x).block_until_ready()
    with jax.profiler.trace(tmp_path, profiler_options=quiet()):
        for _ in range(50):
            with jax.profiler.TraceAnnotation("around"):
                run(x).block_until_ready()
    found = taken(tmp_path)
    around = sorted(named(found, "around"), key=lambda one: one.start)
    inside = named(ours(found), "mpi_cuda.allreduce")
    assert len(around) == len(inside) == 50
    assert all(outer.has(one, slack=20e3) for outer, one in zip(around, inside, strict=True))


def test_the_level_of_the_host_turns_it_off(tmp_path: Path) -> None:
    options = quiet()
    options.host_tracer_level = 0
    with jax.profiler.trace(tmp_path, profiler_options=options):
        step(jnp.ones(2)).block_until_ready()
    assert ours(taken(tmp_path)) == []


@needs_two
def test_an_operation_that_has_not_ended_is_there(tmp_path: Path) -> None:
    """A profile may end while operations wait."""
    if RANK > 1:
        return
    with jax.profiler.trace(tmp_path, profiler_options=quiet()):
        if RANK == 0:
            waiting = jax.jit(lambda x: nt.recv(x, 1, tag=9))(jnp.ones(3))
            time.sleep(0.2)
    if RANK == 1:
        MPI.COMM_WORLD.recv(source=0, tag=17)
        nt.send(jnp.ones(3), 0, tag=9)
        jax.effects_barrier()
        return
    MPI.COMM_WORLD.send(None, 1, tag=17)
    waiting.block_until_ready()
    (received,) = named(ours(taken(tmp_path)), "mpi_cuda.recv")
    assert received.stats["ended"] == "not before the profile did"
    assert (received.stats["source"], received.stats["recv_tag"]) == ("1", "9")
    assert received.length > 100e6


@needs_two
def test_ranks_of_a_machine_keep_their_profiles_apart(tmp_path: Path) -> None:
    """Ranks that write into one folder overwrite nothing of each other's."""
    folder = Path(MPI.COMM_WORLD.bcast(str(tmp_path)))
    for number in (1, 2):
        with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=quiet()):
            step(jnp.ones(number)).block_until_ready()
        MPI.COMM_WORLD.Barrier()
        runs = sorted((folder / "plugins/profile").iterdir())
        assert len(runs) == number
        spaces = sorted(runs[-1].glob("*.xplane.pb"))
        assert len(spaces) == SIZE
        found = ours(events(spaces[RANK]))
        (reduced,) = named(found, "mpi_cuda.allreduce")
        assert reduced.line.startswith(f"MPI rank {RANK}: ")
        assert reduced.stats["count"] == number
        for pattern in ("*.trace.json.gz", "*perfetto_trace.json.gz"):
            traces = sorted(runs[-1].glob(pattern))
            assert len(traces) == SIZE, traces
            assert any(e.get("name") == "mpi_cuda.allreduce" for e in trace_of(traces[RANK]))
        assert [name for name in os.listdir(folder) if name.startswith(".")] == []
        MPI.COMM_WORLD.Barrier()
