"""A small language model, trained data- and tensor-parallel on any devices that JAX sees.

A transformer over characters, in plain JAX: weights and batches are global arrays over a mesh
`data x model`, one jitted step trains them, and XLA puts in the communication. Nothing here knows
how many processes there are or what connects them; under mpi_cuda each MPI rank is one device:

    JAX_PLATFORMS=mpi_cuda mpirun -n 4 python examples/train_lm.py --mesh 2x2

and without MPI the same program runs on one device, or on several of one process:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/train_lm.py --mesh 2x2

Every process runs the same code on the same global arrays, and touches only its own shards. The
batch of a step depends on the seed and the step alone, so the losses are those of one device up to
rounding.

With --checkpoint, SIGTERM to any of several processes lets all of them save after the same step and
end, to be resumed: a batch system sends it before it ends a job (examples/slurm/time_limit.sbatch).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BETA1, BETA2, EPSILON, DECAY, CLIP = 0.9, 0.95, 1e-8, 0.1, 1.0
TEMPERATURE = 0.7

Tree = Any
"""Nested dictionaries, with the same keys for weights, their shardings and their moments."""


# The text.

NUMBERS = "zero one two three four five six seven eight nine ten eleven".split()
ANIMALS, COLOURS = "cat dog owl cow hen".split(), "red blue old wild small".split()
VERBS = "sees likes hears meets".split()


def synthetic_text(sentences: int = 20_000) -> str:
    """Animals that meet and are added up: easy to learn, and a reader sees what was learnt."""
    rng = np.random.default_rng(0)
    lines = []
    for a, b, verb, how, who, whom in rng.integers((7, 6, 4, 5, 5, 5), size=(sentences, 6)):
        lines += [
            f"the {COLOURS[how]} {ANIMALS[who]} {VERBS[verb]} the {ANIMALS[whom]}.",
            f"{NUMBERS[a]} {ANIMALS[who]}s and {NUMBERS[b]} {ANIMALS[who]}s "
            f"are {NUMBERS[a + b]} {ANIMALS[who]}s.",
        ]
    return "\n".join(lines)


class Corpus:
    """Text as numbers of its characters."""

    def __init__(self, text: str):
        self.text, self.characters = text, sorted(set(text))
        number = {character: i for i, character in enumerate(self.characters)}
        self.tokens = np.array([number[character] for character in text], np.int32)

    def batch(self, seed: int, step: int, shape: tuple[int, int], sharding) -> jax.Array:
        """Random pieces of the text. All processes draw where each piece of the whole batch
        begins, and cut out only those of their own devices."""
        pieces, length = shape
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(len(self.tokens) - length + 1, size=pieces)

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            return self.tokens[starts[index[0], None] + np.arange(length)]

        return jax.make_array_from_callback(shape, sharding, rows)

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(self.characters[token] for token in tokens)


# The model.


class Model(NamedTuple):
    """Sizes, and the type of activations; weights are float32."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    context: int
    dtype: str


@dataclass(frozen=True)
class Weight:
    """Shape, placement on the mesh, and standard deviation at the start."""

    shape: tuple[int, ...]
    spec: P
    scale: float = 0.0


def weights(model: Model) -> Tree:
    """All weights. Heads and hidden units are divided over the axis `model`, so a block takes one
    sum over it after attention and one after the MLP; the other weights are on every device."""
    n, width, heads, size = model.layers, model.width, model.heads, model.width // model.heads
    scale, last = width**-0.5, (2 * n * width) ** -0.5
    return {
        "embedding": Weight((model.vocabulary, width), P(), 0.1),
        "position": Weight((model.context, width), P(), 0.1),
        "norm": Weight((width,), P()),
        "blocks": {
            "norm1": Weight((n, width), P()),
            "qkv": Weight((n, width, 3, heads, size), P(None, None, None, "model"), scale),
            "out": Weight((n, heads, size, width), P(None, "model"), last),
            "norm2": Weight((n, width), P()),
            "up": Weight((n, width, 4 * width), P(None, None, "model"), scale),
            "down": Weight((n, 4 * width, width), P(None, "model"), last / 2),
        },
    }


def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """Root mean square normalisation, in float32."""
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    return (y * (1 + gain)).astype(x.dtype)


