"""`python -m mpi_cuda bench` in whole jobs: values are right, and what cannot run is said."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jobs import MPIS, in_turn, job

#: The benchmark with arguments, by its module's name.
BENCH = "import runpy, sys; sys.argv[0] = 'bench'; runpy.run_module('mpi_cuda', {}, '__main__')"
#: What takes little time.
SHORT = ("--repeat", "1", "--iterations", "10", "--max", "64K")


def bench(mpi: str | None, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return job(mpi, BENCH, "bench", *words, **more)


@pytest.mark.parametrize("mpi", MPIS)
def test_all_operations_are_right_and_measured(mpi: str, tmp_path: Path) -> None:
    file, picture = tmp_path / "times.json", tmp_path / "times.png"
    libraries = ["mpi_cuda", "mpi", "mpi4py"] if mpi == "mpich" else ["mpi_cuda", "mpi"]
    files = ("--json", str(file), "--plot", str(picture))
    words = ("--check", "--min", "64K", "--against", ",".join(libraries[1:]))
    result = bench(mpi, *words, *files, *SHORT)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(file.read_text())
    assert found["ranks"] == 2 and found["status"] == 0 and found["absent"] == {}
    assert len({row["operation"] for row in found["rows"]}) == len(found["rows"]) == 9
    for row in found["rows"]:
        assert row["size"] == 65536 and list(row["libraries"]) == libraries
        for times in row["libraries"].values():
            assert times["wrong"] == 0 and len(times["series_by_rank"][0]) == 2
            assert 0 < times["best"] <= times["time"] < 10 and times["min"] <= times["max"]
            assert times["algbw"] == pytest.approx(row["size"] / times["time"] / 1e9)
    # The launcher may mix lines of others in.
    assert "#wrong" in result.stdout and "reduce_scatter: size of" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mpi", [row[0] for row in in_turn("gloo")])
def test_collectives_of_jax_beside_gloo(mpi: str, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    words = ("--style", "native", "--launch", "once", "--against", "gloo", "--check")
    result = bench(mpi, *words, "--min", "64K", "--json", str(file), *SHORT)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 5
    for row in found["rows"]:
        assert [one["wrong"] for one in row["libraries"].values()] == [0, 0], row
        assert set(row["libraries"]) == {"mpi_cuda", "gloo"}


def test_one_rank_has_no_peer_and_files_compare(tmp_path: Path) -> None:
    file = str(tmp_path / "times.json")
    short = ("--operations", "bcast", "--min", "8", "--max", "8", "--repeat", "1")
    result = bench(None, "--json", file, *short, "--dtype", "float64", "--check")
    assert result.returncode == 0, result.stderr
    assert "one rank has no peer" in result.stdout and " float64 " in result.stdout
    result = bench(None, "--compare", file, file)
    assert result.returncode == 0 and "times:mpi_cuda" in result.stdout, result.stderr


def test_what_cannot_be_done_is_refused_once() -> None:
    result = bench("openmpi", "--json", "/nowhere/times.json", *SHORT)
    said = "mpi_cuda bench: --json: No such file or directory: '/nowhere/times.json'"
    assert result.returncode == 2 and result.stderr.count(said) == 1, result.stderr
    result = bench(None, JAX_PLATFORMS="cpu")
    assert result.returncode == 2
    assert "JAX has started the backend cpu, and not mpi_cuda" in result.stderr
