"""What our `.pth` file costs a Python that has nothing to do with us, in microseconds: reading it,
as Python's start does, and whole processes with it and without it, taken in turns.

Usage: python start_up.py [RUNS]
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PYTHON = Path(__file__).parents[2] / "python"
RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
#: What stands in the file, and the variables of the process.
CASES = {
    "without the file": (None, {}),
    "with it": ("file", {}),
    "with it, off": ("file", {"MPI_CUDA_STARTUP": "0"}),
    "with it, in a rank": ("file", {"OMPI_COMM_WORLD_SIZE": "2"}),
    "always importing the module": ("import mpi_cuda_startup\n", {}),
}
SELECTING = ("JAX_PLATFORMS", "MPI_CUDA", "OMPI_", "PMI", "PYTHON")


def environments(folder: Path) -> dict[str, Path]:
    """A Python for each content of the file, each in an environment with nothing else."""
    pythons = {}
    for number, content in enumerate({content for content, _ in CASES.values()}, 1):
        place = folder / str(number)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
        site = next(place.glob("lib/python*/site-packages"))
        shutil.copy(PYTHON / "mpi_cuda_startup.py", site)
        if content is not None:
            file = PYTHON / "mpi_cuda_startup.pth"
            text = file.read_text() if content == "file" else content
            (site / file.name).write_text(text)
        pythons[str(content)] = place / "bin" / "python"
    return pythons


def run(python: Path, variables: dict[str, str], code: str) -> tuple[float, str]:
    """Microseconds of a process, and what it prints."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(SELECTING)} | variables
    start = time.perf_counter()
    printed = subprocess.run([python, "-c", code], env=own, capture_output=True, text=True)
    return (time.perf_counter() - start) * 1e6, printed.stdout


READING = f"""if True:
    import site, timeit
    read = lambda: site.addpackage({str(PYTHON)!r}, "mpi_cuda_startup.pth", set())
    print(min(timeit.repeat(read, number=10, repeat=1000)) * 1e5)
"""

with tempfile.TemporaryDirectory() as folder:
    pythons = environments(Path(folder))
    times: dict[str, list[float]] = {case: [] for case in CASES}
    modules = {}
    for case, (content, variables) in CASES.items():
        code = "import sys; print(*sys.modules)"
        modules[case] = set(run(pythons[str(content)], variables, code)[1].split())
    bare_python = pythons["None"]
    print(f"reading the file {float(run(bare_python, {}, READING)[1]):.1f}")
    for _ in range(RUNS):
        for case, (content, variables) in CASES.items():
            times[case].append(run(pythons[str(content)], variables, "pass")[0])
    bare = times["without the file"]
    for case, taken in times.items():
        more = sorted(modules[case] - modules["without the file"])
        differences = [mine - other for mine, other in zip(taken, bare, strict=True)]
        print(
            f"{case:28} median {statistics.median(taken):7.0f}, shortest {min(taken):7.0f}, "
            f"more than without {statistics.median(differences):5.0f}; modules: {' '.join(more)}"
        )
