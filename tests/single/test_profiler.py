"""Profiles of `jax.profiler` on one rank."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import mpi_cuda as m
from mpi_cuda import notoken as nt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from profiles import events, named, only, ours


@jax.jit
def total(x: jax.Array) -> jax.Array:
    return nt.allreduce(x, m.SUM)


def test_an_operation_of_one_rank_is_on_the_timeline(tmp_path: Path) -> None:
    total(jnp.ones(6)).block_until_ready()
    with jax.profiler.trace(tmp_path):
        with jax.profiler.TraceAnnotation("interval"):
            total(jnp.ones(6)).block_until_ready()
    found = events(only(tmp_path, "*.xplane.pb"))
    (reduced,) = ours(found)
    (interval,) = named(found, "interval")
    assert reduced.name == "mpi_cuda.allreduce" and interval.has(reduced)
    told = {name: reduced.stats[name] for name in ("bytes", "count", "program", "ranks", "size")}
    assert told == {"bytes": 24, "count": 6, "program": "jit_total", "ranks": "0", "size": 1}


def test_clocks_agree_with_jaxs(tmp_path: Path) -> None:
    """An operation lies within what JAX itself has measured around it, which takes little more."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(tmp_path, profiler_options=options):
        for _ in range(100):
            with jax.profiler.TraceAnnotation("around"):
                total(jnp.ones(6)).block_until_ready()
    found = events(only(tmp_path, "*.xplane.pb"))
    pairs = list(zip(named(found, "around"), ours(found), strict=True))
    before = sorted(one.start - around.start for around, one in pairs)
    after = sorted(around.end - one.end for around, one in pairs)
    assert before[0] > -20e3 and after[0] > -20e3


def test_a_profile_without_operations_has_jaxs_events_alone(tmp_path: Path) -> None:
    with jax.profiler.trace(tmp_path):
        jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()
    found = events(only(tmp_path, "*.xplane.pb"))
    assert any(one.name.startswith("PjitFunction") for one in found)
    assert ours(found) == []


def test_a_failed_operation_says_why(tmp_path: Path) -> None:
    run = jax.jit(lambda x: nt.sendrecv(x, x[:2], 0, 0))
    with jax.profiler.trace(tmp_path):
        with pytest.raises(jax.errors.JaxRuntimeError, match="12 bytes"):
            run(jnp.ones(3)).block_until_ready()
    found = ours(events(only(tmp_path, "*.xplane.pb")))
    (sent,) = named(found, "mpi_cuda.sendrecv")
    assert "has 12 bytes, and the result 8" in sent.stats["error"]
