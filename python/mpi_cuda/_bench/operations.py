"""The operations that are measured: what their size is, and what their bandwidth is of.

Sizes, counts and bandwidths are those of nccl-tests (its `doc/PERFORMANCE.md`), so that tables can
be laid side by side. With `n` ranks, `S` the size in bytes and `t` the time:

- `count` is what a call of MPI's gets: elements of the array, or of a block where there are blocks;
- `S` is the bytes of the whole array, all blocks together;
- `algbw = S / t`, and `busbw = algbw * factor(n)`: how fast the slowest link must be, whatever the
  algorithm. GB are 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


def _parts(ranks: int) -> float:
    return (ranks - 1) / ranks


def _whole(ranks: int) -> float:
    return 1.0


class Operation(NamedTuple):
    """One of them."""

    #: Of `algbw`, which gives `busbw`; by the number of ranks.
    factor: Callable[[int], float]
    #: The same in words.
    factor_words: str
    #: What the size is of.
    size_of: str
    #: Whether what a rank passes has a block for each rank, and what it gets.
    sends_blocks: bool = False
    gets_blocks: bool = False
    #: Rank 0 alone passes, or gets, something (all blocks, or the whole).
    root_sends: bool = False
    root_gets: bool = False
    reduces: bool = False
    #: As a collective of JAX's in `shard_map`; none if JAX has none.
    native: str | None = None

    @property
    def has_blocks(self) -> bool:
        """Whether MPI counts the elements of a block."""
        return self.sends_blocks or self.gets_blocks


OPERATIONS = {
    "allreduce": Operation(
        lambda ranks: 2 * _parts(ranks),
        "2(n-1)/n",
        "the array of each rank",
        reduces=True,
        native="psum",
    ),
    "allgather": Operation(
        _parts,
        "(n-1)/n",
        "the result, with a block of each rank",
        gets_blocks=True,
        native="all_gather",
    ),
    "alltoall": Operation(
        _parts,
        "(n-1)/n",
        "what a rank sends, its own block included",
        sends_blocks=True,
        gets_blocks=True,
        native="all_to_all",
    ),
    "reduce_scatter": Operation(
        _parts,
        "(n-1)/n",
        "what a rank passes, a block for each rank",
        sends_blocks=True,
        reduces=True,
        native="psum_scatter",
    ),
    "bcast": Operation(_whole, "1", "the array", root_sends=True),
    "reduce": Operation(_whole, "1", "the array of each rank", root_gets=True, reduces=True),
    "gather": Operation(
        _parts, "(n-1)/n", "what rank 0 gets, a block of each", gets_blocks=True, root_gets=True
    ),
    "scatter": Operation(
        _parts,
        "(n-1)/n",
        "what rank 0 passes, a block for each",
        sends_blocks=True,
        root_sends=True,
    ),
    "sendrecv": Operation(
        _whole,
        "1",
        "what a rank sends to the next one, while as much comes from the one before",
        native="ppermute",
    ),
}


@dataclass(frozen=True)
class Problem:
    """An operation on so many elements."""

    name: str
    #: As MPI counts: of a block, where there are blocks.
    count: int
    dtype: np.dtype
    ranks: int

    @property
    def operation(self) -> Operation:
        """Its row."""
        return OPERATIONS[self.name]

    @property
    def size(self) -> int:
        """Bytes, as the tables have them."""
        blocks = self.ranks if self.operation.has_blocks else 1
        return self.count * blocks * self.dtype.itemsize

    def sent(self, rank: int) -> tuple[int, ...]:
        """The shape of what a rank passes to an operation of this library."""
        takes_all = self.operation.sends_blocks and (rank == 0 or not self.operation.root_sends)
        return (self.ranks, self.count) if takes_all else (self.count,)

    def got(self) -> tuple[int, ...]:
        """The shape of the result, where a rank gets one."""
        return (self.ranks, self.count) if self.operation.gets_blocks else (self.count,)

    def rates(self, seconds: float) -> tuple[float, float]:
        """`algbw` and `busbw` in GB/s."""
        rate = self.size / seconds / 1e9 if seconds else 0.0
        return rate, rate * self.operation.factor(self.ranks)

    def operand(self, rank: int) -> NDArray:
        """What a rank passes: small numbers, whose sums are exact in every dtype."""
        shape = self.sent(rank)
        place = np.arange(int(np.prod(shape)), dtype=np.int64)
        if self.operation.reduces:
            # Not more than 16 ranks add something to an element, so that no sum is above 48.
            values = (1 + (place + rank) % 3) * ((place + rank) % self.ranks < 16)
        else:
            values = (place + 5 * rank) % 120
        return values.reshape(shape).astype(self.dtype)

    def expected(self, rank: int) -> NDArray | None:
        """What a rank gets; none if it gets nothing."""
        everybody = range(self.ranks)
        operation = self.operation
        if operation.root_gets and rank:
            return None
        if operation.reduces:
            total = np.zeros(self.sent(rank), np.int64)
            for other in everybody:
                total += self.operand(other).astype(np.int64)
            return (total[rank] if operation.sends_blocks else total).astype(self.dtype)
        if self.name == "sendrecv":
            return self.operand((rank - 1) % self.ranks)
        if self.name == "alltoall":
            return np.stack([self.operand(other)[rank] for other in everybody])
        if operation.gets_blocks:
            return np.stack([self.operand(other) for other in everybody])
        root = self.operand(0)
        return root[rank] if operation.sends_blocks else root

    def wrong(self, rank: int, result: NDArray) -> int:
        """How many elements of a rank's result are not what they should be."""
        expected = self.expected(rank)
        return 0 if expected is None else int(np.count_nonzero(result != expected))


def problem(name: str, size: int, dtype: np.dtype, ranks: int) -> Problem:
    """The operation of that size, or of the next smaller one that has as many elements in each
    block; at least one element."""
    blocks = ranks if OPERATIONS[name].has_blocks else 1
    return Problem(name, max(1, size // (dtype.itemsize * blocks)), dtype, ranks)
