"""JAX on one rank, as on its CPU backend."""

from __future__ import annotations

import os
import re
from typing import Any

os.environ["JAX_PLATFORMS"] = "mpi_cuda"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpi_cuda as m
from mpi_cuda import notoken as nt

X = jnp.arange(6.0).reshape(2, 3)


def test_a_world_of_one() -> None:
    assert (jax.process_count(), jax.process_index(), len(jax.devices())) == (1, 0, 1)
    version = jax.devices()[0].client.platform_version
    # With "cuda" in it, JAX would take the backend for a GPU's.
    assert "MPI ranks" in version and "cuda" not in version.lower()
    # What JAX's compilation cache knows the build of the inner plugin by.
    assert re.search(r"\(PJRT \d+\.\d+, [1-9]\d+ bytes\)", version), version


def test_transformations() -> None:
    np.testing.assert_allclose(jax.grad(lambda x: (x**3).sum())(X), 3 * X**2)
    np.testing.assert_allclose(jax.jit(jax.vmap(jnp.cumsum))(X), np.cumsum(X, 1))
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda i, c: c * 2, x))
    np.testing.assert_allclose(loop(X), X * 32)


def test_donation() -> None:
    x = jnp.ones(1000)
    y = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted() and float(y[0]) == 2


def memory_at(offset: int, shape: tuple[int, ...], dtype: str = "f4", order: str = "C") -> Any:
    """An array that begins so many bytes after a multiple of 64."""
    count = int(np.prod(shape))
    memory = np.zeros(count * 8 + 256, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    flat = memory[start : start + count * np.dtype(dtype).itemsize].view(dtype)
    flat[:] = np.arange(count) % 100
    return flat.reshape(shape, order=order)


@pytest.mark.parametrize("offset", [0, 1, 3, 4, 8, 16, 20, 32, 33, 36, 48, 60])
def test_from_dlpack_copies_what_it_cannot_share(offset: int) -> None:
    """It came and went with where `malloc` puts an array."""
    for shape, dtype, order in [((16,), "f4", "C"), ((3, 5), "i2", "F"), ((2, 3, 4), "u1", "C")]:
        for copy in (None, True):
            a = memory_at(offset, shape, dtype, order)
            expected = a.copy()
            y = jnp.from_dlpack(a, copy=copy)
            assert y.dtype == a.dtype and y.shape == shape
            np.testing.assert_array_equal(y, expected)
            np.testing.assert_array_equal(y + 1, expected + 1)
            if offset or copy:
                a[...] = 77
                np.testing.assert_array_equal(y, expected)
    if offset:
        with pytest.raises(ValueError, match="is not aligned to"):
            jnp.from_dlpack(memory_at(offset, (16,)), copy=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "complex64", "bool", "float16"])
def test_from_dlpack_copies_every_type_of_a_jax_array(dtype: str) -> None:
    x = jnp.arange(6).reshape(2, 3).astype(dtype)
    try:
        y = jnp.from_dlpack(x, copy=True)
    except (BufferError, RuntimeError) as error:
        pytest.skip(f"JAX does not export it: {error}")
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(y), np.asarray(x))
    assert y.unsafe_buffer_pointer() != x.unsafe_buffer_pointer()


def test_random_numbers_and_fft() -> None:
    normal = jax.random.normal(jax.random.key(1), (1000,))
    assert abs(float(normal.mean())) < 0.2
    np.testing.assert_allclose(jnp.fft.fft(X), np.fft.fft(X), atol=1e-5)


@pytest.mark.parametrize("name", ["cholesky", "eigh", "svd", "qr", "inv", "det", "eigvals"])
def test_linear_algebra(name: str) -> None:
    matrix = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    matrix = matrix @ matrix.T + 5 * np.eye(5, dtype=np.float32)
    ours = jax.tree.leaves(getattr(jnp.linalg, name)(matrix))
    theirs = jax.tree.leaves(
        tuple(np.atleast_1d(getattr(np.linalg, name)(matrix)))
        if name in ("inv", "det", "cholesky")
        else tuple(getattr(np.linalg, name)(matrix))
    )
    if name == "eigvals":
        np.testing.assert_allclose(np.sort(ours[0].real), np.sort(theirs), rtol=1e-3)
    elif name in ("inv", "cholesky", "det"):
        np.testing.assert_allclose(ours[0], getattr(np.linalg, name)(matrix), rtol=1e-3, atol=1e-4)
    elif name == "eigh":
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-3)
    elif name == "svd":
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3)
    else:
        np.testing.assert_allclose(ours[0] @ ours[1], matrix, rtol=1e-3, atol=1e-4)


def test_operations_alone_in_the_world() -> None:
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(nt.allreduce(x, m.SUM), x)
    np.testing.assert_array_equal(nt.allgather(x), x[None])
    np.testing.assert_array_equal(nt.bcast(x, 0), x)
    np.testing.assert_array_equal(nt.sendrecv(x, x, 0, 0), x)
    nt.barrier()


def test_serialized_executables() -> None:
    from jax.experimental import serialize_executable

    compiled = jax.jit(lambda x: nt.allreduce(x * 2, m.SUM)).lower(X).compile()
    payload = serialize_executable.serialize(compiled)
    loaded = serialize_executable.deserialize_and_load(*payload)
    np.testing.assert_array_equal(loaded(X), X * 2)
    # XLA:CPU leaves the machine code out of what it serializes of a program that was loaded.
    client = jax.devices()[0].client
    again = client.deserialize_executable(
        loaded.runtime_executable().serialize(), jax.devices(), None
    )
    (result,) = again.execute_sharded([jnp.asarray(X)]).disassemble_into_single_device_arrays()
    np.testing.assert_array_equal(result[0], X * 2)


def test_analyses() -> None:
    compiled = jax.jit(lambda x: x @ x.T).lower(X).compile()
    assert "dot" in compiled.as_text()
    assert compiled.memory_analysis().output_size_in_bytes == 16


def test_what_a_program_costs_is_known_before_and_after_compiling() -> None:
    lowered = jax.jit(lambda x: x @ x.T).lower(X)
    assert lowered.cost_analysis()["flops"] == lowered.compile().cost_analysis()["flops"] > 0
