"""What `python -m mpi_cuda doctor` makes of what ranks know; no job runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpi_cuda import _doctor, _jax_version
from mpi_cuda._doctor import (
    cores,
    exchange,
    gpus,
    job,
    launched,
    memory,
    mpi,
    network,
    plugin,
    software,
    text,
)
from mpi_cuda._doctor.exchange import Exchange
from mpi_cuda._doctor.job import Job

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "versions.env").exists())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_everybody_meets_everybody_once(size: int) -> None:
    rounds = [list(exchange.peers(rank, size)) for rank in range(size)]
    assert len({len(one) for one in rounds}) == 1
    for rank, own in enumerate(rounds):
        others = [peer for peer in own if peer < size]
        assert sorted([*others, rank]) == list(range(size))
        # Both are in it in the same round.
        assert all(rounds[peer][n] == rank for n, peer in enumerate(own) if peer < size)


def rank(host: str = "a", of: int = 4, own: list[int] | None = None, **changes: Any) -> Any:
    """What the cores of a rank are like."""
    some = own if own is not None else list(range(of))
    facts = {"host": host, "cores": some, "of": of, "nproc": None, "quota": None}
    return {**facts, "threads": len(some), "launcher": "srun", **changes}


def of_cores(*ranks: dict[str, Any]) -> list[str]:
    return [text.line(one) for one in cores.check_job(dict(enumerate(ranks)))]


def test_cores_that_ranks_share() -> None:
    assert of_cores(rank(own=[0, 1]), rank(own=[2, 3])) == []
    (both,) = of_cores(rank(own=[1]), rank(own=[1]))
    assert both.startswith("problem: ranks 0-1: 2 ranks of a share 1 core(s), and the node has 4")
    assert both.endswith("srun -c 2 --cpu-bind=cores")
    (two,) = of_cores(rank(own=[1]), rank(own=[1]), rank(own=[2, 3]))
    assert two.startswith("problem: ranks 0-1: 2 ranks of a are bound to a core")
    (many,) = of_cores(*[rank(own=[0], of=1)] * 3)
    assert many.endswith("Remedy: start fewer ranks")
    (threads,) = of_cores(rank(), rank())
    assert threads.startswith("note: ranks 0-1: ") and "8 threads" in threads
    # Two nodes are two.
    assert of_cores(rank(), rank(host="b")) == []


def test_threads_of_one_rank() -> None:
    (one,) = cores.check(rank(own=[3], nproc="4", threads=4))
    assert "4 threads" in one.text and "NPROC=4" in one.text and one.remedy == "set NPROC=1"
    assert list(cores.check(rank(own=[3], threads=1))) == []
    assert cores.spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_gpus_that_ranks_share() -> None:
    facts = {"models": ["H200"] * 2, "device": "cuda", "reason": "", "transfer": "staged (why)"}
    own = [
        {**facts, "node": node, "own": gpu} for node, gpu in [("a", "0"), ("a", "0"), ("b", "0")]
    ]
    own[0]["uuid"] = own[1]["uuid"] = own[2]["uuid"] = None
    (shared,) = gpus.check_job(dict(enumerate(own)))
    assert shared.is_problem and shared.ranks == (0, 1) and "one GPU of a, 0" in shared.text
    own[1]["uuid"] = "GPU-1"
    assert list(gpus.check_job(dict(enumerate(own)))) == []
    (staged,) = gpus.check(own[0])
    assert "staged (why)" in staged.text and "probe" in staged.remedy
    assert list(gpus.check({**own[0], "own": None, "device": "cpu"}))


def test_memory_that_is_short() -> None:
    fine = {"size": 1 << 34, "free": 1 << 34, "left": [], "failure": None, "huge_pages": "madvise"}
    fine["not_writable"] = None
    assert list(memory.check(fine)) == []
    for change, word in [
        ({"free": 1 << 20}, "less than 32 MiB"),
        ({"size": None}, "no /dev/shm"),
        ({"not_writable": "Read-only file system"}, "(Read-only file system)"),
        ({"failure": "full"}, "(full)"),
        ({"left": ["mpi_cuda.1"]}, "mpi_cuda.1"),
        ({"huge_pages": "never"}, "huge pages"),
    ]:
        (one,) = memory.check(fine | change)
        assert word in one.text and one.remedy


def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "FOLDER", tmp_path)
    assert memory.collect({})["not_writable"] is None and not list(tmp_path.iterdir())
    # Where nothing can be made, whoever asks.
    monkeypatch.setattr(memory, "FOLDER", Path("/proc/self"))
    (one,) = [one for one in memory.check(memory.collect({})) if "made" in one.text]
    assert one.is_problem and "1777" in one.remedy


def test_the_remedies_are_those_of_the_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "OMPI_MCA_btl" in _doctor.of_exchanging("openmpi")
    assert "OMPI" not in _doctor.of_exchanging("mpich")
    for name in launched.RANK:
        monkeypatch.delenv(name, raising=False)
    assert "others" not in _doctor.of_joining()
    monkeypatch.setenv("PMI_RANK", "1")
    assert "others" in _doctor.of_joining()


def test_no_mpi_is_no_single_rank_if_the_start_has_failed() -> None:
    about = {name: None for name in ("file", "version", "launcher", "thread_level")}
    lines = dict(mpi.describe({**about, "variables": {}, "error": "none found"}))
    assert lines["MPI"] == "none was opened"
    assert "one rank" in dict(mpi.describe({**about, "variables": {}}))["MPI"]


def test_a_fast_network_that_is_not_used() -> None:
    facts = {"devices": ["mlx5_0"], "transports": ["tcp", "vader"], "variables": {}}
    (one,) = network.check(facts)
    assert "mlx5_0" in one.text
    assert list(network.check({**facts, "transports": ["ucp"]})) == []


def test_mpi4py_with_another_file() -> None:
    facts: dict[str, Any] = {
        "file": "/o/libmpi.so.40", "doubt": None, "variables": {}, "library_path": {},
        "start_up": True,
        "mpi4py": {"files": ["/m/libmpi.so.40"]},
    }  # fmt: skip
    (one,) = mpi.check(facts)
    assert one.is_problem and "/o/libmpi.so.40" in one.text and "/m/libmpi.so.40" in one.text
    facts["mpi4py"]["files"] = ["/o/libmpi.so.40"]
    assert list(mpi.check(facts)) == []


def test_platforms_and_versions() -> None:
    facts = {"jax": _jax_version.OLDEST, "platforms": "mpi_cuda,cpu"}
    assert list(software.check(facts)) == []
    for platforms, is_problem in [
        ("mpi-cuda", True),
        ("mpi_cuda, cpu", True),
        ("cpu", False),
        (None, False),
    ]:
        (one,) = software.check(facts | {"platforms": platforms})
        assert one.is_problem is is_problem and "JAX_PLATFORMS=mpi_cuda" in one.remedy
    (newer,) = software.check(facts | {"jax": "99.0"})
    assert not newer.is_problem and "99.0" in newer.text
    for version in ("0.9.0+nv25", "0.9.1rc1", "0.10.2.dev20260601"):
        assert _jax_version.is_tested(version), version
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert all(version in page for version in (_jax_version.OLDEST, _jax_version.NEWEST))


def test_a_slow_pair_is_found_and_shown() -> None:
    """Of 16 ranks on two nodes: by node, and the slowest pairs."""
    count, hosts = 16, ["n1"] * 8 + ["n2"] * 8
    times = [[0.0 if a == b else 1e-6 if hosts[a] == hosts[b] else 2e-6 for b in range(count)]
             for a in range(count)]  # fmt: skip
    slow = [row.copy() for row in times]
    slow[3][5] = slow[5][3] = 1e-4
    measured = Exchange(slow, [[one * 1000 for one in row] for row in times], hosts, 1e-5)
    (one,) = exchange.check(measured)
    assert "between ranks 3 and 5 (on n1), and 1 us" in one.text
    lines = list(text._exchange(measured))
    assert any("within n1" in line and "100 us" in line for line in lines)
    assert any("n1 and n2" in line and "64" in line for line in lines)
    assert any("3 and 5: 100 us for 8 B" in line for line in lines)


def test_what_ranks_say_alike_is_told_once() -> None:
    own = job.collect({"mpi_file": "/o/libmpi.so.40", "mpi_abi": "openmpi"}, None, None)
    other = own | {"cores": own["cores"] | {"cores": [99]}}
    found = Job({0: own, 1: own, 2: other})
    report = text.report(found, found.findings())
    assert report.count("/o/libmpi.so.40") == 1
    assert "ranks 0-1: " in report and "rank 2: 1 of" in report and "(99)" in report


def test_a_library_of_another_version_is_told() -> None:
    folder = str(ROOT / "python/mpi_cuda/lib")
    shims = dict.fromkeys(plugin.ABIS)
    facts = {"error": None, "version": "0.0.9", "shims": shims, "shim_folder": folder, "abi": None}
    first, *_ = plugin.check(facts)
    assert first.is_problem and "0.0.9, and the Python part of " in first.text and first.remedy
    assert not any(one.is_problem for one in plugin.check({**facts, "version": None}))


def test_a_launcher_is_told_where_the_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launched.RANK:
        monkeypatch.delenv(name, raising=False)
    assert dict(mpi.describe(mpi.collect({})))["launcher"].startswith("none: ")
    monkeypatch.setenv("PMI_RANK", "3")
    assert dict(mpi.describe(mpi.collect({})))["launcher"] == "one, by PMI_RANK=3"
