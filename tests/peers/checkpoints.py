"""A rank's part of `checkpoints`: saves and loads an array of all ranks. FOLDER is empty, and the
same on all ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.array_serialization import pytree_serialization, serialization

SHARDED = jax.NamedSharding(jax.make_mesh((jax.device_count(),), ("x",)), jax.P("x"))
SHAPE = (4 * jax.device_count(),)
WHOLE = np.arange(SHAPE[0], dtype=np.float32)
ARRAY = jax.make_array_from_callback(SHAPE, SHARDED, WHOLE.__getitem__)


def check(found: jax.Array, name: str) -> None:
    for own, other in zip(found.addressable_shards, ARRAY.addressable_shards, strict=True):
        np.testing.assert_array_equal(own.data, other.data, name)
    if jax.process_index() == 0:
        print(f"{name}: 1 passed", flush=True)


def main(folder: Path) -> None:
    for turn in range(5):
        path = folder / f"tree{turn}"
        pytree_serialization.save({"a": ARRAY}, path)
        check(pytree_serialization.load(path, {"a": SHARDED})["a"], "pytree_serialization")
    path = str(folder / "arrays")
    arrays = serialization.GlobalAsyncCheckpointManager()
    arrays.serialize_with_paths([ARRAY], [path])
    arrays.wait_until_finished()
    check(arrays.deserialize_with_paths([SHARDED], [path])[0], "GlobalAsyncCheckpointManager")
    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder / "orbax", options=keep) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.StandardSave({"a": ARRAY}))
        manager.wait_until_finished()
        wanted = {"a": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=SHARDED)}
        check(manager.restore(2, args=ocp.args.StandardRestore(wanted))["a"], "orbax")
        assert manager.all_steps() == [1, 2]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
