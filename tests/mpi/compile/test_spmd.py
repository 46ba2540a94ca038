"""Programs for several devices: order, first run, mixing with operations, caches, memory."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback, serialize_executable
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mpi_cuda as m
from mpi_cuda import _library
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
MESH = Mesh(np.array(jax.devices()), ("x",))
REPLICATED = P()
RING = [(i, (i + 1) % SIZE) for i in range(SIZE)]


def sharded(length: int = 4 * SIZE, mesh: Mesh = MESH) -> jax.Array:
    """0, 1, 2 and so on, over all ranks."""
    whole = np.arange(length, dtype=np.float32)
    return jax.make_array_from_callback((length,), NamedSharding(mesh, P("x")), whole.__getitem__)


def program(body: Callable[..., Any], outputs: Any = REPLICATED, mesh: Mesh = MESH) -> Any:
    """`body` of every rank's part, jitted."""
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=outputs, check_vma=False)
    return jax.jit(mapped)


def local(x: jax.Array) -> np.ndarray:
    """This rank's part."""
    return np.asarray(x.addressable_data(0))


def test_independent_collectives_have_one_order() -> None:
    """Of different kinds and sizes, so that another order would fail, and more than XLA keeps."""

    def body(x):
        out = []
        for i in range(1, 13):
            part = jnp.tile(x, i)
            out.append(lax.psum(part * i, "x").sum())
            out.append(lax.all_gather(part + i, "x").sum())
            out.append(lax.ppermute(part - i, "x", RING).sum())
        return jnp.stack(out)[None]

    x = sharded()
    whole = np.arange(4.0 * SIZE)
    mine = whole.reshape(SIZE, 4)[(RANK - 1) % SIZE]
    expected = []
    for i in range(1, 13):
        expected += [whole.sum() * i * i, whole.sum() * i + 4 * SIZE * i * i]
        expected += [mine.sum() * i - 4 * i * i]
    run = program(body, P("x"))
    for _ in range(5):
        np.testing.assert_allclose(local(run(x))[0], expected, rtol=1e-5)


def test_programs_in_flight_together_keep_their_order() -> None:
    add = program(lambda x: lax.psum(x, "x"))
    shift = program(lambda x: lax.ppermute(x, "x", RING), P("x"))
    x = sharded()
    sums, shifts = [], [x]
    for _ in range(40):
        sums.append(add(shifts[-1]))
        shifts.append(shift(shifts[-1]))
    total = np.arange(4.0 * SIZE).reshape(SIZE, 4).sum(0)
    for y in sums:
        np.testing.assert_allclose(y, total)
    home = np.arange(4.0 * SIZE).reshape(SIZE, 4)[(RANK - 40) % SIZE]
    np.testing.assert_allclose(local(shifts[-1]), home)


def test_the_chain_goes_through_loops_and_branches() -> None:
    def body(x):
        def step(i, carry):
            x, total = carry
            total += lax.psum(x.sum(), "x")
            x = lax.cond(
                i % 2 == 0,
                lambda x: lax.ppermute(x, "x", RING),
                lambda x: x + lax.pmax(x.max(), "x"),
                x,
            )
            return x, total

        def inner(carry):
            x, k = carry
            return lax.ppermute(x, "x", RING) * 0.5, k + 1

        x, total = lax.fori_loop(0, 5, step, (x, 0.0))
        # The condition communicates too.
        x, k = lax.while_loop(lambda c: lax.psum(c[0].sum(), "x") > 10.0, inner, (x, 0))
        return x, (total + k)[None]

    x = np.arange(4.0 * SIZE, dtype=np.float32).reshape(SIZE, 4)
    total = np.float32(0)
    for i in range(5):
        total += x.sum()
        x = np.roll(x, 1, 0) if i % 2 == 0 else x + x.max()
    count = 0
    while x.sum() > 10:
        x, count = np.roll(x, 1, 0) * np.float32(0.5), count + 1
    got, also = program(body, (P("x"), P("x")))(sharded())
    np.testing.assert_allclose(local(got), x[RANK], rtol=1e-5)
    np.testing.assert_allclose(local(also), [total + count], rtol=1e-5)


