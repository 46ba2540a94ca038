"""Trains a small transformer of Penzai's with Penzai's trainer, on the ranks of a job; run by
`tests/programs/penzai`. Prints the losses, which do not depend on the number of ranks but for
rounding."""

from __future__ import annotations

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from penzai import pz
from penzai.models.transformer.variants import llamalike_common
from penzai.toolshed import basic_training, sharding_util

STEPS, BATCHES, BATCH, LENGTH, VOCABULARY = 20, 2, 8, 16, 32
MESH = Mesh(np.array(jax.devices()), ("ranks",), axis_types=(AxisType.Auto,))


def tokens(number: int) -> pz.nx.NamedArray:
    """Sequences whose second half repeats the first, divided among the ranks."""
    half = np.random.default_rng(number).integers(1, VOCABULARY, (BATCH, LENGTH // 2))
    whole = np.concatenate([half, half], 1).astype(np.int32)
    sharding = NamedSharding(MESH, P("ranks"))
    array = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    return pz.nx.wrap(array).tag("batch", "seq")


def loss(model, state, rng, batch):
    logits = model(batch[{"seq": pz.slice[:-1]}])
    scores = pz.nx.nmap(jax.nn.log_softmax)(logits.untag("vocabulary")).tag("vocabulary")
    right = pz.nx.nmap(lambda all_scores, token: all_scores[token])(
        scores.untag("vocabulary"), batch[{"seq": pz.slice[1:]}]
    )
    mean = -right.untag("batch", "seq").mean().unwrap()
    return mean, state, {"loss": mean}


def main() -> None:
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=4,
        query_head_multiplier=1,
        embedding_dim=32,
        projection_dim=8,
        mlp_hidden_dim=64,
        num_decoder_blocks=2,
        vocab_size=VOCABULARY,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )
    # By Penzai's own way: the named axes that lie along the ranks, and all others whole.
    model = sharding_util.sharded_init(
        llamalike_common.build_llamalike_transformer,
        config,
        jax.random.key(0),
        mesh=MESH,
        axis_name_to_mesh_name={"neurons": "ranks", "vocabulary": "ranks"},
    )
    everywhere = NamedSharding(MESH, P())
    trainer = basic_training.StatefulTrainer.build(
        root_rng=jax.jit(lambda: jax.random.key(1), out_shardings=everywhere)(),
        model=model,
        optimizer_def=optax.adam(1e-2),
        loss_fn=loss,
    )

    def on_all(leaf):
        if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == MESH.size:
            return leaf
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, everywhere, lambda index: value[index])

    # Counters, which Penzai and optax make on this rank's device.
    trainer.state.value = jax.tree.map(on_all, trainer.state.value)
    batches = [tokens(number) for number in range(BATCHES)]
    losses = [float(trainer.step(batch=batches[step % BATCHES])["loss"]) for step in range(STEPS)]
    if jax.process_index() == 0:
        print(len(jax.devices()), "ranks:", *(f"{one:.6f}" for one in losses))


if __name__ == "__main__":
    main()
