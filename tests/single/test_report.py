"""What `python -m mpi_cuda report` makes of the records of several ranks; no job runs."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpi_cuda._report import findings, text, trace
from mpi_cuda._report.job import Job, align, load, ranks
from mpi_cuda._report.record import Comm, Operation, Record, _comm_words

WORLD = Comm(1, "the default communicator", 0, 3)
REDUCING = frozenset({"collective", "operand", "result"})
ALLREDUCE: dict[str, Any] = {
    "kind": "allreduce",
    "traits": REDUCING,
    "reduction": "SUM",
    "dtype": "float32",
    "item_size": 4,
    "sent": 10,
    "received": 10,
}


def collective(
    rank: int, position: int, start: float, end: float | None, **changes: Any
) -> Operation:
    """An allreduce of the world, with changes."""
    own = {"comm": dataclasses.replace(WORLD, rank=rank)} | ALLREDUCE | changes
    return Operation(rank=rank, number=position, position=position, start=start, end=end, **own)


def record(rank: int, operations: list[Operation], **changes: Any) -> Record:
    own = {"host": "a", "total": len(operations), "written": 100.0} | changes
    return Record(rank=rank, size=3, job=1, operations=operations, **own)


def job(*records: Record) -> Job:
    return Job({one.rank: one for one in records})


def alike(rank: int, count: int) -> list[Operation]:
    return [collective(rank, n, n + 0.1 * rank, n + 0.5) for n in range(1, count + 1)]


def test_ranks_that_agree() -> None:
    found = job(*(record(rank, alike(rank, 4)) for rank in range(3)))
    assert findings.divergences(found) == []
    last = findings.last_common(found)
    assert last is not None and last.position == 4
    paces = findings.paces(found)
    assert [paces[rank].last for rank in range(3)] == [0, 0, 4]
    assert paces[2].delayed == pytest.approx(0.4) and paces[0].waited == pytest.approx(0.8)
    (row,) = findings.table(found)
    assert (row.count, row.bytes) == (12, 480)
    assert row.waited == pytest.approx(4 * (0.2 + 0.1)) and row.known == row.seconds


@pytest.mark.parametrize(
    "change",
    [
        {"reduction": "MAX"},
        {"dtype": "int32"},
        {"sent": 11},
        {"kind": "bcast", "traits": REDUCING | {"root"}, "reduction": "", "peer": 0},
    ],
)
def test_the_rank_that_differs_is_named(change: dict[str, Any]) -> None:
    rows = [alike(rank, 3) for rank in range(3)]
    rows[1].append(collective(1, 4, 4, None, **change))
    for rank in (0, 2):
        rows[rank].append(collective(rank, 4, 4, None))
    found = job(*(record(rank, row) for rank, row in enumerate(rows)))
    (divergence,) = findings.divergences(found)
    assert divergence.odd == {1} and divergence.matched.position == 4
    assert "rank 1 diverged first at collective 4 on the default communicator:" in text.report(
        found
    )


def test_roots_that_differ() -> None:
    change = {"kind": "bcast", "traits": REDUCING | {"root"}, "reduction": ""}
    rows = [[collective(rank, 1, 1, None, peer=min(rank, 1), **change)] for rank in range(3)]
    (divergence,) = findings.divergences(job(*(record(n, row) for n, row in enumerate(rows))))
    assert divergence.odd == {0}


def test_a_rank_that_never_came() -> None:
    rows = [alike(rank, 3) for rank in range(3)]
    for rank in (0, 2):
        rows[rank].append(collective(rank, 4, 4, None))
    found = job(*(record(rank, row) for rank, row in enumerate(rows)))
    (divergence,) = findings.divergences(found)
    assert divergence.odd == {1} and divergence.called[1] is None
    assert findings.waits_for(found, rows[0][-1]) == [1]
    assert "waiting for rank 1" in text.report(found)


def test_a_record_that_is_older_is_no_divergence() -> None:
    """A rank that was killed by the launcher wrote a little before."""
    rows = [alike(rank, 5 if rank else 3) for rank in range(3)]
    written = [3.7, 9.0, 9.0]
    found = job(*(record(n, row, written=written[n]) for n, row in enumerate(rows)))
    assert findings.divergences(found) == []


def test_what_the_ring_has_forgotten_is_no_divergence() -> None:
    rows = [alike(rank, 8) for rank in range(3)]
    rows[0] = rows[0][5:]
    found = job(*(record(n, row, total=8) for n, row in enumerate(rows)))
    assert findings.divergences(found) == []
    assert "of rank 0 only the last operations are known (of rank 0 3 of 8)" in text.report(found)


def test_a_rank_without_a_record_is_named() -> None:
    found = job(record(0, [*alike(0, 2), collective(0, 3, 3, None)]), record(2, alike(2, 2)))
    said = text.report(found)
    assert "rank 1 left no record" in said and "waiting for ranks 1-2" in said


def test_groups_side_by_side_are_two_communicators() -> None:
    """The two halves of a mesh have one number; what they do is not compared."""

    def on(rank: int) -> Comm:
        members = [0, 1] if rank < 2 else [2]
        return Comm(77, f"the ranks {members}", rank % 2, 2)

    rows = [[collective(rank, 1, 1, 2, comm=on(rank), sent=rank // 2)] for rank in range(3)]
    found = job(*(record(n, row) for n, row in enumerate(rows)))
    assert findings.divergences(found) == []
    assert sorted(len(one.by_rank) for one in found.collectives) == [1, 2]


def test_blocks_of_different_lengths_are_no_divergence() -> None:
    def gathers(rank: int, **changes: Any) -> list[Operation]:
        of = {"kind": "allgatherv", "traits": REDUCING | {"uneven"}, "reduction": ""} | changes
        return [collective(rank, 1, 1, 2, sent=rank, received=3, **of)]

    rows = [gathers(rank) for rank in range(3)]
    assert findings.divergences(job(*(record(n, row) for n, row in enumerate(rows)))) == []
    rows[1] = gathers(1, dtype="int32")
    (divergence,) = findings.divergences(job(*(record(n, row) for n, row in enumerate(rows))))
    assert divergence.odd == {1}


def test_what_a_rank_does_alone_is_not_compared() -> None:
    own = Comm(2, "COMM_SELF", 0, 1)
    rows = [[collective(rank, 1, 1, 2, comm=own, sent=rank)] for rank in range(3)]
    assert job(*(record(n, row) for n, row in enumerate(rows))).collectives == []


def message(rank: int, number: int, start: float, end: float | None, **own: Any) -> Operation:
    kind = own.get("kind")
    traits = {"send": {"sends", "operand"}, "recv": {"receives", "result"}}[str(kind)]
    comm = dataclasses.replace(WORLD, rank=rank)
    return Operation(
        rank=rank,
        number=number,
        traits=frozenset(traits),
        comm=comm,
        position=number,
        start=start,
        end=end,
        **own,
    )


def test_a_receive_waits_for_its_sender() -> None:
    send = message(1, 1, 5, 6, kind="send", peer=0, send_tag=3)
    other = message(0, 1, 0, 1, kind="recv", source=2, recv_tag=3)
    receive = message(0, 2, 1, 6, kind="recv", source=1, recv_tag=None)
    found = job(record(0, [other, receive]), record(1, [send]), record(2, []))
    assert found.messages == [(send, receive)]
    assert receive.waited == 4


def test_a_circle_of_receives() -> None:
    rows = [[message(rank, 1, 1, None, kind="recv", source=(rank + 1) % 3)] for rank in range(3)]
    found = job(*(record(rank, row) for rank, row in enumerate(rows)))
    assert findings.circle(found) == [0, 1, 2]
    assert "deadlock: 0 waits for 1 waits for 2 waits for 0" in text.report(found)


def test_clocks_of_nodes_that_are_apart_are_set() -> None:
    """No rank ends a collective before all have begun it."""
    rows = [alike(rank, 4) for rank in range(3)]
    for operation in rows[2]:
        operation.start += 60.3
        operation.end = (operation.end or 0) + 60.3
    records = {
        rank: record(rank, row, host="b" if rank == 2 else "a") for rank, row in enumerate(rows)
    }
    clocks = align(records)
    shift, doubt = clocks["b"]
    assert len(clocks) == 1 and abs(shift + 60.3) <= doubt < 0.5
    assert rows[2][0].start == pytest.approx(1.2, abs=doubt)
    assert "the clock of b was set by -60" in text.report(Job(records, clocks=clocks))


def test_clocks_that_may_be_right_are_left_alone() -> None:
    rows = [alike(rank, 4) for rank in range(3)]
    records = {rank: record(rank, row, host=f"node{rank}") for rank, row in enumerate(rows)}
    assert all(shift == 0 for shift, _ in align(records).values())


def test_ranks_are_written_short() -> None:
    assert [ranks([3]), ranks([0, 1, 2, 5]), ranks(range(1024))] == [
        "rank 3",
        "ranks 0-2, 5",
        "ranks 0-1023",
    ]


def test_the_report_starts_neither_jax_nor_mpi() -> None:
    code = """if True:
        import sys
        from mpi_cuda._report import run
        loaded = open("/proc/self/maps").read()
        print("libmpi" in loaded or "libpjrt_mpi_cuda" in loaded, "matplotlib" in sys.modules)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"], result.stderr