def logits(model: Model, params: Tree, tokens: jax.Array) -> jax.Array:
    """Scores of each next character."""

    def cast(w: jax.Array) -> jax.Array:
        return w.astype(model.dtype)

    def block(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        q, k, v = jnp.einsum("btw,wshd->sbthd", norm(x, w["norm1"]), cast(w["qkv"]))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x += jnp.einsum("bthd,hdw->btw", y, cast(w["out"]))
        y = jax.nn.gelu(norm(x, w["norm2"]) @ cast(w["up"]))
        return x + y @ cast(w["down"]), None

    x = cast(params["embedding"][tokens] + params["position"])
    x, _ = jax.lax.scan(block, x, params["blocks"])
    x = norm(x, params["norm"]) @ cast(params["embedding"].T)
    return x.astype(jnp.float32)


def mean_loss(model: Model, params: Tree, pieces: jax.Array) -> jax.Array:
    """Cross-entropy of each character of the pieces after those before it, in nats."""
    scores = jax.nn.log_softmax(logits(model, params, pieces[:, :-1]))
    return -jnp.take_along_axis(scores, pieces[:, 1:, None], axis=-1).mean()


def generate(model: Model, length: int, seed: int, params: Tree, prompt: jax.Array) -> jax.Array:
    """Draws characters one by one, each after the last `context` ones."""

    def draw(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = logits(model, params, window[None])[0, -1]
        token = jax.random.categorical(key, scores / TEMPERATURE).astype(window.dtype)
        return jnp.append(window[1:], token), token

    keys = jax.random.split(jax.random.key(seed), length)
    return jax.lax.scan(draw, prompt, keys)[1]


# Training.


class State(NamedTuple):
    """What a step changes: the weights, and AdamW's averages of gradients and their squares."""

    step: jax.Array
    params: Tree
    mean: Tree
    square: Tree


def initial_state(model: Model, mesh: Mesh, seed: int) -> State:
    """All processes draw the same numbers, and keep those of their own devices."""
    rng = np.random.default_rng(seed)

    def place(x: np.ndarray, spec: P) -> jax.Array:
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    def draw(w: Weight) -> jax.Array:
        return place(w.scale * rng.standard_normal(w.shape, np.float32), w.spec)

    def zero(w: Weight) -> jax.Array:
        return place(np.zeros(w.shape, np.float32), w.spec)

    params, mean, square = (jax.tree.map(f, weights(model)) for f in (draw, zero, zero))
    return State(place(np.zeros((), np.int32), P()), params, mean, square)


def train_step(
    model: Model, peak: float, steps: int, state: State, pieces: jax.Array
) -> tuple[State, jax.Array]:
    """One step of AdamW, with clipped gradients, a linear warmup and a cosine decay."""
    loss, grads = jax.value_and_grad(partial(mean_loss, model))(state.params, pieces)
    size = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1, CLIP / size), grads)

    step = state.step + 1
    warmup = max(1, steps // 10)
    rate = peak * jnp.minimum(step / warmup, 0.55 + 0.45 * jnp.cos(jnp.pi * step / steps))
    mean = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, state.mean, grads)
    square = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g**2, state.square, grads)

    def update(w: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
        m, s = m / (1 - BETA1**step), s / (1 - BETA2**step)
        return w - rate * (m / (jnp.sqrt(s) + EPSILON) + DECAY * w)

    return State(step, jax.tree.map(update, state.params, mean, square), mean, square), loss


# Checkpoints.


class Checkpoints:
    """A folder that all processes see, with one file per process and `checkpoint.json`, which
    names the one complete step. It is replaced once the files of all processes are there."""

    def __init__(self, folder: Path, mesh: Mesh, run: dict[str, Any]):
        self.folder, self.mesh, self.manifest = folder, mesh, folder / "checkpoint.json"
        data, model = mesh.devices.shape
        self.run = {"mesh": f"{data}x{model}", "processes": jax.process_count()} | run

    def file(self, step: int) -> Path:
        return self.folder / f"step{step}_process{jax.process_index()}.npz"

    def save(self, state: State, step: int, losses: list[float]) -> None:
        """Each process writes what its devices hold, replicas once: they have the same key."""
        shards = {
            shard_key(path, x, shard.index): np.asarray(shard.data)
            for path, x in jax.tree_util.tree_leaves_with_path(state)
            for shard in x.addressable_shards
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        replace(self.file(step), lambda file: np.savez(file, **shards))
        self.wait_for_all()
        if jax.process_index() == 0:
            text = json.dumps({"step": step, "run": self.run, "losses": losses})
            replace(self.manifest, lambda file: file.write(text.encode()))
        self.wait_for_all()
        for old in self.folder.glob(f"step*_process{jax.process_index()}.npz"):
            if old != self.file(step):
                old.unlink()

    def wait_for_all(self) -> None:
        """A sum over all devices is known once every process has come here."""
        n = self.mesh.size
        everywhere = NamedSharding(self.mesh, P(self.mesh.axis_names))
        ones = jax.make_array_from_callback((n,), everywhere, lambda i: np.ones(n, np.int32)[i])
        jax.block_until_ready(jax.jit(jnp.sum, out_shardings=NamedSharding(self.mesh, P()))(ones))

    def load(self, like: State) -> tuple[State, list[float]]:
        """The state and the losses up to it; refuses what would not continue the same run."""
        if not self.manifest.exists():
            raise SystemExit(f"there is no complete checkpoint in {self.folder}")
        saved = json.loads(self.manifest.read_text())
        other = "; ".join(
            f"{name} was {saved['run'].get(name)} and is {value}"
            for name, value in self.run.items()
            if saved["run"].get(name) != value
        )
        if other:
            raise SystemExit(f"the checkpoint in {self.folder} is of another run: {other}")
        with np.load(self.file(saved["step"])) as shards:

            def read(path, x: jax.Array) -> jax.Array:
                return jax.make_array_from_callback(
                    x.shape, x.sharding, lambda index: shards[shard_key(path, x, index)]
                )

            return jax.tree_util.tree_map_with_path(read, like), saved["losses"]


def shard_key(path, x: jax.Array, index: tuple[slice, ...]) -> str:
    """Which part of which array, as `.params['norm'][0:64]`."""
    parts = [s.indices(n)[:2] for s, n in zip(index, x.shape, strict=True)]
    return jax.tree_util.keystr(path) + "[" + ",".join(f"{a}:{b}" for a, b in parts) + "]"


def replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that is there as a whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


# The program.


def progress(step: int, steps: int, loss: float, rate: float) -> None:
    """A bar that stays on one line of a terminal, or about twenty lines of a file."""
    terminal, last = sys.stdout.isatty(), step == steps
    if terminal or last or step % -(-steps // 20) == 0:
        bar = "#" * (30 * step // steps)
        text = f"[{bar:.<30}] step {step}/{steps}  loss {loss:.4f}  {rate:,.0f} tokens/s"
        print(text, end="\r" if terminal and not last else "\n", flush=True)


def plot(losses: list[float], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=100, layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.grid(alpha=0.3)
    figure.savefig(file, format="png")


def mesh_shape(text: str) -> tuple[int, int]:
    data, model = map(int, text.split("x"))
    return data, model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--mesh", type=mesh_shape, metavar="DxM", help="data x model (default: all data)")
    add("--text", type=Path, help="file to learn (default: a synthetic text)")
    add("--steps", type=int, default=300, help="of the whole run, which sets the learning rates")
    add("--stop", type=int, help="end after this step, to resume later")
    add("--batch", type=int, default=32, help="pieces of text a step, over all devices")
    add("--context", type=int, default=64, help="characters of a piece")
    add("--layers", type=int, default=2)
    add("--width", type=int, default=64)
    add("--heads", type=int, default=4)
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of activations")
    add("--lr", type=float, default=1e-2, help="highest learning rate")
    add("--seed", type=int, default=0)
    add("--checkpoint", type=Path, metavar="DIR", help="folder that all processes see")
    add("--every", type=int, default=100, help="steps between checkpoints; there is one at the end")
    add("--resume", action="store_true", help="continue from the checkpoint")
    add("--losses", type=Path, metavar="FILE", help="write steps and losses as text")
    add("--plot", type=Path, metavar="FILE", help="draw the losses as PNG")
    add("--sample", type=int, default=200, help="characters to generate at the end")
    return parser.parse_args()


def make_mesh(shape: tuple[int, int] | None) -> Mesh:
    data, model = shape = shape or (jax.device_count(), 1)
    if min(shape) < 1 or data * model != jax.device_count():
        raise SystemExit(f"a mesh {data}x{model} does not fit {jax.device_count()} devices")
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def asked_to_stop(step: int) -> bool:
    """Whether a process has got SIGTERM. Each calls it after each step, and the answer is True in
    the same step in all of them."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def stopped_after(step: int) -> int:
    if jax.process_index() == 0:
        print(f"stopped after step {step}, to be resumed")
    return 0


def main() -> int:
    arguments = parse()
    batch, context = arguments.batch, arguments.context
    mesh, first = make_mesh(arguments.mesh), jax.process_index() == 0
    data, parts = mesh.devices.shape
    if batch % data or arguments.heads % parts or arguments.width % arguments.heads:
        raise SystemExit(f"{data} must divide --batch, {parts} --heads, and --heads --width")
    corpus = Corpus(arguments.text.read_text("utf-8") if arguments.text else synthetic_text())
    if len(corpus.tokens) <= context:
        raise SystemExit(f"the text has only {len(corpus.tokens)} characters")
    sizes = {name: getattr(arguments, name) for name in Model._fields[1:]}
    model = Model(len(corpus.characters), **sizes)

    state, losses = initial_state(model, mesh, arguments.seed), []
    checkpoints = None
    if arguments.checkpoint:
        run = {name: getattr(arguments, name) for name in ("steps", "batch", "lr", "seed")}
        run["text"] = hashlib.sha256(corpus.text.encode()).hexdigest()[:16]
        checkpoints = Checkpoints(arguments.checkpoint, mesh, run | sizes)
        if arguments.resume:
            state, losses = checkpoints.load(state)
        elif checkpoints.manifest.exists():
            raise SystemExit(f"{arguments.checkpoint} has a checkpoint: --resume or remove it")
    elif arguments.resume:
        raise SystemExit("--resume needs --checkpoint")
    done, stop = len(losses), min(arguments.steps, arguments.stop or arguments.steps)
    if first:
        count = sum(weight.size for weight in jax.tree.leaves(state.params))
        print(
            f"{count:,} weights, {mesh.size} devices ({data} data x {parts} model) of "
            f"{jax.process_count()} processes, {done} steps done"
        )

    shardings = jax.tree.map(lambda x: x.sharding, state)
    everywhere, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    train = jax.jit(
        partial(train_step, model, arguments.lr, arguments.steps),
        in_shardings=(shardings, by_rows),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
    # The first call takes the signal from here on, before the long first step.
    if checkpoints and asked_to_stop(done):
        return stopped_after(done)
    start = time.perf_counter()
    for step in range(done + 1, stop + 1):
        pieces = corpus.batch(arguments.seed, step, (batch, context + 1), by_rows)
        state, loss = train(state, pieces)
        losses.append(float(loss))
        if step == done + 1:  # compiles, so it does not count
            start = time.perf_counter()
        elif first:
            rate = (step - done - 1) * batch * context / (time.perf_counter() - start)
            progress(step, stop, losses[-1], rate)
        stopped = checkpoints is not None and asked_to_stop(step)
        if checkpoints and (stopped or step == stop or step % arguments.every == 0):
            checkpoints.save(state, step, losses)
        if stopped:
            return stopped_after(step)

    if first and arguments.losses:
        lines = [f"{step} {loss:.9g}\n" for step, loss in enumerate(losses, 1)]
        arguments.losses.write_text("".join(lines))
    if first and arguments.plot:
        plot(losses, arguments.plot)
        print(f"picture: {arguments.plot.resolve()}")
    if arguments.sample:
        prompt = corpus.tokens[:context]
        write = partial(generate, model, arguments.sample, arguments.seed, prompt=prompt)
        sample = np.asarray(jax.jit(write, out_shardings=everywhere)(state.params))
        if first:
            print(corpus.decode(prompt).rpartition("\n")[2] + corpus.decode(sample))
    return 0


if __name__ == "__main__":
    sys.exit(main())
