"""Raw MPI, mpi4jax and ours in one run, interleaved; medians as a table, raw output kept.

Called by scripts/bench.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
OPERATIONS = ["allreduce", "sendrecv", "allgather", "alltoall"]


def main() -> int:
    """Runs all variants in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mpi", default="openmpi", choices=["openmpi", "mpich"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max", type=int, default=1 << 27, help="largest message in bytes")
    parser.add_argument("--operations", nargs="*", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--collectives", action="store_true", help="JAX's own, and gloo")
    parser.add_argument(
        "--small-pages", action="store_true", help="C's arrays in small pages, not in huge ones"
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    sizes = [s for s in (8, 1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 27) if s <= arguments.max]
    arguments.out.mkdir(exist_ok=True)
    program = arguments.out / f"loop_{arguments.mpi}"
    source = HERE / "loop.c"
    subprocess.run([f"mpicc.{arguments.mpi}", "-O3", "-o", program, source], check=True)
    launch = [f"mpirun.{arguments.mpi}", "-n", "2"]
    python = [sys.executable, str(HERE / "loop.py")]
    raw_mpi = [str(program), *(["--small-pages"] if arguments.small_pages else [])]
    variants = {"C": raw_mpi, "ours": [*python, "ours"]}
    if arguments.collectives:
        variants = {name: [*python, name] for name in ("collectives", "gloo")}
        variants["C"] = raw_mpi
    elif importlib.util.find_spec("mpi4jax"):
        variants["mpi4jax"] = [*python, "mpi4jax"]
    raw = arguments.out / f"bench{'_collectives' * arguments.collectives}_{arguments.mpi}.txt"
    with raw.open("w") as log:
        for operation in arguments.operations:
            times: dict[tuple[str, str, int], list[float]] = defaultdict(list)
            for round_number in range(arguments.rounds):
                for name, command in variants.items():
                    platform = "mpi_cuda" if name in ("ours", "collectives") else "cpu"
                    result = subprocess.run(
                        [*launch, *command, operation, *map(str, within(name, sizes))],
                        env={**os.environ, "JAX_PLATFORMS": platform},
                        capture_output=True,
                        text=True,
                        timeout=300,
                    )
                    log.write(f"# {operation} {name} round {round_number}\n{result.stdout}")
                    if result.returncode:
                        print(f"{operation} {name} failed:\n{result.stderr[-2000:]}")
                    for line in result.stdout.splitlines():
                        # gloo says things too.
                        if line.split()[:1] in (["once"], ["loop"], ["steady"]):
                            kind, size, value = line.split()
                            times[name, kind, int(size)].append(float(value))
            show(operation, sizes, times)
    print(f"raw output: {raw}")
    return 0


def within(name: str, sizes: list[int]) -> list[int]:
    """gloo would take minutes for large messages."""
    return [size for size in sizes if name != "gloo" or size <= 1 << 20]


def show(operation: str, sizes: list[int], times: dict[tuple[str, str, int], list[float]]) -> None:
    """Prints the medians of one operation, in microseconds."""
    names = ("ours", "mpi4jax", "collectives", "gloo")
    columns = [("C", "loop")]
    columns += [(name, kind) for kind in ("steady", "loop", "once") for name in names]
    columns = [c for c in columns if any((*c, size) in times for size in sizes)]
    header = " | ".join(f"{name} {kind}" for name, kind in columns)
    print(f"\n| {operation}, bytes per rank | {header} | ours/C |")
    print("| --- |" + " --- |" * (len(columns) + 1))
    for size in sizes:
        medians = {c: statistics.median(times[(*c, size)]) for c in columns if times[(*c, size)]}
        cells = [f"{medians[c]:.2f}" if c in medians else "" for c in columns]
        collectives = any(("collectives", "loop", size) in times for size in sizes)
        ours = "collectives" if collectives else "ours"
        best = medians.get((ours, "steady"), medians.get((ours, "loop"), float("nan")))
        ratio = best / medians[("C", "loop")]
        print(f"| {size} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