RANK_0 = """if True:
    import sys
    import jax, jax.numpy as jnp, mpi_cuda as m
    from mpi_cuda import notoken as nt
    for length in range(1, 20):
        nt.allreduce(jnp.ones(length), m.SUM)
    nt.bcast(jnp.ones(3, jnp.int32), 0)
    nt.barrier()
    from mpi_cuda import _library
    assert _library.load().mpi_cuda_write_record(sys.argv[1].encode()) >= 0, _library.last_error()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two ranks, of which a job of one has written the first."""
    folder = tmp_path_factory.mktemp("records")
    environment = os.environ | {"JAX_PLATFORMS": "mpi_cuda", "MPI_CUDA_SINGLETON": "1"}
    first = folder / "rank-00000.record"
    command = [sys.executable, "-c", RANK_0, str(first)]
    subprocess.run(command, check=True, timeout=120, env=environment)
    data = first.read_bytes()
    first.write_bytes(data.replace(b'"size":1', b'"size":2', 1))
    second = data.replace(b'"size":1', b'"size":2', 1).replace(b'"rank":0', b'"rank":1', 1)
    assert second.count(b'"size":2') == 1 and second.count(b'"rank":1') == 1
    (folder / "rank-00001.record").write_bytes(second)
    return folder


def test_a_record_that_is_broken_is_said_to_be(folder: Path) -> None:
    """Whatever stands in it: there is a report, which never says that the rank ended well."""
    path = folder / "rank-00001.record"
    whole = path.read_bytes()
    filled = [place for place, byte in enumerate(whole) if byte]
    dice = random.Random(15)
    refused = 0
    try:
        for _ in range(400):
            data = bytearray(whole)
            for _ in range(dice.choice([1, 3, 30])):
                data[dice.choice(filled)] = dice.randrange(256)
            path.write_bytes(data)
            found = load(folder)
            said = text.report(found)
            trace.write(found, folder / "trace.json")
            if "rank-00001.record cannot be read: " in said:
                refused += 1
                assert "the record of rank 1 cannot be read: it " in said
                assert "rank 1 left no record" not in said
        for length in (0, 7, 100, 200, 5000):
            path.write_bytes(whole[:length])
            assert "the record of rank 1 cannot be read: it " in text.report(load(folder))
    finally:
        path.write_bytes(whole)
    assert refused > 50


def test_communicators_without_a_name_have_words() -> None:
    assert _comm_words(3) == "all ranks" and _comm_words(17) == "communicator 17"
    assert _comm_words(1923345340473196858) == "a communicator of the library's"
