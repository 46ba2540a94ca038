"""Reads the record of one rank: the memory that `mpi_runtime/src/engine/recorder/layout.rs`
describes, with the meaning of its numbers as JSON at its beginning."""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
from pathlib import Path
from typing import Any

MAGIC, VERSION = b"MPICUREC", 1
# The names are those of the layout; `x` is what a reader needs not.
_HEADER = struct.Struct("<8sII QQQQ Ii QQQQ 40x")
_COMM = struct.Struct("<QqQ iI QQ 16x")
_LAUNCH = struct.Struct("<III4xQ 8x")
_ENTRY = struct.Struct("<QQQQ qQQQ II ii ii BBBBBB2x QQ 8x Q")
_ABOUT = 128
#: 1 January 9999, in seconds since 1970.
_LATEST = 253_370_764_800
#: The communicator of one rank alone.
_SELF = 2
#: Those of all ranks, in their order.
ALL_RANKS = (0, 1, 3)
NO_REDUCTION = 255
_NAMES = {0: "COMM_WORLD", 1: "the default communicator", 2: "COMM_SELF", 3: "all ranks"}
#: From here on numbers are hashes.
_HASHED = 1 << 32
#: Flags: an operation of mpi4jax's; a wait that knows the message that it waits for.
_FOREIGN, _STARTED = 1, 2
_WITHOUT_ARRAYS = frozenset({"begin", "barrier", "ibarrier", "wait_send"})
#: The peer of a message that goes nowhere.
NOBODY = -1


def _comm_words(number: int) -> str:
    """What a communicator without a name in the record is called."""
    if number in _NAMES:
        return _NAMES[number]
    # The library numbers the user's own in their order, and those of groups of ranks by a hash.
    return f"communicator {number}" if 0 <= number < _HASHED else "a communicator of the library's"


def _rank_words(rank: int | None) -> str:
    return {None: "any rank", NOBODY: "nobody"}.get(rank) or f"rank {rank}"


@dataclasses.dataclass(frozen=True)
class Comm:
    """A communicator, as this rank knows it; its rank is -1 where it was not recorded."""

    number: int
    name: str
    rank: int
    size: int

    @functools.cached_property
    def key(self) -> tuple[int, str]:
        """The same on all its ranks, and no other's. Groups side by side share their number."""
        return self.number, self.name if self.name.startswith("the ranks ") else ""

    @property
    def is_shared(self) -> bool:
        """Whether there are other ranks in it."""
        return self.number != _SELF and self.size != 1


@dataclasses.dataclass(slots=True, eq=False)
class Operation:
    """An operation of one rank; times are seconds since 1970, by the clock of rank 0's node."""

    rank: int
    number: int
    kind: str
    traits: frozenset[str]
    comm: Comm
    position: int
    start: float
    #: None if it had not ended.
    end: float | None
    #: Seconds that it waited for other ranks; None if nobody knows.
    waited: float | None = None
    reduction: str = ""
    dtype: str = ""
    item_size: int = 1
    sent: int = 0
    received: int = 0
    peer: int | None = None
    source: int | None = None
    send_tag: int = 0
    recv_tag: int | None = None
    launch: int = 0
    thread: int = 0
    program: str = ""
    location: str = ""
    failed: bool = False
    text: str = ""
    foreign: bool = False
    #: Of a wait, the start of the collective that it ends.
    ends: str = ""

    @property
    def collective(self) -> bool:
        """All ranks of its communicator take part."""
        return "collective" in self.traits

    @property
    def starts_message(self) -> bool:
        """It sends a message, which nothing before has sent."""
        return "sends" in self.traits and self.kind != "wait_send"

    @property
    def ends_message(self) -> bool:
        """It receives a message."""
        return "receives" in self.traits and self.kind != "irecv"

    @property
    def count(self) -> int:
        """Elements that ranks must agree on."""
        if self.kind == "iscatter" and self.peer == self.comm.rank:
            return self.sent // max(self.comm.size, 1)
        by_result = "operand" not in self.traits or self.kind in ("scatter", "wait")
        return self.received if by_result else self.sent

    @property
    def bytes(self) -> int:
        """Of its operand, or of its result if it has none."""
        return self.count * self.item_size if self.dtype else 0

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same on all ranks of a collective."""
        if self.kind == "begin":
            return self.kind, self.sent
        if self.kind in ("barrier", "ibarrier"):
            return (self.kind,)
        root = self.peer if "root" in self.traits else None
        # Each rank may have as many elements as it likes.
        count = None if "uneven" in self.traits else self.count
        return self.kind, self.reduction, self.dtype, count, root

    def __str__(self) -> str:
        if self.kind == "begin":
            return f"the start of a program with {self.text or 'no collectives'}"
        words = [f"wait for {self.ends}" if self.ends else self.kind]
        if {"operand", "result"} & self.traits and self.dtype:
            words.append(f"of {self.count} {self.dtype}")
        if self.reduction:
            words.append(f"with {self.reduction}")
        if "sends" in self.traits:
            words.append(f"to {_rank_words(self.peer)} with tag {self.send_tag}")
        if "receives" in self.traits:
            tag = "any tag" if self.recv_tag is None else f"tag {self.recv_tag}"
            words.append(f"from {_rank_words(self.source)} with {tag}")
        if "root" in self.traits:
            words.append(f"with root {self.peer}")
        return " ".join(words)

    @property
    def place(self) -> str:
        """Where it is in the program: communicator, launch, line."""
        words = f"on {self.comm.name}"
        if self.collective:
            words += f" (its collective {self.position})"
        if self.program:
            words += f", in {self.program}"
        return words + (f", {self.location}" if self.location else "")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch that was dispatched."""

    ticket: int
    program: str
    location: str
    time: float


