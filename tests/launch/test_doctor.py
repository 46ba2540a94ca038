"""`python -m mpi_cuda doctor`: what it tells of a job, and what it answers where one cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import MPIS, environment, job

#: The doctor with arguments, by its module's name.
DOCTOR = "import runpy, sys; sys.argv[0] = 'doctor'; runpy.run_module('mpi_cuda', {}, '__main__')"
#: Where Debian has them.
NAMES = {"openmpi": "libmpi.so.40", "mpich": "libmpich.so.12"}


def doctor(mpi: str | None, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return job(mpi, DOCTOR, "doctor", *arguments, **variables)


def told(result: subprocess.CompletedProcess[str], status: int) -> dict[str, Any]:
    """The JSON that was printed, without what a launcher prints after it."""
    assert result.returncode == status, result.stdout + result.stderr
    found, _ = json.JSONDecoder().raw_decode(result.stdout)
    assert found["status"] == status
    return found


def problems(found: dict[str, Any]) -> str:
    texts = [one["text"] + " " + one["remedy"] for one in found["findings"]]
    kinds = [one["kind"] for one in found["findings"]]
    assert all(kind in ("problem", "note") for kind in kinds)
    return "\n".join(text for kind, text in zip(kinds, texts, strict=True) if kind == "problem")


@pytest.mark.parametrize("mpi", MPIS)
def test_a_job_is_told_and_measured(mpi: str, tmp_path: Path) -> None:
    picture = tmp_path / "times.png"
    found = told(doctor(mpi, "--json", "--plot", str(picture)), 0)
    assert problems(found) == "" and len(found["ranks"]) == 2
    for rank in found["ranks"]:
        assert NAMES[mpi] in rank["mpi"]["file"] and rank["mpi"]["by"] == "the launcher's"
        assert rank["mpi"]["launched"] == 2 and rank["mpi"]["thread_level"] == "multiple"
        assert rank["plugin"]["inner_version"] and rank["plugin"]["backend"]["devices"] == 2
        assert rank["cores"]["cores"] and rank["cores"]["threads"] >= 1
        assert rank["memory"]["size"] and rank["gpus"]["device"] == "cpu"
        assert rank["network"]["transports"]
    # One process of a node asks mpi4py.
    assert NAMES[mpi] in found["ranks"][0]["mpi"]["mpi4py"]["files"][0]
    exchange = found["exchange"]
    for own, other in ((0, 1), (1, 0)):
        assert 0 < exchange["latency"]["seconds"][own][other] < 1
        assert exchange["bandwidth"]["bytes_per_second"][own][other] > 1e6
        assert exchange["bandwidth"]["bytes_per_second"][own][own] is None
    assert 0 < exchange["allreduce_call_seconds"] < 10
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_mpi4py_with_another_mpi_is_a_problem() -> None:
    """And the report in words, with the problem on a line of its own."""
    result = doctor("openmpi", MPI4PY_MPIABI="mpich")
    assert result.returncode == 1, result.stderr
    assert "2 rank(s) on 1 node(s)" in result.stdout and "messages of 8 B" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("problem: ")]
    assert "mpi4py" in line and line.endswith("Remedy: unset MPI4PY_MPIABI")


def test_no_mpi_under_a_launcher() -> None:
    found = told(doctor("openmpi", "--json", MPI_CUDA_LIBMPI="/nowhere/libmpi.so"), 2)
    said = problems(found)
    assert "tried /nowhere/libmpi.so, named by MPI_CUDA_LIBMPI" in said
    assert "one of 2 by its launcher" in said and found["exchange"] is None
    # The other half of the story is known all the same.
    assert found["ranks"][0]["plugin"]["inner_version"]


def alone(*arguments: str, code: str = DOCTOR, **variables: str) -> dict[str, Any]:
    result = job(None, code, "doctor", "--json", *arguments, **variables)
    return told(result, json.loads(result.stdout)["status"])


def test_a_platform_misspelt_and_a_broken_library_path(tmp_path: Path) -> None:
    (tmp_path / "libmpi.so.40").write_text("no library")
    (tmp_path / "libmpi.so.12").symlink_to("nothing")
    path = f"{tmp_path}:/nowhere"
    found = alone(JAX_PLATFORMS="mpi_coda", LD_LIBRARY_PATH=path)
    assert found["status"] == 1
    said = problems(found)
    assert "JAX knows no platform mpi_coda set JAX_PLATFORMS=mpi_cuda" in said
    assert f"{tmp_path}/libmpi.so.40 is no library" in said
    assert f"{tmp_path}/libmpi.so.12 points to nothing" in said
    notes = [one["text"] for one in found["findings"] if one["kind"] == "note"]
    assert "LD_LIBRARY_PATH has /nowhere, which is no folder" in notes


def test_another_platform_first_and_a_plugin_that_was_cut_off(tmp_path: Path) -> None:
    code = "from mpi_cuda import _library; print(_library.load().mpi_cuda_about().decode())"
    about = job(None, code).stdout
    plugin = Path(dict(line.split("\t", 1) for line in about.splitlines() if line)["plugin"])
    with plugin.open("rb") as whole:
        (tmp_path / "plugin.so").write_bytes(whole.read(1 << 20))
    broken = str(tmp_path / "plugin.so")
    found = alone(JAX_PLATFORMS="cpu,mpi_cuda", MPI_CUDA_INNER_PLUGIN=broken)
    said = problems(found)
    assert "programs use cpu, the first" in said and "JAX_PLATFORMS=mpi_cuda,cpu" in said
    assert f"{broken}: the file has 1048576 bytes" in said, said


def test_a_picture_that_cannot_be_written_is_a_problem() -> None:
    result = doctor("mpich", "--plot", "/nowhere/times.png")
    assert result.returncode == 1 and "messages of 8 B" in result.stdout, result.stdout
    said = "no picture is drawn: No such file or directory: '/nowhere/times.png'"
    assert said in result.stderr, result.stderr
    result = doctor(None, "--plot", "/dev/null/times.png")
    assert result.returncode == 1 and "no picture is drawn" in result.stderr, result.stderr


def test_one_rank_has_nothing_to_draw(tmp_path: Path) -> None:
    result = doctor(None, "--plot", str(tmp_path / "times.png"))
    assert result.returncode == 0, result.stderr
    assert "no picture is drawn, since no messages were measured" in result.stderr


@pytest.mark.parametrize("mpi", [None, "mpich"])
def test_without_jax_there_is_a_report(mpi: str | None, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'jax':\n"
        "            raise ModuleNotFoundError(name, name='jax')\n"
        "sys.meta_path.insert(0, Hidden)\n"
    )
    command = [sys.executable, "-m", "mpi_cuda", "doctor", "--json"]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [*([f"mpirun.{mpi}", "-n", "2"] if mpi else []), *command],
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = told(result, 2)
    assert "mpi_cuda needs JAX" in problems(found)
    assert found["ranks"][0]["mpi"]["file"] and found["ranks"][0]["software"]["python"]


def test_a_folder_that_is_gone_is_no_problem_of_mpi4pys(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    code = f"import os; os.mkdir({str(gone)!r}); os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})"
    found = alone(code=f"{code}\n{DOCTOR}")
    assert found["status"] == 0, problems(found)


def test_a_reader_that_has_read_enough() -> None:
    command = f"{sys.executable} -m mpi_cuda doctor | head -1"
    pipe = subprocess.PIPE
    result = subprocess.run(
        command, shell=True, env=environment(), stdout=pipe, stderr=pipe, text=True, timeout=60
    )
    assert result.stdout.startswith("mpi_cuda doctor: 1 rank") and result.stderr == "", result


def test_a_missing_shim(tmp_path: Path) -> None:
    code = f"""if True:
        import shutil, mpi_cuda._library as library
        from pathlib import Path
        library.FOLDER = Path({str(tmp_path)!r})
        library.LIBRARY = Path(shutil.copy(library.LIBRARY, library.FOLDER))
        {DOCTOR}
    """
    found = alone(code=code)
    assert found["status"] == 1 and "libmpi_cuda_shim_openmpi.so, is not in" in problems(found)


def test_jax_without_a_plugin_for_the_cpu() -> None:
    found = alone(MPI_CUDA_PLUGIN_CPU="/nowhere")
    assert found["status"] == 2
    assert "or xla-cpu-pjrt, or set MPI_CUDA_INNER_PLUGIN" in problems(found)
    assert "and where this Python finds packages)" in problems(found)


def test_a_step_that_lasts_is_ended_in_words() -> None:
    result = job(None, DOCTOR, "doctor", "--timeout", "-1")
    assert result.returncode == 2 and "-1 is no time above 0 seconds" in result.stderr
    result = job(None, DOCTOR, "doctor", "--timeout", "inf")
    assert result.returncode == 2 and "inf is no time above 0 seconds and below 9" in result.stderr
    result = job(None, DOCTOR, "doctor", "--timeout", "0.001")
    assert result.returncode == 2, result.stdout
    assert "see whether the others" not in result.stdout and "give it more time" in result.stdout
    assert "problem: this process was still joining the job after 0.001 s" in result.stdout
