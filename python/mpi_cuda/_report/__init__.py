"""`python -m mpi_cuda report DIR`: reads what the ranks of a job left in `MPI_CUDA_RECORD_DIR`.

It needs neither MPI nor JAX. `record` reads one file, `job` puts the ranks' together, `findings`
says what they mean; `text`, `trace` and `plot` show it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mpi_cuda._report import job, plot, text, trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="MPI_CUDA_RECORD_DIR of the job")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a timeline for Perfetto")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw who waited for whom")


def run(arguments: argparse.Namespace) -> int:
    """Reports; 1 if there is nothing to read."""
    try:
        found = job.load(arguments.folder)
        print(text.report(found))
        if arguments.trace:
            trace.write(found, arguments.trace)
            print(f"\nwrote {arguments.trace}: open it at https://ui.perfetto.dev")
        if arguments.plot:
            plot.write(found, arguments.plot)
            print(f"\nwrote {arguments.plot}")
    except (OSError, ValueError) as error:
        print(f"mpi_cuda report: {error}", file=sys.stderr)
        return 1
    return 0