@dataclasses.dataclass
class Record:
    """What one rank has left."""

    rank: int
    size: int
    job: int
    host: str = ""
    pid: int = 0
    library: str = ""
    command: str = ""
    reason: str = "running"
    code: int = 0
    #: Why it ended the job, if it said so.
    why: str = ""
    written: float = 0.0
    #: Operations so far; the record has the last of them.
    total: int = 0
    operations: list[Operation] = dataclasses.field(default_factory=list)
    launches: list[Launch] = dataclasses.field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was forgotten."""
        return len(self.operations) == self.total

    def shift(self, seconds: float) -> None:
        """Sets the clock."""
        self.written += seconds
        self.launches = [dataclasses.replace(one, time=one.time + seconds) for one in self.launches]
        for operation in self.operations:
            operation.start += seconds
            if operation.end is not None:
                operation.end += seconds


class _Reader:
    """The parts of a file."""

    def __init__(self, data: bytes) -> None:
        magic, version, size, *rest = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise ValueError("it is no record of mpi_cuda's")
        if version != VERSION or size > len(data):
            raise ValueError(f"it is of version {version}, or cut off; this reads {VERSION}")
        self.data = data
        first_ticks, first_wall, self.written_ticks, written_wall, *rest = rest
        self.reason, self.code, self.total, _, _, self.why = rest
        self.first_ticks, self.first_wall = first_ticks, first_wall
        ticks = max(1, self.written_ticks - first_ticks)
        self.rate = (written_wall - first_wall) / ticks
        self.about = json.loads(self._text(_ABOUT))

    def _text(self, place: int) -> str:
        return self.data[place : self.data.index(b"\0", place)].decode(errors="replace")

    def text(self, number: int) -> str:
        """A text by its number."""
        return self._text(self.about["layout"]["texts"][0] + number) if number else ""

    def time(self, ticks: int) -> float:
        """Seconds since 1970."""
        return (self.first_wall + (ticks - self.first_ticks) * self.rate) / 1e9

    def rows(self, table: str, form: struct.Struct) -> list[tuple[Any, ...]]:
        """The rows of a table."""
        place, count = self.about["layout"][table]
        return list(form.iter_unpack(self.data[place : place + count * form.size]))

    def comms(self) -> dict[int, Comm]:
        """Communicators by number."""
        own = self.about["rank"]
        found = {}
        for used, number, name, rank, size, *_ in self.rows("comms", _COMM):
            if used:
                rank = own if number in ALL_RANKS else rank
                found[number] = Comm(number, self.text(name) or _comm_words(number), rank, size)
        return found

    def launches(self) -> dict[int, Launch]:
        """Launches by ticket."""
        rows = [row for row in self.rows("launches", _LAUNCH) if row[0]]
        return {
            ticket: Launch(ticket, self.text(program), self.text(location), self.time(ticks))
            for ticket, program, location, ticks in rows
        }

    def operations(self) -> list[Operation]:
        """In their order."""
        comms, launches = self.comms(), self.launches()
        rows = self.rows("entries", _ENTRY) + self.rows("unfinished", _ENTRY)
        # Rows that were being written have two numbers.
        whole = {row[0]: row for row in rows if row[0] and row[0] == row[-1]}
        return [self._operation(whole[number], comms, launches) for number in sorted(whole)]

    def _operation(
        self, row: tuple[Any, ...], comms: dict[int, Comm], launches: dict[int, Launch]
    ) -> Operation:
        number, start, end, waited, comm, position, sent, received, thread, ticket, *row_ = row
        source, peer, recv_tag, send_tag, kind, reduction, dtype, result, flags, ends, *rest = row_
        text, failed, _ = rest
        about, launch = self.about, launches.get(ticket)
        begins = kind == about["begin"]
        name, *traits = ["begin", "collective"] if begins else about["kinds"][kind]
        if flags & _STARTED:
            traits.append("sends" if name == "wait_send" else "receives")
        by_result = "operand" not in traits or name == "wait"
        dtype, item_size = about["dtypes"][result if by_result else dtype]
        return Operation(
            rank=about["rank"],
            number=number,
            kind=name,
            traits=frozenset(traits),
            comm=comms.get(comm) or Comm(comm, _comm_words(comm), -1, 0),
            position=position,
            start=self.time(start),
            end=self.time(end) if end else None,
            waited=waited * self.rate / 1e9 if waited else None,
            reduction="" if reduction == NO_REDUCTION else self._reduction(reduction),
            dtype="" if name in _WITHOUT_ARRAYS else dtype,
            item_size=item_size,
            sent=sent,
            received=received,
            peer=self._rank(peer),
            source=self._rank(source),
            send_tag=send_tag,
            recv_tag=None if recv_tag == about["any"] else recv_tag,
            launch=ticket,
            thread=thread,
            program=launch.program if launch else "",
            location=launch.location if launch else "",
            failed=bool(failed),
            text=self.text(text),
            foreign=bool(flags & _FOREIGN),
            ends=about["kinds"][ends - 1][0] if ends else "",
        )

    def _reduction(self, number: int) -> str:
        names = self.about["reductions"]
        return names[number] if number < len(names) else "a user's reduction"

    def _rank(self, rank: int) -> int | None:
        special = {self.about["any"]: None, self.about["proc_null"]: NOBODY}
        return special.get(rank, rank)


def read(path: Path) -> Record:
    """Reads a record.

    Raises:
      ValueError: the file is none, of another version, or broken.
      OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        record = _record(_Reader(data))
    except ValueError as error:
        if not str(error).startswith("it is "):
            raise ValueError(f"it is broken, or cut off ({error})") from error
        raise
    except (OverflowError, ArithmeticError, LookupError, TypeError, struct.error) as error:
        name = type(error).__name__
        raise ValueError(f"it is broken, or cut off ({name}: {error})") from error
    _check(record)
    return record


