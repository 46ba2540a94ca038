"""`python -m mpi_cuda doctor`: what a job is made of, and what is wrong with it (`_doctor`).

`mpirun -n 4 python -m mpi_cuda bench`: how fast operations are, in tables (`_bench`).

`python -m mpi_cuda report DIR`: what the ranks of a job were doing (`_report`).

`mpirun -n 2 python -m mpi_cuda probe`: whether MPI can be given the memory of this job's GPUs.

Tries it with arrays that XLA itself allocated, first as they are and then through copies on the
device, and keeps what came of it for later jobs with this MPI, driver and plugin
(`MPI_CUDA_PROBE_DIR`, by default `~/.cache/mpi_cuda`). MPI may end the job by a segmentation
fault: then the next probe goes on with the next way. It is a job of its own, so that nothing else
is lost.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

#: Bytes of a row: small messages, longer ones, and such as MPI sends in several parts.
SIZES = (8, 4096, 1 << 18, 1 << 22, 1 << 25)
WAYS = ("the arrays as they are", "copies of them on the device")


def exchange() -> None:
    """Every kind of operation, on arrays that a kernel has just made.

    Raises:
      AssertionError: data are wrong.
      Exception: an operation failed.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import mpi_cuda as m
    from mpi_cuda import notoken as nt

    rank, size = m.COMM_WORLD.rank, m.COMM_WORLD.size
    left, right = (rank - 1) % size, (rank + 1) % size

    def row(rank: int, length: int) -> Any:
        return (np.arange(length) % 1000 + 7 * rank).astype(np.float32)

    make = jax.jit(lambda x: x + 1)
    # All is exchanged, whatever is wrong, so that ranks stay together.
    found = []
    for bytes_ in SIZES:
        length = bytes_ // 4
        everybody = np.stack([row(r, length) for r in range(size)])
        for _ in range(3):
            x = make(jnp.asarray(everybody[rank] - 1))
            rows = make(jnp.asarray(everybody - 1))
            for name, got, want in [
                ("sendrecv", nt.sendrecv(x, x, source=left, dest=right), everybody[left]),
                ("allreduce", nt.allreduce(x, m.SUM), everybody.sum(0)),
                ("allgather", nt.allgather(x), everybody),
                ("alltoall", nt.alltoall(rows), np.stack([everybody[rank]] * size)),
                ("bcast", nt.bcast(x, 0), everybody[0]),
            ]:
                # Used on the device at once, and seen by the host.
                if wrong := np.count_nonzero(np.asarray(make(got)) != want + 1):
                    found.append(f"{wrong} numbers of {name} of {bytes_} bytes")
    jax.effects_barrier()
    assert not found, f"wrong are {', '.join(found)}"


def probe() -> int:
    """Tries one way after the other; 0 if one works."""
    os.environ["MPI_CUDA_PROBE"] = "1"
    import jax

    import mpi_cuda as m
    from mpi_cuda import _library

    # Python has imported JAX, which reads its variables then, with this package.
    jax.config.update("jax_platforms", "mpi_cuda")
    if not _library.is_ours(jax.local_devices()[0].client):
        raise RuntimeError("mpi_cuda probe: JAX does not use mpi_cuda; set JAX_PLATFORMS=mpi_cuda")
    library, rank = _library.load(), m.COMM_WORLD.rank

    def log(text: str) -> None:
        if rank == 0:
            print(f"mpi_cuda probe: {text}", flush=True)

    def checked(result: int) -> int:
        if result < 0:
            raise RuntimeError(_library.last_error())
        return result

    while (way := checked(library.mpi_cuda_probe_next())) < len(WAYS):
        log(f"trying {WAYS[way]}")
        failure = None
        try:
            exchange()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            print(f"mpi_cuda probe: rank {rank}: {failure}", flush=True)
        if checked(library.mpi_cuda_probe_report(failure.encode() if failure else None)):
            log(f"MPI can be given {WAYS[way]}; from now on MPI_CUDA_TRANSFER=auto is direct")
            return 0
    log("MPI cannot be given device memory: MPI_CUDA_TRANSFER=auto is staged")
    return 1


def main() -> int:
    """Reads the command line."""
    from mpi_cuda import _bench, _doctor, _report

    parser = argparse.ArgumentParser(prog="python -m mpi_cuda")
    commands = parser.add_subparsers(dest="command", required=True)
    _doctor.add_arguments(
        commands.add_parser("doctor", help="what is wrong here, and how fast it is")
    )
    _bench.add_arguments(commands.add_parser("bench", help="how fast operations are, in tables"))
    commands.add_parser("probe", help="whether MPI can be given the memory of this job's GPUs")
    _report.add_arguments(commands.add_parser("report", help="what the ranks of a job were doing"))
    arguments = parser.parse_args()
    if arguments.command == "doctor":
        return _doctor.run(arguments)
    if arguments.command == "bench":
        return _bench.run(arguments)
    return _report.run(arguments) if arguments.command == "report" else probe()


if __name__ == "__main__":
    sys.exit(main())
