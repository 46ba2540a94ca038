"""Host callbacks on one rank."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "mpi_cuda"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, io_callback

X = jnp.arange(6.0).reshape(2, 3)


def shape_of(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@pytest.mark.parametrize(
    "dtype",
    [
        "bool",
        "int8",
        "uint16",
        "int32",
        "float16",
        "bfloat16",
        "float32",
        "complex64",
        "int4",
        "uint4",
        "float8_e4m3fn",
        "int2",
    ],
)
def test_pure_callback_of_every_dtype(dtype: str) -> None:
    x = jnp.asarray([0, 1, 1, 0, 1]).astype(dtype)
    seen = []

    def callback(x):
        seen.append(np.asarray(x))
        return np.asarray(x)[::-1]

    y = jax.jit(lambda x: jax.pure_callback(callback, shape_of(x), x))(x)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(x)[::-1])
    np.testing.assert_array_equal(seen[0], np.asarray(x))


def test_arguments_may_be_kept() -> None:
    kept = []
    program = jax.jit(
        lambda x: jax.pure_callback(lambda x: kept.append(x) or x, shape_of(x), x + 1)
    )
    for i in range(20):
        program(X * i).block_until_ready()
    for i, x in enumerate(kept):
        np.testing.assert_array_equal(x, X * i + 1)


def test_results_may_have_any_strides() -> None:
    y = jax.jit(
        lambda x: jax.pure_callback(lambda x: np.asfortranarray(np.asarray(x)), shape_of(x), x)
    )(X)
    np.testing.assert_array_equal(y, X)
    z = jax.pure_callback(lambda x: np.asarray(x).T, jax.ShapeDtypeStruct((3, 2), X.dtype), X)
    np.testing.assert_array_equal(z, X.T)


def test_large_callback_in_a_large_program() -> None:
    """Runs on XLA's own threads, after JAX has let go of the launch."""

    def program(x):
        y = jax.pure_callback(lambda x: np.asarray(x) * 2, shape_of(x), x @ x)
        return (y @ x).sum()

    x = jnp.ones((256, 256)) / 256
    results = [jax.jit(program)(x) for _ in range(10)]
    np.testing.assert_allclose(results, np.full(10, 2.0 * 256 * 256 / 256), rtol=1e-5)


def test_ordered_io_callbacks() -> None:
    seen: list[int] = []

    @jax.jit
    def program():
        def body(i, _):
            io_callback(lambda i: seen.append(int(i)), None, i, ordered=True)
            return 0

        jax.lax.fori_loop(0, 10, body, 0)

    program()
    program()
    jax.effects_barrier()
    assert seen == list(range(10)) * 2


def test_unordered_io_callback_with_result() -> None:
    assert (
        float(io_callback(lambda x: x * 3, jax.ShapeDtypeStruct((), np.float32), jnp.float32(2)))
        == 6
    )


def test_debug_print_and_callback(capfd) -> None:
    seen = []

    @jax.jit
    def program(x):
        jax.debug.print("value {x}", x=x.sum())
        jax.debug.print("ordered {x}", x=x.sum(), ordered=True)
        jax.debug.callback(lambda x: seen.append(float(x)), x.sum())
        return x

    program(X)
    jax.effects_barrier()
    output = capfd.readouterr().out
    assert "value 15.0" in output and "ordered 15.0" in output and seen == [15.0]


def test_exceptions_surface() -> None:
    def callback(x):
        raise ValueError("a wrong value of 42")

    with pytest.raises(Exception, match="a wrong value of 42"):
        jax.jit(lambda x: jax.pure_callback(callback, shape_of(x), x))(X).block_until_ready()
    np.testing.assert_array_equal(X + 1, np.asarray(X) + 1)


def test_an_exception_that_cannot_be_encoded_is_still_one() -> None:
    def callback(x):
        raise ValueError(os.fsdecode(b"odd \xff"))

    with pytest.raises(Exception, match="odd"):
        jax.jit(lambda x: jax.pure_callback(callback, shape_of(x), x))(X).block_until_ready()


def test_checkify() -> None:
    def f(x):
        checkify.check(x > 0, "must be positive, got {x}", x=x)
        return jnp.log(x)

    error, _ = checkify.checkify(jax.jit(f))(jnp.float32(-1))
    assert "must be positive, got -1" in error.get()


def test_buffer_callback_writes_in_place() -> None:
    from jax.experimental.buffer_callback import buffer_callback

    def callback(ctx, out, x):
        assert ctx.stage.name == "EXECUTE"
        np.asarray(out)[...] = np.asarray(x) * 2

    np.testing.assert_array_equal(jax.jit(buffer_callback(callback, shape_of(X)))(X), X * 2)


def test_callback_that_uses_jax() -> None:
    def callback(x):
        return np.asarray(jnp.asarray(np.asarray(x)) @ np.ones((3, 2), np.float32))

    y = jax.pure_callback(callback, jax.ShapeDtypeStruct((2, 2), np.float32), X)
    np.testing.assert_allclose(y, np.asarray(X) @ np.ones((3, 2)))


MATRIX = jnp.eye(256) * 2


def in_background(callback, *results):
    """A program that XLA does not run on the calling thread, with `callback` inside."""

    def program(x):
        return jax.pure_callback(callback, results or shape_of(x), x @ x)

    return jax.jit(program)


def test_callback_that_uses_jax_in_the_background() -> None:
    """XLA alone would queue its programs behind the one that waits for the callback."""
    stale = jnp.full((4,), 3.0)

    def callback(x):
        small = jnp.sum(x) + stale[0]
        large = x @ x
        return np.asarray(large + small)

    expected = np.eye(256) * 16 + 4 * 256 + 3
    for _ in range(3):
        np.testing.assert_allclose(in_background(callback)(MATRIX), expected)


def test_what_a_callback_computes_in_the_background_can_be_used_after_it() -> None:
    kept: list[jax.Array] = []
    add = jax.jit(lambda a: (a + 1, a[:0], jnp.int8(3), a.astype(jnp.bfloat16)))

    def callback(x):
        kept.extend(add(jnp.asarray(x)))
        return x

    in_background(callback)(MATRIX).block_until_ready()
    total = jax.jit(lambda a: a.sum())(kept[0])
    assert float(total) == 4 * 256 + 256**2
    assert kept[1].shape == (0, 256) and int(kept[2]) == 3 and kept[3].dtype == jnp.bfloat16
    del kept[:]


def test_callbacks_in_callbacks_in_the_background() -> None:
    depths: list[int] = []

    def callback(x, depth):
        depths.append(depth)
        if depth == 4:
            return np.asarray(jnp.asarray(x) + 1)
        inner = in_background(lambda y: callback(y, depth + 1))
        return np.asarray(inner(jnp.asarray(x)) * 1.0)

    result = in_background(lambda x: callback(x, 0))(jnp.eye(256))
    np.testing.assert_array_equal(result, np.eye(256) + 1)
    assert depths == [0, 1, 2, 3, 4]


def test_an_error_in_what_a_callback_computes_in_the_background() -> None:
    def failing(x):
        raise ValueError("innermost")

    def callback(x):
        return np.asarray(in_background(failing)(jnp.asarray(x)))

    with pytest.raises(Exception, match="innermost"):
        in_background(callback)(MATRIX).block_until_ready()
    np.testing.assert_array_equal(in_background(lambda x: np.asarray(x))(MATRIX), MATRIX @ MATRIX)
