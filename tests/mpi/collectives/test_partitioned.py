"""Programs of whole arrays that XLA partitions, and the collectives that it puts into them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives_support import (
    COLUMNS,
    MESH,
    MESH_EXPLICIT,
    ROWS,
    SEVERAL,
    WHOLE,
    D,
    check,
    local,
    normal,
    numbers,
    put,
    together,
)
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

SPECS = {"rows": ROWS, "columns": COLUMNS, "whole": WHOLE}


@pytest.mark.parametrize("a", SPECS)
def test_matmul(a: str) -> None:
    """Each combination of operands, to each sharding of the result."""
    x, y = numbers((D, 2 * D)), numbers((2 * D, D), seed=1)
    others = [put(y, spec) for spec in SPECS.values()]
    out = [[NamedSharding(MESH, spec) for spec in SPECS.values()]] * 3
    f = jax.jit(lambda x, ys: [[x @ y] * 3 for y in ys], out_shardings=out)
    check(f(put(x, SPECS[a]), others), [[x @ y] * 3] * 3)


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def window(x, kind):
    init, op = (0.0, lax.add) if kind == "sum" else (-jnp.inf, lax.max)
    return lax.reduce_window(x, init, op, (3, 3), (1, 1), "SAME")


#: Function of an array sharded along its rows and one along its columns, and the sharding of the
#: results (none: XLA's choice).
Automatic = dict[str, tuple[Callable[[jax.Array, jax.Array], Any], P | None]]
AUTOMATIC: dict[str, Automatic] = {
    "sums": {
        "rows": (lambda r, c: (r.sum(), r.sum(0), r.sum(1)), None),
        "columns": (lambda r, c: (c.sum(), c.sum(0), c.sum(1)), None),
        "moments": (lambda r, c: (r.mean(0), r.var(), c.std(1)), WHOLE),
        "norms": (lambda r, c: (jnp.linalg.norm(r), jnp.linalg.norm(c, axis=0)), WHOLE),
    },
    "products and extremes": {
        "extremes": (lambda r, c: (r.max(0), r.min(0), c.max(), c.min(1)), None),
        "product": (lambda r, c: (r / 3).prod(0), WHOLE),
        "complex product": (lambda r, c: ((r + 1j * c) / 4).prod(0), WHOLE),
        "logsumexp": (lambda r, c: jax.nn.logsumexp(r, (0, 1)), WHOLE),
    },
    "where extremes are": {
        "argmax": (lambda r, c: (r.argmax(0), r.argmin(1), r.argmax()), None),
        "argmin": (lambda r, c: (c.argmin(0), c.argmax(1)), WHOLE),
    },
    "sorts": {
        "along the sharded axis": (lambda r, c: jnp.sort(r, 0), ROWS),
        "along the other": (lambda r, c: jnp.sort(r, 1), None),
        "argsort": (lambda r, c: jnp.argsort(r, 0), None),
    },
    "selections": {
        "top_k of rows": (lambda r, c: lax.top_k(r, 3), None),
        "top_k along columns": (lambda r, c: lax.top_k(c, 3)[0], WHOLE),
        "searchsorted": (lambda r, c: jnp.searchsorted(jnp.sort(r.ravel()), c[0]), WHOLE),
    },
    "sets": {
        "bincount": (lambda r, c: jnp.bincount((r + 4).astype(int).ravel(), length=9), WHOLE),
        "histogram": (lambda r, c: jnp.histogram(c, 4, (-4, 4))[0], WHOLE),
    },
    "cumulative": {
        "sum": (lambda r, c: jnp.cumsum(r, 0), ROWS),
        "product": (lambda r, c: jnp.cumprod(r / 2, 0), None),
        "maximum from the end": (lambda r, c: lax.cummax(c, 1, reverse=True), COLUMNS),
    },
    "associative scans": {
        "linear": (
            lambda r, c: lax.associative_scan(
                lambda p, q: (q[0] * p[0], q[0] * p[1] + q[1]), (r / 4, c)
            ),
            ROWS,
        ),
    },
    "shapes": {
        "transpose": (lambda r, c: r.T, ROWS),
        "free transpose": (lambda r, c: r.T, None),
        "flat": (lambda r, c: r.reshape(-1), ROWS),
        "split": (lambda r, c: c.reshape(2, 6, D), P(None, None, "x")),
        "mixed": (lambda r, c: c.reshape(D // 2, 2 * D), COLUMNS),
        "expanded": (lambda r, c: r[:, None] + c[None], P(None, "x")),
    },
    "joins": {
        "along the sharded axis": (lambda r, c: jnp.concatenate([r, r + 1], 0), ROWS),
        "along the other": (lambda r, c: jnp.concatenate([r, c], 1), ROWS),
        "stack": (lambda r, c: jnp.stack([r, c]), P(None, "x")),
        "repeat": (lambda r, c: jnp.repeat(r, 2, 0), ROWS),
        "tile": (lambda r, c: jnp.tile(r, (2, 1)), ROWS),
    },
    "edges": {
        "pad": (lambda r, c: jnp.pad(r, ((3, D - 3), (0, 0))), ROWS),
        "roll": (lambda r, c: jnp.roll(r, 1, 0), ROWS),
        "roll both axes": (lambda r, c: jnp.roll(r, (5, -2), (0, 1)), COLUMNS),
        "flip": (lambda r, c: r[::-1], ROWS),
        "slice": (lambda r, c: r[2:-4:2], WHOLE),
        "stencil": (lambda r, c: jnp.roll(c, 1, 1) + jnp.roll(c, -1, 1) - 2 * c, COLUMNS),
    },
    "reads by index": {
        "rows": (lambda r, c: r[jnp.array([3, 0, 11, 3])], WHOLE),
        "by a sharded index": (lambda r, c: r[jnp.argsort(c[:, 0])], ROWS),
        "take_along_axis": (lambda r, c: jnp.take_along_axis(r, jnp.argsort(c, 0), 0), ROWS),
        "dynamic_slice": (lambda r, c: lax.dynamic_slice(r, (4, 1), (6, 2)), WHOLE),
        "by a computed place": (lambda r, c: r[c.argmax() % D], WHOLE),
        "one hot": (lambda r, c: jax.nn.one_hot(r[:, 0].astype(int) + 4, D), COLUMNS),
    },
    "writes by index": {
        "add": (lambda r, c: r.at[jnp.array([1, 7, 1])].add(c[:3]), ROWS),
        "set": (lambda r, c: r.at[5].set(7).at[:, 2].multiply(3), ROWS),
        "slice": (lambda r, c: lax.dynamic_update_slice(r, jnp.ones((5, 2)), (4, 1)), ROWS),
        "segment_sum": (lambda r, c: jax.ops.segment_sum(r, jnp.arange(D) % 5, 5), WHOLE),
        "by a sharded index": (lambda r, c: r.at[jnp.argsort(c[:, 0])].set(c), ROWS),
    },
    "einsum": {
        "trace": (lambda r, c: jnp.einsum("ij,ji->", r, c), WHOLE),
        "three": (lambda r, c: jnp.einsum("ij,jk,kl->il", r, c, r), COLUMNS),
        "batch": (
            lambda r, c: jnp.einsum("bij,bjk->bik", r.reshape(D, 4, 3), c.reshape(D, 3, 4)),
            ROWS,
        ),
        "outer": (lambda r, c: jnp.outer(r[:, 0], c[0]), COLUMNS),
        "tensordot": (lambda r, c: jnp.tensordot(r, r, 2), WHOLE),
        "complex": (lambda r, c: ((r + 1j * c) @ (r - 1j * c)).sum(0), WHOLE),
    },
    "narrow types": {
        "bfloat16": (lambda r, c: c.astype(jnp.bfloat16) @ r.astype(jnp.bfloat16), WHOLE),
        "float16": (lambda r, c: r.astype(jnp.float16).sum(0), WHOLE),
        "int8": (lambda r, c: c.astype(jnp.int8) @ r.astype(jnp.int8), WHOLE),
        "uint8": (lambda r, c: abs(r).astype(jnp.uint8).max(0), WHOLE),
        "uint16": (lambda r, c: abs(r).astype(jnp.uint16).prod(0), WHOLE),
    },
    "normalisations": {
        "softmax": (lambda r, c: jax.nn.softmax(r, 0), ROWS),
        "layers": (lambda r, c: layer_norm(c), COLUMNS),
    },
    "windows": {
        "sum": (lambda r, c: window(r, "sum"), ROWS),
        "maximum": (lambda r, c: window(c, "max"), COLUMNS),
        "convolve": (lambda r, c: jnp.convolve(r.ravel(), jnp.arange(5.0), "same"), ROWS),
    },
    "Fourier": {
        "along the sharded axis": (lambda r, c: jnp.fft.fft(r, axis=0), ROWS),
        "along the other": (lambda r, c: jnp.fft.fft(r, axis=1), ROWS),
        "both and back": (lambda r, c: jnp.fft.ifft2(jnp.fft.fft2(r) * 2), COLUMNS),
        "real": (lambda r, c: jnp.fft.irfft(jnp.fft.rfft(r, axis=0), axis=0), ROWS),
    },
    "matrices": {
        "cholesky": (lambda r, c: jnp.linalg.cholesky(r @ r.T + 99 * jnp.eye(D)), ROWS),
        "solve": (lambda r, c: jnp.linalg.solve(r + 50 * jnp.eye(D), c), ROWS),
        "qr": (lambda r, c: abs(jnp.linalg.qr(r + 20 * jnp.eye(D))[1]), WHOLE),
        "determinant": (lambda r, c: jnp.linalg.slogdet(c + 50 * jnp.eye(D)), WHOLE),
        "eigenvalues": (lambda r, c: jnp.linalg.eigvalsh(r + r.T), WHOLE),
        "triangular solve": (
            lambda r, c: lax.linalg.triangular_solve(r + 50 * jnp.eye(D), c, left_side=True),
            None,
        ),
    },
    "reductions of pairs": {
        "two at once": (
            lambda r, c: lax.reduce(
                (r, -r),
                (jnp.float32(0), jnp.float32(0)),
                lambda a, b: (a[0] + b[0], jnp.minimum(a[1], b[1])),
                (0,),
            ),
            WHOLE,
        ),
    },
    "loops": {
        "fori_loop": (lambda r, c: lax.fori_loop(0, 4, lambda _, y: jnp.tanh(y @ c / 9), r), ROWS),
        "scan over the sharded axis": (
            lambda r, c: lax.scan(lambda a, x: (a + x, a * x), r[0] * 0, r),
            None,
        ),
        "while_loop": (
            lambda r, c: lax.while_loop(lambda y: (y**2).sum() < 1e4, lambda y: y * 1.5, r),
            ROWS,
        ),
        "cond": (
            lambda r, c: lax.cond(r.sum() > 0, lambda r: r - r.mean(0), lambda r: r.T @ r, r),
            COLUMNS,
        ),
    },
}


@pytest.mark.parametrize("kind", AUTOMATIC)
def test_automatic(kind: str) -> None:
    functions = together({name: f for name, (f, _) in AUTOMATIC[kind].items()})
    specs = {name: spec for name, (_, spec) in AUTOMATIC[kind].items()}
    out = {
        name: spec if spec is None else NamedSharding(MESH, spec) for name, spec in specs.items()
    }
    r, c = numbers((D, D)), numbers((D, D), seed=1)
    got = jax.jit(functions, out_shardings=out)(put(r, ROWS), put(c, COLUMNS))
    check(got, local(functions, r, c), 1e-4)


OWN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "bits": lambda x: lax.reduce(x.astype(int), jnp.int32(-1), lax.bitwise_and, (0,)),
    "parity": lambda x: lax.reduce(x > 0, False, lax.bitwise_xor, (0,)),
    "hypot": lambda x: lax.reduce(x, jnp.float32(0), lambda a, b: jnp.sqrt(a * a + b * b), (0,)),
}


@SEVERAL
@pytest.mark.parametrize("name", OWN)
@pytest.mark.not_on_gpu("XLA:GPU ends the process when it compiles them")
def test_reductions_that_xla_does_not_know(name: str) -> None:
    """XLA's CPU compiler refuses them on a sharded axis; the ranks go on."""
    x = numbers((D, 3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Unsupported reduction computation"):
        jax.jit(OWN[name], out_shardings=NamedSharding(MESH, WHOLE))(put(x))
    check(jax.jit(OWN[name])(put(x.T.copy(), WHOLE)), local(OWN[name], x.T), 1e-5)


LINEAR: dict[str, Callable[[jax.Array], Any]] = {
    "cholesky": lambda a: jnp.linalg.cholesky(a @ a.mT + 9 * jnp.eye(D)),
    "solve": lambda a: jnp.linalg.solve(a + 9 * jnp.eye(D), a),
    "qr": lambda a: (lambda q, r: (q @ r, abs(r)))(*jnp.linalg.qr(a)),
    "svd": lambda a: (lambda u, s, v: ((u * s[..., None, :]) @ v, s))(*jnp.linalg.svd(a)),
}


def test_linear_algebra_on_a_sharded_batch() -> None:
    a = normal((D, D, D))
    check(jax.jit(together(LINEAR))(put(a)), local(together(LINEAR), a), 1e-3)


@pytest.mark.parametrize("axis", range(4), ids=["batch", "height", "width", "channels"])
def test_convolution(axis: int) -> None:
    x, kernel = numbers((D, D, D, D)), numbers((3, 3, D, D), seed=1)

    def convolve(**options: Any) -> Callable[..., Any]:
        def f(x, kernel):
            if "feature_group_count" in options:
                kernel = kernel[:, :, :1]
            settings = {"window_strides": (1, 1), "padding": "SAME", **options}
            numbering = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(x, kernel, dimension_numbers=numbering, **settings)

        return f

    f = together(
        {
            "plain": convolve(),
            "strided": convolve(window_strides=(2, 1)),
            "grouped": convolve(feature_group_count=D),
            "gradient": jax.grad(lambda x, k: (convolve()(x, k) ** 2).sum(), 1),
        }
    )
    got = jax.jit(f, out_shardings=NamedSharding(MESH, WHOLE))
    check(got(put(x, P(*[None] * axis, "x")), put(kernel, WHOLE)), local(f, x, kernel), 1e-4)


RANDOM: dict[str, Callable[[jax.Array], jax.Array]] = {
    "normal": lambda key: jax.random.normal(key, (D, 5)),
    "uniform": lambda key: jax.random.uniform(key, (D,)),
    "bits": lambda key: jax.random.bits(key, (D, 5)),
}


def test_random_numbers_do_not_depend_on_the_sharding() -> None:
    def f():
        return together(RANDOM)(jax.random.key(7))

    check(jax.jit(f, out_shardings=NamedSharding(MESH, ROWS))(), local(f), 1e-6)


def test_random_bits_of_the_device() -> None:
    """`rbg` keys: XLA's RngBitGenerator, which all ranks must run the same way."""

    @partial(jax.jit, out_shardings=NamedSharding(MESH, P()))
    def f():
        return jax.random.normal(jax.random.key(3, impl="rbg"), (D, 2))

    check(f(), local(lambda: jax.random.normal(jax.random.key(3, impl="rbg"), (D, 2))), 1e-6)


def test_random_keys_are_sharded() -> None:
    keys = jax.jit(
        lambda: jax.random.split(jax.random.key(0), D), out_shardings=NamedSharding(MESH, P("x"))
    )()
    got = jax.jit(lambda keys: jax.random.key_data(keys))(keys)
    check(got, local(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), D))))


