"""Optimized modules compile again as they are, with the same results (`tests/gpu/recompile.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "gpu" / "recompile.py"


def test_optimized_modules_compile_again_as_they_are(tmp_path: Path) -> None:
    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "JAX_PLATFORMS": "mpi_cuda", **variables}
        environment.pop("MPI_CUDA_RANK_PROCESS", None)
        command = [sys.executable, str(SCRIPT), str(tmp_path / "results.npz")]
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)

    first = run()
    assert first.returncode == 0, first.stderr
    second = run(MPI_CUDA_RECOMPILE="1")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "0 differ" in second.stdout
    assert second.stderr.count("compiled an optimized program again as it is") >= 25
