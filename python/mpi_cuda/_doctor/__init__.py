"""`python -m mpi_cuda doctor`: what a job is made of, what is wrong with it, and how fast it is.

Each subject has a file: `software`, `plugin`, `mpi`, `network`, `cores`, `memory`, `gpus`. It says
what a rank knows, how that reads, and what is wrong. `job` puts the ranks together, `exchange`
measures messages between them; `text` and `plot` show it. `limit` ends what hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mpi_cuda import _library, _lifecycle
from mpi_cuda._doctor import exchange, job, launched, memory, mpi, plot, plugin, text, world
from mpi_cuda._doctor.finding import Facts, Finding
from mpi_cuda._doctor.job import Job
from mpi_cuda._doctor.limit import BEFORE_OTHERS, CANNOT_RUN, Limit

STATUS = "exit status: 0 if all is well, 1 if there are problems, 2 if the job cannot run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.epilog = STATUS
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times by rank")
    parser.add_argument(
        "--timeout", type=_seconds, default=60, metavar="SECONDS", help="for each step (60)"
    )


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < threading.TIMEOUT_MAX:
            return seconds
    most = f"{threading.TIMEOUT_MAX:.3g}"
    raise argparse.ArgumentTypeError(f"{text} is no time above 0 seconds and below {most}")


def run(arguments: argparse.Namespace) -> int:
    """Reports; see `STATUS`."""
    if arguments.plot and (refusal := plot.refused()):
        print(f"mpi_cuda doctor: {refusal}", file=sys.stderr)
        return CANNOT_RUN
    drawable = draws(arguments)
    asked = mpi.begin_mpi4py()
    about: dict[str, str] = {}

    def of_process(failure: str) -> Job:
        facts = job.collect(about, mpi.end_mpi4py(asked), failure)
        return Job({launched.rank() or 0: facts}, failure=failure)

    def tell(words: str, remedy: str) -> bool:
        if is_first := not launched.rank():
            show(of_process(f"this process {words}: {remedy}"), arguments)
        return is_first

    limit = Limit(arguments.timeout, tell)
    say_what_may_end_it()
    with limit.on("joining the job", of_joining()):
        failure = join(about)
    if failure is not None:
        return cannot_run(of_process(failure), arguments)
    limit.tell = lambda words, remedy: False
    rank, size, _ = _library.start()
    with limit.on("starting JAX's backend", "start fewer ranks on a node, or use a faster disk"):
        facts = facts_of_rank(about, mpi.end_mpi4py(asked))
    with limit.on("telling the others what it knows", "see which rank is missing above"):
        ranks: dict[int, dict[str, Facts]] = dict(enumerate(world.gather(facts, size)))
    found = Job(ranks)
    if size > 1 and not any(one["plugin"]["backend"].get("error") for one in ranks.values()):
        try:
            with limit.on("exchanging messages", of_exchanging(about.get("mpi_abi"))):
                found = found._replace(exchange=exchange.measure(rank, size, found.hosts, limit))
        except Exception as error:
            failure = f"{launched.who()} failed while {limit.doing}: {error}"
            return cannot_run(found._replace(failure=failure), arguments)
    status = 1 if any(finding.is_problem for finding in found.findings()) else 0
    if rank == 0 and not (show(found, arguments) and drawable):
        status = max(status, 1)
    # All has been told by now.
    remedy = "MPI_Finalize hangs, as it may in other jobs: try a newer MPI, or another UCX_TLS"
    with limit.on("leaving the job", remedy):
        _lifecycle.leave(status)


def draws(arguments: argparse.Namespace) -> bool:
    """Whether a picture that was asked for can be written; the first rank says why not, and goes on
    without it, since others may be joining the job already."""
    if arguments.plot is None or launched.rank():
        return True
    why = plot.why_not(arguments.plot)
    if why is not None:
        arguments.plot = None
        print(f"mpi_cuda doctor: no picture is drawn: {why}", file=sys.stderr, flush=True)
    return why is None


def say_what_may_end_it() -> None:
    """MPI may end a rank that it can give no memory, and then there is no report."""
    if launched.rank() is not None and launched.is_first_here():
        for finding in memory.check(memory.collect({})):
            if finding.is_problem:
                line = f"{launched.who()}: {text.line(finding)}"
                print(line, file=sys.stderr, flush=True)


def of_joining() -> str:
    """The remedy for a rank that does not join in time."""
    if launched.rank() is None:
        return "give it more time, or try another MPI (MPI_CUDA_LIBMPI)"
    return "see whether the others have failed, or are still starting"


def of_exchanging(abi: str | None) -> str:
    """The remedy for messages that do not come, by variables that this MPI reads."""
    variable = "OMPI_MCA_btl=tcp,self" if abi == "openmpi" else "FI_PROVIDER=tcp"
    return f"try {variable} or UCX_TLS=tcp,self,sm to see if it is the network"


def without_jax(failure: str) -> int:
    """The report of a Python that has no JAX; its status. Nothing joins."""
    parser = argparse.ArgumentParser(prog="python -m mpi_cuda doctor")
    add_arguments(parser)
    arguments = parser.parse_args(sys.argv[2:])
    about: dict[str, str] = {}
    with contextlib.suppress(RuntimeError, OSError):
        about |= world.about()
        _library.open_mpi()
        about |= world.about()
    facts = job.collect(about, mpi.end_mpi4py(mpi.begin_mpi4py()), failure)
    return cannot_run(Job({launched.rank() or 0: facts}, failure=failure), arguments)


def join(about: dict[str, str]) -> str | None:
    """Joins the job, and fills `about` on the way; what is wrong if that fails."""
    try:
        about |= world.about()
        _library.open_mpi()
        about |= world.about()
        _library.start()
    except (RuntimeError, OSError, AttributeError) as error:
        return str(error)
    return None


def facts_of_rank(about: dict[str, str], mpi4py: Facts | None) -> dict[str, Facts]:
    """Those of a rank that has joined; `about` is from before."""
    backend = plugin.start_backend()
    # MPI adds to the environment what looks like a launcher's.
    by_launcher = ("launcher", "launched")
    later = {name: words for name, words in world.about().items() if name not in by_launcher}
    facts = job.collect({**about, **later}, mpi4py, None)
    facts["plugin"]["backend"] = backend
    facts["cores"]["threads"] = backend.get("xla_threads")
    return facts


def cannot_run(own: Job, arguments: argparse.Namespace) -> int:
    """Says why; the first rank all that it knows, and the others a line if they live so long."""
    if not launched.rank():
        show(own, arguments)
        return CANNOT_RUN
    time.sleep(BEFORE_OTHERS)
    for finding in own.findings():
        if finding.is_problem:
            print(f"{launched.who()}: {text.line(finding)}", file=sys.stderr, flush=True)
    return CANNOT_RUN


def show(found: Job, arguments: argparse.Namespace) -> bool:
    """Prints the report, and draws it; whether it was drawn if it is to be."""
    try:
        return _show(found, arguments)
    except BrokenPipeError:
        # Whoever reads has read enough. What Python flushes at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def _show(found: Job, arguments: argparse.Namespace) -> bool:
    findings = found.findings()
    if arguments.json:
        print(json.dumps(as_json(found, findings), indent=1), flush=True)
    else:
        print(text.report(found, findings), flush=True)
    if arguments.plot and found.exchange is None:
        words = "mpi_cuda doctor: no picture is drawn, since no messages were measured"
        print(words, file=sys.stderr, flush=True)
    elif arguments.plot and found.exchange is not None:
        try:
            plot.write(found.exchange, arguments.plot)
        except OSError as error:
            print(f"mpi_cuda doctor: {error}", file=sys.stderr, flush=True)
            return False
        wrote = f"\nwrote {arguments.plot}"
        print(wrote, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    return True


def as_json(found: Job, findings: list[Finding]) -> dict[str, Any]:
    """The report for programs."""
    problems = any(finding.is_problem for finding in findings)
    return {
        "status": CANNOT_RUN if found.failure else int(problems),
        "failure": found.failure,
        "findings": [
            {
                "kind": "problem" if finding.is_problem else "note",
                "text": finding.text,
                "remedy": finding.remedy,
                "ranks": list(finding.ranks) or list(found.ranks),
            }
            for finding in findings
        ],
        "exchange": found.exchange and exchange.as_json(found.exchange),
        "ranks": [{"rank": rank, **facts} for rank, facts in found.ranks.items()],
    }