@pytest.mark.parametrize("source", SPECS)
def test_resharding(source: str) -> None:
    x = numbers((D, 2 * D))
    placed, targets = put(x, SPECS[source]), [NamedSharding(MESH, s) for s in SPECS.values()]
    by_jit = jax.jit(lambda x: [x] * 3, out_shardings=targets)(placed)
    by_device_put = [jax.device_put(placed, target) for target in targets]
    constrained = jax.jit(lambda x: lax.with_sharding_constraint([x + 1] * 3, targets))(placed)
    for results in (by_jit, by_device_put, constrained):
        for array, target in zip(results, targets, strict=True):
            assert array.sharding.is_equivalent_to(target, 2)
    check([by_jit, by_device_put, constrained], [[x] * 3, [x] * 3, [x + 1] * 3])


def test_constraints_back_and_forth() -> None:
    x = numbers((D, D))

    @jax.jit
    def f(x):
        for spec in (COLUMNS, ROWS, WHOLE, COLUMNS):
            x = lax.with_sharding_constraint(jnp.sin(x), NamedSharding(MESH, spec))
        return x

    def g(x):
        return jnp.sin(jnp.sin(jnp.sin(jnp.sin(x))))

    check(f(put(x)), local(g, x), 1e-5)


def test_explicit_axes() -> None:
    """The sharding is part of the types; `reshard` is in the program."""
    x, y = numbers((D, D)), numbers((D, D), seed=1)

    @jax.jit
    def f(x, y):
        z = jnp.einsum("ij,jk->ik", x, jax.sharding.reshard(y, P(None, None)))
        assert jax.typeof(z).sharding.spec == P("x", None)
        moved = jax.sharding.reshard(z, P(None, "x"))
        assert jax.typeof(moved).sharding.spec == P(None, "x")
        return moved, z.sum(0)

    with jax.set_mesh(MESH_EXPLICIT):
        got = f(put(x, P("x", None), MESH_EXPLICIT), put(y, P("x", None), MESH_EXPLICIT))
        summed = jax.jit(lambda x: jnp.einsum("ij->j", x, out_sharding=P("x")))(
            put(x, P("x", None), MESH_EXPLICIT)
        )
    check(got, (x @ y, (x @ y).sum(0)))
    check(summed, x.sum(0))


def test_operations_outside_of_jit() -> None:
    """Arrays over all ranks in ordinary expressions."""
    x = numbers((D, 4))
    a = put(x)
    check([a + 1, a.sum(), a.T @ a, a.max(0)], [x + 1, x.sum(), x.T @ x, x.max(0)])
    check(jnp.sort(a[:, 0]), np.sort(x[:, 0]))
    assert float(a.sum()) == x.sum()
    assert bool((a == a).all())
