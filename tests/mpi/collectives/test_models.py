"""What people write with collectives: training, attention, pipelines, halos, solvers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives_support import (
    MESH,
    SHIFT,
    SIZE,
    D,
    check,
    init_mlp,
    local,
    mapped,
    mlp_loss,
    mlp_step,
    normal,
    numbers,
    put,
    simulated,
    trained,
    varying,
)
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


@pytest.mark.parametrize(
    ("style", "specs", "batch"),
    [
        ("data", {"a": P(), "b": P()}, P("x")),
        ("fsdp", {"a": P("x"), "b": P("x")}, P("x")),
        ("tensor", {"a": P(None, "x"), "b": P("x")}, P()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_training(style: str, specs: dict[str, P], batch: P) -> None:
    """Three steps whose parameters are donated; several are in flight at once."""
    x, y = normal((D, D), 3), normal((D, D), 4)
    params = {name: put(value, specs[name]) for name, value in init_mlp().items()}
    out = ({name: NamedSharding(MESH, spec) for name, spec in specs.items()}, None)
    step = jax.jit(mlp_step, donate_argnums=0, out_shardings=out)
    here, there = put(x, batch), put(y, batch)
    loss = None
    for _ in range(3):
        before = params
        params, loss = step(params, here, there)
        assert all(p.is_deleted() for p in jax.tree.leaves(before))
    check((params, loss), trained(x, y, 3), 1e-4)


def test_data_parallel_by_shard_map_with_donation() -> None:
    x, y = normal((D, D), 3), normal((D, D), 4)

    def step(params, x, y):
        params = jax.tree.map(varying, params)
        loss, grads = jax.value_and_grad(mlp_loss)(params, x, y)
        grads = lax.pmean(grads, "x")
        params = lax.pmean(params, "x")
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), lax.pmean(loss, "x")

    mapped_step = jax.jit(
        jax.shard_map(step, mesh=MESH, in_specs=(P(), P("x"), P("x")), out_specs=P()),
        donate_argnums=0,
    )
    params = jax.tree.map(partial(put, spec=P()), init_mlp())
    loss = None
    for _ in range(3):
        before = params
        params, loss = mapped_step(params, put(x), put(y))
        assert all(p.is_deleted() for p in jax.tree.leaves(before))
    check((params, loss), trained(x, y, 3), 1e-4)


def test_donation_of_what_a_collective_reads() -> None:
    """The result may lie where the operand was."""
    x = numbers((SIZE * 4, 5))

    def f(x, y):
        return lax.ppermute(x, "x", SHIFT), lax.psum(y, "x") + x

    donating = jax.jit(
        jax.shard_map(f, mesh=MESH, in_specs=P("x"), out_specs=P("x")), donate_argnums=(0, 1)
    )
    want = simulated(f, x, x + 1)
    for _ in range(3):
        a, b = put(x), put(x + 1)
        got = donating(a, b)
        assert a.is_deleted()
        assert b.is_deleted()
        check(got, want)


def attention(q, k, v, bias=0.0):
    scores = jnp.einsum("shd,thd->hst", q, k) / np.sqrt(q.shape[-1]) + bias
    return jnp.einsum("hst,thd->shd", jax.nn.softmax(scores, -1), v)


def test_sequence_parallel_attention_by_all_to_all() -> None:
    """Ulysses: from a sharded sequence to sharded heads and back."""
    q, k, v = (normal((2 * D, D, 4), i) for i in range(3))

    def f(*qkv):
        heads = [lax.all_to_all(x, "x", 1, 0, tiled=True) for x in qkv]
        return lax.all_to_all(attention(*heads), "x", 0, 1, tiled=True)

    check(mapped(f)(put(q), put(k), put(v)), local(attention, q, k, v), 1e-4)


def test_ring_attention() -> None:
    """Keys and values go round; the softmax is accumulated."""
    q, k, v = (normal((2 * D, 2, 4), i) for i in range(3))

    def f(q, k, v):
        def step(_, carry):
            k, v, top, norm, total = carry
            scores = jnp.einsum("shd,thd->hst", q, k) / np.sqrt(q.shape[-1])
            high = jnp.maximum(top, scores.max(-1))
            weights, old = jnp.exp(scores - high[..., None]), jnp.exp(top - high)
            norm = norm * old + weights.sum(-1)
            total = total * old.T[..., None] + jnp.einsum("hst,thd->shd", weights, v)
            k, v = lax.ppermute((k, v), "x", SHIFT)
            return k, v, high, norm, total

        heads, rows = q.shape[1], q.shape[0]
        top = varying(jnp.full((heads, rows), -jnp.inf))
        carry = (k, v, top, varying(jnp.zeros((heads, rows))), jnp.zeros_like(q))
        _, _, _, norm, total = lax.fori_loop(0, SIZE, step, carry)
        return total / norm.T[..., None]

    check(mapped(f)(put(q), put(k), put(v)), local(attention, q, k, v), 1e-4)


def test_attention_with_a_sharded_sequence_by_constraints() -> None:
    q, k, v = (normal((2 * D, 2, 4), i) for i in range(3))

    def f(q, k, v):
        k, v = lax.with_sharding_constraint((k, v), NamedSharding(MESH, P()))
        return lax.with_sharding_constraint(attention(q, k, v), NamedSharding(MESH, P("x")))

    def loss(q, k, v):
        return (f(q, k, v) ** 2).sum()

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(put(q), put(k), put(v))
    want = local(jax.grad(lambda q, k, v: (attention(q, k, v) ** 2).sum(), (0, 1, 2)), q, k, v)
    check(got, want, 1e-3)


def test_expert_parallel() -> None:
    """Tokens go to the rank of their expert and back."""
    tokens, experts = 4 * SIZE, normal((SIZE, 5, 5), 1)
    x = normal((SIZE * tokens, 5))
    choice = np.random.default_rng(0).integers(0, SIZE, SIZE * tokens)

    def f(x, choice, expert):
        one_hot = jax.nn.one_hot(choice, SIZE, dtype=jnp.int32)
        slot = (jnp.cumsum(one_hot, 0) * one_hot).sum(1) - 1
        sent = jnp.zeros((SIZE, tokens, 5)).at[choice, slot].set(x)
        here = lax.all_to_all(sent, "x", 0, 0)
        back = lax.all_to_all(jnp.tanh(here @ expert[0]), "x", 0, 0)
        return back[choice, slot]

    got = mapped(f)(put(x), put(choice.astype(np.int32)), put(experts))
    check(got, local(lambda: jnp.tanh(jnp.einsum("ti,tij->tj", x, experts[choice]))), 1e-4)


def test_pipeline() -> None:
    """A stage on each rank, as many micro-batches; forward and backward."""
    weights, x = normal((SIZE, 4, 4), 1) / 2, normal((5, 3, 4))

    def f(w, x):
        w, stage = w[0], lax.axis_index("x")

        def step(carry, t):
            first = x[jnp.clip(t, 0, len(x) - 1)]
            y = jnp.tanh(jnp.where(stage == 0, first, carry) @ w)
            return lax.ppermute(y, "x", SHIFT), y

        carry = varying(jnp.zeros(x.shape[1:]))
        _, out = lax.scan(step, carry, jnp.arange(len(x) + SIZE - 1))
        return lax.psum(jnp.where(stage == SIZE - 1, out[SIZE - 1 :], 0), "x")

    def reference(w, x):
        for i in range(SIZE):
            x = jnp.tanh(x @ w[i])
        return x

    piped = jax.shard_map(f, mesh=MESH, in_specs=(P("x"), P()), out_specs=P())
    check(jax.jit(piped)(put(weights), put(x, P())), local(reference, weights, x), 1e-4)
    got = jax.jit(jax.grad(lambda w, x: (piped(w, x) ** 2).sum()))(put(weights), put(x, P()))
    want = local(jax.grad(lambda w, x: (reference(w, x) ** 2).sum()), weights, x)
    check(got, want, 1e-4)


def test_halo_exchange() -> None:
    """Heat along a ring of blocks: ten steps in one program."""
    x = normal((SIZE * 5,))

    def f(x):
        def step(_, x):
            left = lax.ppermute(x[-1:], "x", SHIFT)
            right = lax.ppermute(x[:1], "x", [(b, a) for a, b in SHIFT])
            wide = jnp.concatenate([left, x, right])
            return x + 0.1 * (wide[2:] + wide[:-2] - 2 * x)

        return lax.fori_loop(0, 10, step, x)

    def reference(x):
        def step(_, x):
            return x + 0.1 * (jnp.roll(x, 1) + jnp.roll(x, -1) - 2 * x)

        return lax.fori_loop(0, 10, step, x)

    check(mapped(f)(put(x)), local(reference, x), 1e-5)


def test_conjugate_gradients() -> None:
    """A loop whose length the residual of all decides, on a sharded matrix."""
    a = normal((D, D))
    a, b = a @ a.T + D * np.eye(D, dtype=np.float32), normal((D,), 1)

    def f(a, b):
        return jax.scipy.sparse.linalg.cg(lambda v: a @ v, b, tol=1e-6)[0]

    check(jax.jit(f)(put(a), put(b)), local(jnp.linalg.solve, a, b), 1e-3)


def test_gradient_and_hessian_of_a_sharded_loss() -> None:
    x, w = normal((D, 3)), normal((3,), 1)

    def loss(w, x):
        return jax.nn.softplus(x @ w).mean()

    def f(w, x):
        return jax.value_and_grad(loss)(w, x), jax.hessian(loss)(w, x)

    check(jax.jit(f)(put(w, P()), put(x)), local(f, w, x), 1e-5)