def test_operations_and_collectives_share_one_order() -> None:
    """Each waits for the other kind on another rank, so that any other order would hang."""

    def body(x):
        a = nt.allreduce(x, m.SUM)
        b = lax.psum(2 * x, "x")
        c = nt.sendrecv(x, x, source=(RANK - 1) % SIZE, dest=(RANK + 1) % SIZE)
        d = lax.ppermute(x, "x", RING)
        e = nt.allgather(x).sum()
        return a + b, c - d + e - lax.psum(x.sum(), "x")

    both, nothing = program(body, (P("x"), P("x")))(sharded())
    total = np.arange(4.0 * SIZE).reshape(SIZE, 4).sum(0)
    np.testing.assert_allclose(local(both), 3 * total)
    np.testing.assert_allclose(local(nothing), np.zeros(4))


def test_operations_in_automatic_code_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match=r"mpi_cuda\.allreduce .*shard_map"):
        jax.jit(lambda x: nt.allreduce(x, m.SUM))(sharded())


def test_ranks_with_different_programs_hear_of_both() -> None:
    reduce = lax.psum if RANK == 0 else lax.pmax
    with pytest.raises(Exception, match="different programs") as raised:
        program(lambda x: reduce(x[:3], "x"))(sharded()).block_until_ready()
    text = str(raised.value)
    assert "Rank 0: all-reduce f32[3] SUM" in text and "all-reduce f32[3] MAX" in text
    # And the next program runs.
    np.testing.assert_allclose(program(lambda x: lax.pmin(x.min(), "x"))(sharded()), 0)


def test_ranks_with_different_programs_of_known_kinds_hear_of_both() -> None:
    for reduce in (lax.psum, lax.pmax):
        program(lambda x, reduce=reduce: reduce(x[:2], "x"))(sharded()).block_until_ready()
    reduce = lax.psum if RANK == 0 else lax.pmax
    with pytest.raises(Exception, match="different programs") as raised:
        program(lambda x: reduce(x[:2] + 1, "x"))(sharded()).block_until_ready()
    text = str(raised.value)
    assert "Rank 0: all-reduce f32[2] SUM" in text and "all-reduce f32[2] MAX" in text


def test_waiting_for_a_rank_that_still_compiles_costs_nothing() -> None:
    add = program(lambda x: lax.psum(x * 3, "x"))
    x = sharded()
    if RANK == 0:
        time.sleep(1)
    start = time.process_time()
    add(x).block_until_ready()
    if RANK:
        assert time.process_time() - start < 0.7


def test_a_program_of_few_devices_leaves_the_others_alone() -> None:
    devices = np.array(jax.devices()[:2][::-1])
    mesh = Mesh(devices, ("x",))
    if RANK < 2:
        x = jax.make_array_from_callback(
            (4,), NamedSharding(mesh, P("x")), np.arange(4, dtype=np.float32).__getitem__
        )
        for _ in range(3):
            y = program(lambda x: lax.psum(x, "x") + lax.axis_index("x"), P("x"), mesh)(x)
            np.testing.assert_allclose(local(y), np.array([2, 4]) + 1 - RANK)
    np.testing.assert_allclose(program(lambda x: lax.pmax(x.max(), "x"))(sharded()), 4 * SIZE - 1)


def test_groups_of_devices_reduce_apart() -> None:
    if SIZE != 4:
        pytest.skip("needs 4 ranks")
    groups = [[0, 3], [1, 2]]
    y = program(lambda x: lax.psum(x, "x", axis_index_groups=groups), P("x"))(sharded())
    parts = np.arange(16.0).reshape(4, 4)
    np.testing.assert_allclose(
        local(y), parts[0] + parts[3] if RANK in (0, 3) else parts[1] + parts[2]
    )


