"""A picture of the exchange: latency and bandwidth between any two ranks."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from mpi_cuda._doctor.exchange import LARGE, SMALL, Exchange
from mpi_cuda._report.text import size


def refused() -> str | None:
    """Why no picture can be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install matplotlib"
    return None


def why_not(path: Path) -> str | None:
    """Why no picture can be written to that file, as far as its folder says."""
    if path.is_dir():
        return f"Is a directory: '{path}'"
    if not path.parent.is_dir():
        return f"No such file or directory: '{path}'"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"Permission denied: '{path}'"
    return None


def write(exchange: Exchange, path: Path) -> None:
    """Draws two heat maps beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    count = len(exchange.hosts)
    small, large = (np.array(times) for times in (exchange.small, exchange.large))
    own = np.eye(count, dtype=bool)
    latency = np.ma.array(small * 1e6, mask=own)
    bandwidth = np.ma.array(LARGE / np.where(own, 1, large) / 1e9, mask=own)
    figure, both = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes, values, title in (
        (both[0], latency, f"latency of {SMALL} B in us"),
        (both[1], bandwidth, f"bandwidth of {size(LARGE)} in GB/s"),
    ):
        image = axes.imshow(values, cmap="viridis", norm=LogNorm())
        figure.colorbar(image, ax=axes)
        axes.set_title(title)
        axes.set_xlabel("rank")
        axes.set_ylabel("rank")
        # Lines where a node ends.
        for rank in range(1, count):
            if exchange.hosts[rank] != exchange.hosts[rank - 1]:
                axes.axhline(rank - 0.5, color="white")
                axes.axvline(rank - 0.5, color="white")
        if count <= 32:
            axes.set_xticks(range(count))
            axes.set_yticks(range(count))
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
