"""A short exchange: how long a small message and a large one take between any two ranks."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from mpi_cuda._doctor import world
from mpi_cuda._doctor.finding import Finding, note
from mpi_cuda._doctor.limit import Limit
from mpi_cuda._report.text import seconds

#: Bytes of the messages.
SMALL, LARGE = 8, 4 << 20
#: Seconds for each of the two sizes, and the most rounds.
BUDGET = 0.5
MOST = {SMALL: 1000, LARGE: 20}
#: A pair that is so many times slower than others like it is told.
SLOW = 5.0
#: Small messages within a node that take longer, in seconds, wait for a core.
BUSY = 50e-6


class Exchange(NamedTuple):
    """Seconds by rank and peer; 0 for a rank itself."""

    small: list[list[float]]
    large: list[list[float]]
    #: The node of each rank.
    hosts: list[str]
    #: Seconds of one call of a jitted allreduce.
    program: float | None

    def pairs(self) -> Iterator[tuple[int, int]]:
        """The lower rank first."""
        size = len(self.hosts)
        return ((low, high) for low in range(size) for high in range(low + 1, size))

    def by_node(self) -> dict[tuple[str, str], list[tuple[int, int]]]:
        """The pairs of ranks of each pair of nodes."""
        found = defaultdict(list)
        for low, high in self.pairs():
            found[self.hosts[low], self.hosts[high]].append((low, high))
        return found


def peers(rank: int, size: int) -> Iterator[int]:
    """Whom a rank meets, round by round: everybody once, and in each round the pairs are apart. A
    number that is no rank means nobody."""
    last = size + size % 2 - 1
    for number in range(last):
        if rank == last:
            yield number * (last + 1) // 2 % last
        else:
            peer = (number - rank) % last
            yield last if peer == rank else peer


def measure(rank: int, size: int, hosts: list[str], limit: Limit) -> Exchange:
    """Collective over the ranks of the job."""
    rows = {}
    for bytes_ in (SMALL, LARGE):
        rounds = _rounds(rank, size, bytes_)
        row = [0.0] * size
        for peer in peers(rank, size):
            if peer < size:
                limit.doing = f"exchanging messages of {bytes_} bytes with rank {peer}"
                row[peer] = world.ping(peer, bytes_, rounds)
        rows[bytes_] = row
    limit.doing = "running a compiled allreduce"
    small, large = (world.gather_numbers(rows[bytes_], size) for bytes_ in (SMALL, LARGE))
    return Exchange(small, large, hosts, _program(size))


def _rounds(rank: int, size: int, bytes_: int) -> int:
    """So many that all of it fits into the budget, by what the slowest pair takes."""
    first = next(peers(rank, size))
    own = world.ping(first, bytes_, 3) if first < size else 0.0
    slowest = max(row[0] for row in world.gather_numbers([own], size))
    fits = BUDGET / (size - 1 + size % 2) / (2 * slowest)
    return max(1, min(MOST[bytes_], int(fits)))


def _program(size: int) -> float:
    """Runs a compiled program with an operation of all ranks, and checks its result."""
    import jax
    import jax.numpy as jnp

    import mpi_cuda as m
    from mpi_cuda import notoken

    step = jax.jit(lambda x: notoken.allreduce(x, m.SUM))
    one = jnp.ones(2, jnp.float32)
    if (got := float(step(one)[0])) != size:
        raise RuntimeError(f"an allreduce of ones gave {got} on {size} ranks")
    start, rounds = time.perf_counter(), 20
    for _ in range(rounds):
        step(one).block_until_ready()
    return (time.perf_counter() - start) / rounds


def check(exchange: Exchange) -> Iterator[Finding]:
    """What is slower than it should be."""
    kinds: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for (one, other), pairs in exchange.by_node().items():
        kinds[one == other] += pairs
    for within, pairs in kinds.items():
        where = "within a node" if within else "between nodes"
        for times, bytes_ in ((exchange.small, SMALL), (exchange.large, LARGE)):
            if not pairs:
                continue
            usual = statistics.median(times[low][high] for low, high in pairs)
            slow = [pair for pair in pairs if times[pair[0]][pair[1]] > SLOW * usual]
            for low, high in slow[:3]:
                yield note(
                    f"messages of {bytes_} bytes take {seconds(times[low][high])} between ranks "
                    f"{low} and {high} ({_where(exchange, low, high)}), and {seconds(usual)} "
                    f"between others {where}",
                    "look for another program on these cores, or a slow link between these nodes",
                )
            if within and bytes_ == SMALL and usual > BUSY:
                yield note(
                    f"small messages within a node take {seconds(usual)}",
                    "give each rank a core of its own, and let nothing else run there",
                )


def _where(exchange: Exchange, low: int, high: int) -> str:
    one, other = exchange.hosts[low], exchange.hosts[high]
    return f"on {one}" if one == other else f"on {one} and {other}"


def as_json(exchange: Exchange) -> dict[str, Any]:
    """For programs."""
    return {
        "latency": {"bytes": SMALL, "seconds": exchange.small},
        "bandwidth": {
            "bytes": LARGE,
            "bytes_per_second": [
                [LARGE / time if time else None for time in row] for row in exchange.large
            ],
        },
        "allreduce_call_seconds": exchange.program,
    }