@pytest.mark.not_on_gpu("XLA:GPU launches on a thread of its own")
def test_a_small_program_runs_on_its_caller() -> None:
    """Only if all ranks are seen to have come, which the scheduler may prevent for a while."""
    add = program(lambda x: lax.psum(x, "x"))
    x = sharded()
    before = int(_library.load().mpi_cuda_launches_on_callers())
    deadline = time.monotonic() + 30
    everywhere = program(lambda x: lax.pmin(x.min(), "x"))
    while time.monotonic() < deadline:
        for _ in range(20):
            add(x).block_until_ready()
        mine = float(int(_library.load().mpi_cuda_launches_on_callers()) > before)
        seen = jax.make_array_from_callback(
            (SIZE,), NamedSharding(MESH, P("x")), lambda _, mine=mine: np.array([mine], np.float32)
        )
        if everywhere(seen) == 1:
            return
    pytest.fail("no launch ran on its caller")


def test_ordered_callbacks_are_in_the_same_order() -> None:
    seen: list[float] = []

    def note(value):
        seen.append(float(value))

    def body(x):
        for i in range(4):
            io_callback(note, None, lax.psum(x.sum() * 0 + i, "x"), ordered=True)
        return lax.psum(x, "x")

    program(body)(sharded()).block_until_ready()
    jax.effects_barrier()
    assert seen == [SIZE * i for i in range(4)]
    seen.clear()

    def unordered(x):
        jax.debug.callback(note, lax.psum(x.sum(), "x"))
        return lax.psum(x, "x")

    program(unordered)(sharded()).block_until_ready()
    jax.effects_barrier()
    assert seen == [4 * SIZE * (4 * SIZE - 1) / 2]


