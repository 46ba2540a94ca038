"""Arrays over all ranks: how they are made, and `multihost_utils`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives_support import MESH, RANK, SIZE, D, check, numbers, put
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def test_device_put_from_the_host() -> None:
    x = numbers((D, 3))
    for spec in (P("x"), P()):
        array = jax.device_put(x, NamedSharding(MESH, spec))
        assert array.is_fully_replicated == (spec == P())
        assert array.is_fully_addressable == (SIZE == 1)
        check(array, x)
    with pytest.raises(RuntimeError, match="non-addressable"):
        np.asarray(jax.device_put(x, NamedSharding(MESH, P("x"))))


def test_arrays_from_local_parts() -> None:
    x = numbers((SIZE * 2, 3))
    mine = x[2 * RANK : 2 * RANK + 2]
    sharding = NamedSharding(MESH, P("x"))
    array = jax.make_array_from_process_local_data(sharding, mine)
    check(array, x)
    single = jax.device_put(mine, jax.local_devices()[0])
    check(jax.make_array_from_single_device_arrays(x.shape, sharding, [single]), x)
    check(jax.make_array_from_process_local_data(NamedSharding(MESH, P()), x), x)
    check(jax.jit(lambda a: a.sum(0))(array), x.sum(0))


def test_arrays_made_inside() -> None:
    sharding = NamedSharding(MESH, P("x"))
    check(jnp.zeros((D, 2), device=sharding), np.zeros((D, 2), np.float32))
    check(
        jax.jit(lambda: jnp.arange(D) * 2, out_shardings=sharding)(),
        np.arange(0, 2 * D, 2, np.int32),
    )
    check(jnp.ones_like(put(numbers((D, 2)))), np.ones((D, 2), np.float32))


def test_unequal_parts_are_refused_as_ever() -> None:
    if SIZE > 1:
        with pytest.raises(ValueError, match="evenly divide"):
            jax.device_put(np.arange(SIZE + 1.0), NamedSharding(MESH, P("x")))


def test_process_allgather() -> None:
    mine = {"a": numbers((3,), seed=RANK), "b": np.int32(RANK)}
    got = multihost_utils.process_allgather(mine)
    np.testing.assert_array_equal(got["a"], [numbers((3,), seed=r) for r in range(SIZE)])
    np.testing.assert_array_equal(got["b"], np.arange(SIZE))
    tiled = multihost_utils.process_allgather(mine["a"], tiled=True)
    np.testing.assert_array_equal(
        tiled, np.concatenate([numbers((3,), seed=r) for r in range(SIZE)])
    )
    x = numbers((D, 2))
    np.testing.assert_array_equal(multihost_utils.process_allgather(put(x), tiled=True), x)


def test_broadcast_one_to_all() -> None:
    mine = {"a": numbers((3,), seed=RANK), "b": np.full(2, RANK == 0), "c": np.uint8(RANK + 3)}
    got = multihost_utils.broadcast_one_to_all(mine)
    np.testing.assert_array_equal(got["a"], numbers((3,), seed=0))
    assert got["b"].all()
    assert got["c"] == 3
    last = multihost_utils.broadcast_one_to_all(np.float32(RANK), is_source=RANK == SIZE - 1)
    assert last == SIZE - 1


def test_synchronise_and_compare() -> None:
    for i in range(3):
        multihost_utils.sync_global_devices(f"here {i}")
    multihost_utils.assert_equal({"a": np.arange(3)}, "not equal")
    if SIZE > 1:
        with pytest.raises(AssertionError, match="they differ"):
            multihost_utils.assert_equal(np.float32(RANK), "they differ")


def test_host_local_to_global_and_back() -> None:
    x = numbers((SIZE * 2, 3))
    mine = x[2 * RANK : 2 * RANK + 2]
    array = multihost_utils.host_local_array_to_global_array(mine, MESH, P("x"))
    check(array, x)
    doubled = jax.jit(lambda a: a * 2)(array)
    back = multihost_utils.global_array_to_host_local_array(doubled, MESH, P("x"))
    np.testing.assert_array_equal(back, mine * 2)