def _check(record: Record) -> None:
    """Refuses numbers that no rank writes, and words that are none.

    Raises:
      ValueError: with what is wrong.
    """

    def number(value: Any, low: float, high: float) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        )

    largest = 1 << 31
    words = (record.host, record.library, record.command, record.reason)
    sound = (
        number(record.size, 1, largest)
        and number(record.rank, 0, record.size - 1)
        and isinstance(record.rank, int)
        and isinstance(record.size, int)
        and number(record.job, 0, 1 << 64)
        and number(record.pid, 0, largest)
        and all(isinstance(word, str) for word in words)
        # Until the year 9999.
        and number(record.written, 0, _LATEST)
        and all(number(one.time, 0, _LATEST) for one in record.launches)
    )
    for one in record.operations if sound else ():
        times = (one.start, one.start if one.end is None else one.end)
        sound = (
            sound
            and all(number(time, 0, _LATEST) for time in times)
            and isinstance(one.kind, str)
            and isinstance(one.dtype, str)
            and number(one.item_size, 0, 1 << 16)
            and all(isinstance(trait, str) for trait in one.traits)
        )
    if not sound:
        raise ValueError("it is broken: it has numbers that no rank writes")


def _record(reader: _Reader) -> Record:
    about = reader.about
    fields = ("rank", "size", "job", "host", "pid", "library", "command")
    return Record(
        **{name: about[name] for name in fields},
        reason=about["reasons"][reader.reason],
        code=reader.code,
        why=reader.text(reader.why),
        written=reader.time(reader.written_ticks),
        total=reader.total,
        operations=reader.operations(),
        launches=list(reader.launches().values()),
    )
