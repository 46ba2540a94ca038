"""Two versions of this library in turn, on 2 ranks: what a change costs.

Usage: versions.py OTHER [ROUNDS [MPI]], with OTHER another checkout that scripts/setup has built,
and MPI openmpi or mpich, which is the default. Prints microseconds for each case: the median over
the rounds of OTHER and of this checkout, and the median of the ratios of each round; of "best" the
smallest of all rounds, and their ratio. Rounds alternate between the two, so that both see the same
machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OTHER = Path(sys.argv[1]).resolve()
ROUNDS = int(sys.argv[2]) if len(sys.argv) > 2 else 5
MPI = sys.argv[3] if len(sys.argv) > 3 else "mpich"
SIZES = ["8", "1024", "65536", "1048576", "16777216"]


def run(tree: Path, ranks: int, *arguments: str) -> str:
    """What a script of tests/bench prints with the library of `tree`."""
    python = [sys.executable, str(ROOT / "tests/bench" / arguments[0]), *arguments[1:]]
    launcher = [f"mpirun.{MPI}", "-n", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"PYTHONPATH": str(tree / "python"), "JAX_PLATFORMS": "mpi_cuda"}
    return subprocess.run(
        [*launcher, *python],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


def measure(tree: Path) -> dict[str, float]:
    """Microseconds by case."""
    times = {"launch of jit(x + 1)": float(run(tree, 1, "dispatch.py"))}
    called = run(tree, 2, "once.py", "allreduce", "8", "2000")
    times["one call of 8 B"] = float(called.split(": ")[1].split()[0])
    for operation in ("allreduce", "sendrecv"):
        for line in run(tree, 2, "loop.py", "ours", operation, *SIZES).splitlines():
            how, size, time = line.split()
            times[f"{operation} {how} {size}"] = float(time)
    return times


def main() -> None:
    rounds = []
    for number in range(ROUNDS):
        trees = [OTHER, ROOT] if number % 2 == 0 else [ROOT, OTHER]
        found = {tree: measure(tree) for tree in trees}
        rounds.append((found[OTHER], found[ROOT]))
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
    print(f"{'':30} {'other':>10} {'this':>10} {'ratio':>7}")
    for case in rounds[0][0]:
        typical = min if " best " in case else statistics.median
        other = typical(before[case] for before, _ in rounds)
        this = typical(after[case] for _, after in rounds)
        ratio = statistics.median(after[case] / before[case] for before, after in rounds)
        if typical is min:
            ratio = this / other
        print(f"{case:30} {other:10.3f} {this:10.3f} {ratio:7.3f}")


if __name__ == "__main__":
    main()