def test_donated_state_stays_in_place() -> None:
    def step(state, x):
        gradient = lax.pmean(x, "x")
        return state - 0.5 * gradient

    mapped = jax.shard_map(step, mesh=MESH, in_specs=(P("x"), P("x")), out_specs=P("x"))
    train = jax.jit(mapped, donate_argnums=0)
    compiled = train.lower(sharded(SIZE << 20), sharded(SIZE << 20)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 4 << 20
    # The first state may be in the memory of numpy's array, which nothing may overwrite.
    state, x = train(sharded(SIZE << 20), sharded(SIZE << 20)), sharded(SIZE << 20)
    place = state.addressable_data(0).unsafe_buffer_pointer()
    for _ in range(30):
        before = state
        state = train(state, x)
        assert before.is_deleted()
    assert state.addressable_data(0).unsafe_buffer_pointer() == place


def test_a_compiled_program_answers_for_all_devices() -> None:
    compiled = program(lambda x: lax.psum(x, "x")).lower(sharded()).compile()
    assert "all-reduce" in compiled.as_text() and "mpi_cuda_" not in compiled.as_text()
    assert compiled.cost_analysis() and compiled.memory_analysis() is not None
    assert compiled.output_shardings.is_fully_replicated
    assert compiled.input_shardings[0][0].is_equivalent_to(NamedSharding(MESH, P("x")), 1)


def test_what_one_rank_serialized_runs_on_another(tmp_path: Path) -> None:
    x = sharded()
    compiled = program(lambda x: (lax.psum(x, "x"), lax.axis_index("x")[None]), (P(), P("x")))
    mine = np.frombuffer(
        pickle.dumps(serialize_executable.serialize(compiled.lower(x).compile())), np.uint8
    )
    length = int(nt.allreduce(jnp.int32(mine.size), m.MAX))
    padded = np.zeros(length, np.uint8)
    padded[: mine.size] = mine
    neighbour = (RANK + 1) % SIZE
    theirs = np.asarray(nt.allgather(jnp.asarray(padded)))[neighbour]
    loaded = serialize_executable.deserialize_and_load(*pickle.loads(theirs.tobytes()))
    total, index = loaded(x)
    np.testing.assert_allclose(total, np.arange(4.0 * SIZE).reshape(SIZE, 4).sum(0))
    assert local(index) == [RANK]


def test_an_entry_of_the_compilation_cache_is_for_every_rank(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Rank 0 writes it; all read it again, as a later job would."""
    folder = Path("out") / f"cache-{os.environ.get('PMI_JOBID', os.getppid())}-{SIZE}"
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    settings = {
        "jax_compilation_cache_dir": str(folder.absolute()),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    try:
        x = sharded()
        for mesh in (MESH, Mesh(np.array(jax.devices())[::-1], ("x",))):
            for _ in range(2):
                add = program(lambda x: lax.psum(x, "x") + lax.axis_index("x"), P("x"), mesh)
                y = add(sharded(mesh=mesh))
                place = list(mesh.devices.flat).index(jax.local_devices()[0])
                total = np.arange(4.0 * SIZE).reshape(SIZE, 4).sum(0)
                np.testing.assert_allclose(local(y), total + place)
                # The entry is complete before anybody looks for it.
                nt.barrier()
                jax.clear_caches()
        assert hits.count("/jax/compilation_cache/cache_hits") >= 2
        del x
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_a_launch_that_executes_no_collective_counts_like_any_other() -> None:
    """Else a later launch would take an old arrival of another rank for its own, and hang."""
    mpi = pytest.importorskip("mpi4py.MPI")

    def body(flag, x):
        return lax.cond(flag > 0, lambda x: lax.psum(x, "x"), lambda x: x, x)

    choose = jax.jit(
        jax.shard_map(body, mesh=MESH, in_specs=(P(), P("x")), out_specs=P("x"), check_vma=False)
    )
    x, total = sharded(), np.arange(4.0 * SIZE).reshape(SIZE, 4).sum(0)
    for turn in range(100):
        choose(0.0, x).block_until_ready()
        # Rank 0 may not wait in a launch for rank 1, which waits for a message of rank 0's.
        if RANK == 1:
            assert mpi.COMM_WORLD.recv(source=0, tag=turn) == turn
        y = choose(1.0, x)
        if RANK == 0:
            mpi.COMM_WORLD.send(turn, 1, tag=turn)
        np.testing.assert_allclose(local(y), total)


def test_branches_may_differ_between_groups() -> None:
    """Uniform within each group is enough: a pipeline's stages do different things."""
    if SIZE != 4:
        pytest.skip("needs 4 ranks")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
    x = jax.make_array_from_callback(
        (4, 3), NamedSharding(mesh, P(("x", "y"))), np.arange(12.0).reshape(4, 3).__getitem__
    )

    def body(x):
        return lax.cond(lax.axis_index("x") == 0, lambda x: lax.psum(x, "y"), lambda x: x, x)

    spec = P(("x", "y"))
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    for _ in range(3):
        y = local(run(x))[0]
        whole = np.arange(12.0).reshape(4, 3)
        np.testing.assert_allclose(y, whole[:2].sum(0) if RANK < 2 else whole[RANK])
    np.testing.assert_allclose(program(lambda x: lax.pmax(x.max(), "x"))(sharded()), 15)


def test_what_does_not_communicate_may_depend_on_the_rank() -> None:
    """XLA simplifies some of these on some ranks: the programs differ, and fit all the same."""
    for factor in (1.0, 2.0, 3.0):
        add = program(lambda x, factor=factor: lax.psum(x[:2] * (factor * RANK), "x"))
        parts = np.arange(4.0 * SIZE).reshape(SIZE, 4)[:, :2]
        expected = (parts * factor * np.arange(SIZE)[:, None]).sum(0)
        np.testing.assert_allclose(add(sharded()), expected)


@pytest.mark.not_on_gpu("XLA:GPU packs them into bytes")
def test_elements_of_less_than_a_byte_are_refused_or_right() -> None:
    small = jax.jit(lambda x: x.astype(jnp.int2))(sharded())
    with pytest.raises(Exception, match="less than 8 bits"):
        program(lambda x: lax.ppermute(x, "x", [(0, 1)]), P("x"))(small).block_until_ready()
