"""What JAX and others build on `jax.distributed` is there, without anybody having started it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import jax
import pytest
from jax._src import distributed
from jax.experimental import multihost_utils

RANK, SIZE = jax.process_index(), jax.process_count()


def test_what_asks_for_the_coordination_service_has_it() -> None:
    state = distributed.global_state
    assert jax.distributed.is_initialized() and state.client is state.client
    assert (state.process_id, state.num_processes) == (RANK, SIZE)
    for _ in range(2):
        with multihost_utils.live_devices(jax.devices()) as devices:
            assert devices == jax.devices()


def test_ranks_meet_at_its_barriers_and_read_what_others_have_written() -> None:
    client = distributed.global_state.client
    if RANK == 0:
        with tempfile.NamedTemporaryFile(delete=False) as file:
            client.key_value_set("test_coordination/path", file.name)
            time.sleep(0.2)
            file.write(b"saved")
    path = Path(client.blocking_key_value_get("test_coordination/path", 10_000))
    client.wait_at_barrier("test_coordination/saved", 10_000)
    assert path.read_text() == "saved"
    client.wait_at_barrier("test_coordination/loaded", 10_000)
    if RANK == 0:
        path.unlink()


def test_initialize_may_come_after_the_backend_and_more_than_once() -> None:
    jax.distributed.initialize()
    jax.distributed.initialize("127.0.0.1:1", num_processes=SIZE, process_id=RANK)
    with pytest.raises(ValueError, match=f"says num_processes={SIZE + 1}, and MPI says {SIZE}"):
        jax.distributed.initialize(num_processes=SIZE + 1)
    with pytest.raises(ValueError, match=f"says process_id={RANK + 1}, and MPI says {RANK}"):
        jax.distributed.initialize(process_id=RANK + 1)
    jax.distributed.shutdown()
    assert jax.distributed.is_initialized()
