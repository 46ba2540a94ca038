"""`python -m mpi_cuda bench`: how fast operations are, in the tables that the field knows.

`operations` says what size and bandwidth are, and `timing` how a time is measured. What is measured
has a file each: `programs` this library's operations and JAX's collectives, `raw` MPI itself,
`gloo` and `child` JAX's own CPU backend, `theirs` mpi4jax. `plan` reads the command line; `text`,
`plot` and `record` show what came of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from mpi_cuda import __version__, _library, _lifecycle
from mpi_cuda._bench import gloo, plan, plot, raw, record, text, theirs, timing
from mpi_cuda._bench.plan import Plan, Refused
from mpi_cuda._bench.record import Result, Row
from mpi_cuda._bench.timing import Library, Timing
from mpi_cuda._doctor import launched, world
from mpi_cuda._doctor.limit import BEFORE_OTHERS, CANNOT_RUN

STATUS = (
    "exit status: 0 if all is well; 1 if values are wrong, a library of --against could not be "
    "measured, or a file was not written; 2 if nothing can be measured"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.epilog = STATUS
    add = parser.add_argument
    add("--operations", metavar="NAME,...", help="which (all that the style has)")
    add("--min", default="8", metavar="SIZE", help="the smallest size in bytes: 8, 4K, 16M (8)")
    add("--max", default="8M", metavar="SIZE", help="the largest (8M)")
    add("--factor", type=int, default=4, metavar="N", help="from a size to the next (4)")
    add("--dtype", default="float32", metavar="NAME", help="of the elements (float32)")
    add(
        "--style",
        choices=["mpi", "native"],
        default="mpi",
        help="mpi_cuda's operations, or JAX's collectives in shard_map (mpi)",
    )
    add(
        "--launch",
        choices=["loop", "once"],
        default="loop",
        help="in a jitted loop, or one call after the other (loop)",
    )
    add("--repeat", type=int, default=7, metavar="N", help="series of each size (7)")
    add("--iterations", type=int, default=1000, metavar="N", help="of a series, at most (1000)")
    add(
        "--against",
        default="",
        metavar="NAME,...",
        help="measure in turn: mpi (MPI itself), mpi4py, gloo",
    )
    add("--only", choices=["mpi4jax"], help="measure that alone, on JAX_PLATFORMS=cpu")
    add("--check", action="store_true", help="look at the values too")
    add("--json", type=Path, metavar="FILE", help="write all that was measured")
    add("--plot", type=Path, metavar="FILE.png", help="draw time and bandwidth")
    add("--compare", type=Path, nargs="+", metavar="FILE", help="show files of --json")


def run(arguments: argparse.Namespace) -> int:
    """Measures; see `STATUS`."""
    try:
        if arguments.compare:
            # Of several ranks one shows them.
            if not launched.rank():
                print(text.comparison(arguments.compare, record.read(arguments.compare)))
            return 0
        wanted = plan.plan(arguments)
        if wanted.only and (words := plan.why_not_mpi4jax(os.environ.get("JAX_PLATFORMS"))):
            raise Refused(words)
        import jax

        if wanted.dtype.itemsize > 4:
            jax.config.update("jax_enable_x64", True)
        return _only(wanted, arguments) if wanted.only else _ours(wanted, arguments)
    except Refused as refusal:
        if launched.rank():
            # The first rank says it, before its launcher hears of a status.
            time.sleep(BEFORE_OTHERS)
        else:
            print(f"mpi_cuda bench: {refusal}", file=sys.stderr, flush=True)
        return CANNOT_RUN
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        print(f"mpi_cuda bench: {launched.who()} failed: {words}", file=sys.stderr, flush=True)
        return CANNOT_RUN


class _World:
    """The ranks of this job, as `world` of the doctor's lets them meet."""

    def __init__(self) -> None:
        self.rank, self.size, _ = _library.start()

    def gather(self, own: Any) -> list[Any]:
        """What each rank passes; collective."""
        return world.gather(own, self.size)

    def gather_numbers(self, own: list[float]) -> list[list[float]]:
        """The same of numbers."""
        return world.gather_numbers(own, self.size)


