"""The language model, a program of plain JAX: its losses are the same on any number of ranks, in
one process without MPI, and after a resume."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jobs import environment, on_one

SCRIPT = Path(__file__).parents[2] / "examples" / "train_lm.py"
SIZES = ["--steps=30", "--batch=8", "--context=16", "--width=32", "--heads=4"]
PLAIN = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def launch(mpi: str | None, ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs it on ranks of that MPI, or with plain JAX on two devices of one process."""
    launcher = [f"mpirun.{mpi}", "-n", str(ranks)] if mpi else []
    return subprocess.run(
        [*launcher, sys.executable, SCRIPT, *SIZES, "--sample=0", *options],
        env=environment() if mpi else environment(**PLAIN),
        capture_output=True,
        text=True,
        timeout=80,
    )


def train(mpi: str | None, ranks: int, folder: Path, *options: str) -> np.ndarray:
    """The loss of each step."""
    file = folder / "losses.txt"
    result = launch(mpi, ranks, f"--losses={file}", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    steps, losses = np.loadtxt(file, unpack=True)
    np.testing.assert_array_equal(steps, np.arange(1, len(steps) + 1))
    return losses


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> np.ndarray:
    return train("openmpi", 1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[np.ndarray, Path]:
    """Losses of two ranks, and their picture."""
    folder = tmp_path_factory.mktemp("pair")
    return train("mpich", 2, folder, f"--plot={folder}/losses.png"), folder / "losses.png"


def agree(losses: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert len(losses) == 30


def test_it_learns(alone) -> None:
    # It starts with uniform guesses among 25 characters; their frequencies alone give 2.8.
    assert abs(alone[0] - np.log(25)) < 0.1 and alone[-5:].mean() < 2.7


def test_two_ranks_lose_as_one_and_draw_it(alone, pair) -> None:
    from PIL import Image

    losses, picture = pair
    agree(losses, alone)
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) >= 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 5


def test_four_ranks_data_and_tensor_parallel(alone, tmp_path) -> None:
    agree(train("openmpi", 4, tmp_path, "--mesh=2x2"), alone)


def test_plain_jax_without_mpi(alone, tmp_path) -> None:
    agree(train(None, 1, tmp_path, "--mesh=1x2"), alone)


def test_a_resumed_run_is_the_uninterrupted_one(pair, tmp_path) -> None:
    checkpoint = f"--checkpoint={tmp_path}/checkpoint"
    first = train("mpich", 2, tmp_path, checkpoint, "--every=10", "--stop=15")
    np.testing.assert_array_equal(first, pair[0][:15])
    files = [path.name for path in sorted((tmp_path / "checkpoint").iterdir())]
    assert files == ["checkpoint.json", "step15_process0.npz", "step15_process1.npz"]

    # Another mesh, in one process.
    other = launch(None, 1, checkpoint, "--resume", "--mesh=1x2")
    assert other.returncode != 0 and "mesh was 2x1 and is 1x2" in other.stderr, other.stderr
    assert "processes was 2 and is 1" in other.stderr

    resumed = train("mpich", 2, tmp_path, checkpoint, "--resume")
    np.testing.assert_array_equal(resumed, pair[0])


@on_one("mpich")
def test_sigterm_to_one_rank_stops_all_after_the_same_step(mpi: str, tmp_path) -> None:
    """As before a batch job's time limit, which reaches each rank at another moment."""
    checkpoint = tmp_path / "checkpoint"
    options = ["--steps=100000", f"--checkpoint={checkpoint}", "--every=1"]
    command = ["mpirun.mpich", "-n", "2", sys.executable, SCRIPT, *SIZES, *options]
    job = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not (checkpoint / "checkpoint.json").exists():
            assert job.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        os.kill(ranks_of(str(checkpoint))[-1], signal.SIGTERM)
        output, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 0, output
    stopped = re.search(r"stopped after step (\d+), to be resumed", output)
    assert stopped, output

    # What was saved is whole, and later steps go on from it.
    step = int(stopped[1])
    resumed = train(mpi, 2, tmp_path, *options, "--resume", f"--stop={step + 1}")
    assert len(resumed) == step + 1


def ranks_of(argument: str) -> list[int]:
    """The processes of Python that have got this in an argument."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if words[0] == sys.executable and any(argument in word for word in words):
            found.append(int(folder.name))
    return sorted(found)
