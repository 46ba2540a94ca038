"""What JAX's own CPU backend does over gloo where the two processes of a program differ.

Usage: python tests/peers/gloo_faults.py. Starts two processes for each mistake, and prints what was
seen of each: the numbers that it got, the last line of an error, or that it still waited after
LIMIT seconds. `docs/faults.md` has the results.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

LIMIT = 20

BEGIN = """if True:
    import os, sys, time
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    R = int(sys.argv[1])
    jax.distributed.initialize(sys.argv[2], 2, R)
    MESH = jax.make_mesh((2,), ("x",))
    def over(function):
        spec = jax.P("x")
        return jax.jit(jax.shard_map(function, mesh=MESH, in_specs=spec, out_specs=spec))
    def array(count, dtype="float32"):
        shape = (2 * count,)
        sharding = jax.NamedSharding(MESH, jax.P("x"))
        return jax.make_array_from_callback(
            shape, sharding, lambda i: np.arange(2 * count, dtype=dtype)[i])
    psum = over(lambda x: jax.lax.psum(x, "x"))
    pmax = over(lambda x: jax.lax.pmax(x, "x"))
    def show(x):
        print(np.asarray(x.addressable_shards[0].data).tolist()[:6], flush=True)
    show(psum(array(3)))
"""

MISTAKES = {
    "another reduction": "show((psum if R else pmax)(array(3)))",
    "another length": "show(psum(array(3 + R)))",
    "another dtype": "show(psum(array(3, 'int32' if R else 'float32')))",
    "another order": """
for f in (psum, pmax) if R else (pmax, psum): show(f(array(3)))""",
    "loops of other lengths": """
show(over(lambda x: jax.lax.fori_loop(
    0, 4 if R else 2, lambda i, x: jax.lax.psum(x, 'x') / 2 + 0 * x, x))(array(3)))
show(psum(array(3)))""",
    "a missing collective": "R or show(psum(array(3)))",
    "a rank that was killed": "R and os.kill(os.getpid(), 9)\nshow(psum(array(3)))",
}


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def seen(code: str) -> list[str]:
    lines = "".join(f"    {line}\n" for line in code.strip().splitlines())
    address = f"127.0.0.1:{port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN + lines, str(rank), address],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    end = time.monotonic() + LIMIT
    texts = []
    for rank in ranks:
        try:
            out, errors = rank.communicate(timeout=max(end - time.monotonic(), 0.1))
            waited = ""
        except subprocess.TimeoutExpired:
            rank.kill()
            out, errors = rank.communicate()
            waited = f", waits after {LIMIT} s"
        said = [line for line in errors.splitlines() if "Error" in line or "error" in line]
        lists = [line for line in out.splitlines() if line.startswith("[") and line[-1] == "]"]
        numbers = " ".join(lists[1:]) or "nothing"
        last = f", says {said[-1][:160]}" if said else ""
        texts.append(f"{numbers}, status {rank.returncode}{waited}{last}")
    return texts


def main() -> None:
    for name, code in MISTAKES.items():
        for rank, text in enumerate(seen(code)):
            print(f"{name:24} rank {rank}: {text}", flush=True)


main()
