"""The network of the MPI: what it has loaded for it, and what the environment asks for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mpi_cuda._doctor.finding import Facts, Finding, note

#: What libraries of transports are called.
TRANSPORT = re.compile(
    r"/(?:lib(ucp|uct_ib|uct_cuda|fabric|psm2|psm_infinipath|portals|ibverbs|cxi|efa)\.so"
    r"|mca_(?:pml|btl|mtl)_(\w+)\.so)"
)
#: Variables that choose them, by how they begin.
VARIABLES = (
    "OMPI_MCA_pml",
    "OMPI_MCA_btl",
    "OMPI_MCA_mtl",
    "UCX_",
    "FI_PROVIDER",
    "FI_",
    "MPIR_CVAR_CH4_",
    "I_MPI_FABRICS",
    "I_MPI_OFI_",
    "MPICH_OFI_",
)
#: Devices of fast networks.
DEVICES = ("/sys/class/infiniband/*", "/sys/class/cxi/*", "/sys/class/infiniband_verbs/uverbs*")
#: What uses such devices.
FAST = {"ucp", "uct_ib", "fabric", "psm2", "ofi", "ucx", "cxi", "efa", "portals", "portals4"}


def collect(about: dict[str, str]) -> Facts:
    """Facts of this process, once MPI has started."""
    maps = Path("/proc/self/maps").read_text()
    used = {name for found in TRANSPORT.findall(maps) for name in found if name}
    devices = [path for pattern in DEVICES[:2] for path in Path("/").glob(pattern[1:])]
    return {
        "transports": sorted(used),
        "devices": sorted(path.name for path in devices),
        "variables": {
            name: value for name, value in os.environ.items() if name.startswith(VARIABLES)
        },
    }


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    """Lines of the report."""
    transports = ", ".join(facts["transports"]) or "none that can be told by its library"
    devices = ", ".join(facts["devices"]) or "none"
    yield "network", f"loaded transports: {transports}; fast network devices: {devices}"
    if facts["variables"]:
        yield "", ", ".join(f"{name}={value}" for name, value in facts["variables"].items())


def check(facts: Facts) -> Iterator[Finding]:
    """Findings of one rank."""
    if facts["devices"] and not FAST & set(facts["transports"]):
        yield note(
            f"this node has {', '.join(facts['devices'])}, and the MPI has loaded no transport for "
            "it",
            "use an MPI with UCX or libfabric (the cluster's module); between nodes this one "
            "takes TCP",
        )
