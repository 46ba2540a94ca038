"""GPUs: which a node has, which rank uses which, and how their data reach MPI."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from mpi_cuda._doctor import launched
from mpi_cuda._doctor.finding import Facts, Finding, note, problem

DRIVER = Path("/proc/driver/nvidia/gpus")


def collect(about: dict[str, str]) -> Facts:
    """Facts of this process."""
    models = [_model(folder) for folder in sorted(DRIVER.glob("*"))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    on_gpu = about.get("device") == "cuda"
    count = int(about.get("gpus", 0))
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    place = int(about.get("node_rank", 0))
    return {
        "models": models,
        "visible": visible,
        "driver": about.get("driver_version"),
        "device": about.get("device"),
        "reason": about.get("device_reason"),
        # Each rank gets the GPU of its place on the node (`pjrt_plugin/src/inner/cuda_options.rs`).
        "own": names[place % len(names)] if on_gpu and names else None,
        "uuid": about.get("gpu"),
        "transfer": about.get("transfer"),
        "probe_dir": about.get("probe_dir"),
        "node": launched.host(),
    }


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    """Lines of the report."""
    if facts["device"]:
        yield "device", f"{facts['device']} ({facts['reason']})"
    models = facts["models"]
    if models:
        visible = facts["visible"]
        limited = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
        yield "GPUs", f"{len(models)} ({', '.join(sorted(set(models)))}){limited}"
    if facts["own"] is not None:
        uuid = f"{facts['uuid']}, " if facts["uuid"] else ""
        yield "GPU", f"GPU {facts['own']} ({uuid}driver {facts['driver']})"
    if facts["transfer"]:
        yield "transfer", f"{facts['transfer']}; results of probes: {facts['probe_dir']}"


def check(facts: Facts) -> Iterator[Finding]:
    """Findings of one rank."""
    if facts["models"] and facts["device"] == "cpu":
        yield note(
            f"this node has {len(facts['models'])} GPU(s), and the CPU is used ({facts['reason']})",
            "install jax-cuda13-pjrt or jax-cuda12-pjrt, or set MPI_CUDA_DEVICE",
        )
    if facts["own"] is not None and (facts["transfer"] or "").startswith("staged"):
        yield note(
            f"data of GPUs go through the host: {facts['transfer']}",
            "mpirun -n 2 python -m mpi_cuda probe, if this MPI has CUDA support",
        )


def check_job(ranks: Mapping[int, Facts]) -> Iterator[Finding]:
    """Findings of all ranks together."""
    users: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, facts in ranks.items():
        if facts["own"] is not None:
            # Slurm may have each rank see one GPU, which then has the number 0.
            users[facts["node"], facts["uuid"] or facts["own"]].append(rank)
    for (node, gpu), sharing in users.items():
        if len(sharing) > 1:
            yield problem(
                f"{len(sharing)} ranks use one GPU of {node}, {gpu}",
                "start as many ranks on a node as it has GPUs (srun --gpus-per-task=1, or "
                "--ntasks-per-node)",
                tuple(sharing),
            )


def _model(folder: Path) -> str:
    try:
        lines = (folder / "information").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line[:5] == "Model"), "unknown")