def _ours(wanted: Plan, arguments: argparse.Namespace) -> int:
    """This library, and what it is to be compared with."""
    import jax

    try:
        backend = jax.local_devices()[0]
    except Exception as error:
        raise Refused(f"JAX's backend does not start: {' '.join(str(error).split())}") from None
    if not _library.is_ours(backend.client):
        raise Refused(
            f"JAX has started the backend {backend.platform}, and not mpi_cuda: set "
            "JAX_PLATFORMS=mpi_cuda"
        )
    from mpi_cuda._bench.programs import ours

    peers = _World()
    hosts = _agree(wanted, arguments, peers)
    libraries: list[Library] = [ours(wanted.style, wanted.launch)]
    absent: dict[str, str] = {}
    for name, why, make in (
        ("mpi", lambda: raw.why_not_mpi(peers.size), raw.Mpi),
        ("mpi4py", lambda: raw.why_not_mpi4py(wanted.dtype), raw.Mpi4py),
    ):
        if name not in wanted.against:
            continue
        # It may be there on some ranks alone.
        if words := next(filter(None, peers.gather(why() or "")), ""):
            absent[name] = words
        else:
            libraries.append(make(peers.rank))
    found: dict[Any, Timing] = {}
    if "gloo" in wanted.against:
        _progress(peers.rank, "gloo")
        found, failure = gloo.measure(wanted, peers.rank, peers.size)
        if failure:
            absent["gloo"] = failure
    about = {
        "mpi": (world.about().get("mpi_version") or "no MPI").split(",")[0],
        "device": backend.device_kind,
        "nodes": len(set(hosts)),
        "style": wanted.style,
    }
    result = _measure(wanted, libraries, peers, Result("mpi_cuda", about, [], absent), found)
    status = _end(result, arguments, peers)
    _lifecycle.leave(status)


def _only(wanted: Plan, arguments: argparse.Namespace) -> int:
    """mpi4jax."""
    peers = theirs.Peers()
    hosts = _agree(wanted, arguments, peers)
    from mpi4py import MPI

    library = theirs.mpi4jax(peers.rank, peers.size, wanted.launch)
    about = {
        "mpi": MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 "),
        "device": "cpu",
        "nodes": len(set(hosts)),
        "style": "mpi4jax",
    }
    result = _measure(wanted, [library], peers, Result("mpi4jax", about, [], {}), {})
    return _end(result, arguments, peers)


def _agree(wanted: Plan, arguments: argparse.Namespace, peers: Any) -> list[str]:
    """The node of each rank; leaves if some rank cannot do its part."""
    hosts: list[str] = peers.gather(launched.host())
    here = hosts.count(launched.host())
    own = plan.why_not_memory(wanted, peers.size, here)
    if peers.rank == 0:
        own = plan.why_not_files(arguments) or own
    if words := next(filter(None, peers.gather(own or "")), ""):
        if peers.rank == 0:
            print(f"mpi_cuda bench: {words}", file=sys.stderr, flush=True)
        _leave(CANNOT_RUN)
    return hosts


def _leave(status: int) -> NoReturn:
    """In order: with a status that is no failure of the job's."""
    if _library.started() is not None:
        _lifecycle.leave(status)
    sys.exit(status)


def _measure(
    wanted: Plan, libraries: list[Library], peers: Any, result: Result, found: dict[Any, Timing]
) -> Result:
    """Prints each table when it is complete; `found` is what was measured elsewhere."""
    import jax

    result.about.update(
        mpi_cuda=__version__,
        jax=jax.__version__,
        ranks=peers.size,
        launch=wanted.launch,
        dtype=wanted.dtype.name,
        repeat=wanted.repeat,
    )
    is_first = peers.rank == 0
    if is_first:
        _print(text.head(result))
    for name in wanted.operations:
        if not libraries[0].has(name):
            if is_first:
                _print(f"\n{name} is not measured: {result.own} has none")
            continue
        for problem in wanted.problems(name, peers.size):
            _progress(peers.rank, f"{name} of {problem.size} B")
            timings = timing.measure(libraries, problem, peers, **wanted.how)
            if problem in found:
                timings["gloo"] = found[problem]
            result.rows.append(Row(problem, timings))
        _progress(peers.rank, "")
        if is_first:
            _print("\n" + text.table(name, result))
    return result


def _end(result: Result, arguments: argparse.Namespace, peers: Any) -> int:
    """Writes the files on rank 0; the status."""
    if peers.rank:
        return 0
    status = 1 if result.wrong or result.absent else 0
    for path, write in ((arguments.plot, _draw), (arguments.json, _write)):
        if path is not None:
            try:
                write(result, path, status)
                print(f"wrote {path}", file=sys.stderr, flush=True)
            except OSError as error:
                print(f"mpi_cuda bench: {error}", file=sys.stderr, flush=True)
                status = 1
    return status


def _draw(result: Result, path: Path, status: int) -> None:
    plot.write(result, path)


def _write(result: Result, path: Path, status: int) -> None:
    path.write_text(json.dumps(record.as_json(result, status), indent=1) + "\n")


def _print(words: str) -> None:
    try:
        print(words, flush=True)
    except BrokenPipeError:
        # Whoever reads has read enough. What Python flushes at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _progress(rank: int, words: str) -> None:
    """A line that the next one overwrites, where somebody looks at it."""
    if rank == 0 and sys.stderr.isatty():
        with contextlib.suppress(OSError):
            print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)
