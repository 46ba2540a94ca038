"""The main job: the shallow-water model gives the same fields on any number of ranks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs import MPIS, environment

MODEL = Path(__file__).parents[2] / "examples" / "shallow_water.py"


def model(mpi: str, ranks: int, folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """Runs it on a small grid; its fields and what it printed."""
    fields = folder / f"{mpi}_{ranks}.npz"
    options = ["--nx=36", "--ny=24", "--days=1", "--frames=3"]
    options += [f"--save={fields}", f"--pictures={folder}"]
    result = subprocess.run(
        [f"mpirun.{mpi}", "-n", str(ranks), sys.executable, MODEL, *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    with np.load(fields) as saved:
        return dict(saved), result.stdout + result.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, np.ndarray]:
    return model("openmpi", 1, tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.parametrize(("mpi", "ranks"), [("openmpi", 3), ("mpich", 2), ("mpich", 4)])
def test_fields_are_the_same_on_any_number_of_ranks(mpi, ranks, alone, tmp_path) -> None:
    assert mpi in MPIS
    fields, printed = model(mpi, ranks, tmp_path)
    # The jet, not rest: fields could agree by being zero. Velocities and heights are of order 1.
    assert np.abs(alone["u"]).max() > 1 and np.abs(alone["h"]).max() > 1
    for name, expected in alone.items():
        np.testing.assert_allclose(fields[name], expected, rtol=0, atol=3e-5)
    for picture in re.findall(r"picture: (.+)", printed):
        assert Path(picture).stat().st_size > 1000
    assert len(re.findall(r"picture: .+\.(?:png|gif)", printed)) == 2
