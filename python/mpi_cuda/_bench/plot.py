"""A picture of the tables: time and bus bandwidth by size, a column for each operation."""

from __future__ import annotations

from pathlib import Path

from mpi_cuda._bench.record import Result


def write(result: Result, path: Path) -> None:
    """Draws it; matplotlib is there (`mpi_cuda._doctor.plot.refused`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.problem.name for row in result.rows))
    size = (4 * len(names), 7)
    figure, grid = pyplot.subplots(2, len(names), figsize=size, squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        rows = [row for row in result.rows if row.problem.name == name]
        for library in dict.fromkeys(one for row in rows for one in row.timings):
            measured = [row for row in rows if library in row.timings]
            sizes = [row.problem.size for row in measured]
            times = [row.timings[library].time for row in measured]
            rates = [row.problem.rates(time)[1] for row, time in zip(measured, times, strict=True)]
            grid[0][column].plot(sizes, [time * 1e6 for time in times], "o-", label=library)
            grid[1][column].plot(sizes, rates, "o-", label=library)
        for axes, what in ((grid[0][column], "time in us"), (grid[1][column], "busbw in GB/s")):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("size in bytes")
            axes.set_ylabel(what)
            axes.grid(True, alpha=0.3)
        grid[0][column].set_yscale("log")
        grid[0][column].set_title(name)
        grid[0][column].legend()
    about = result.about
    figure.suptitle(f"{about['ranks']} ranks, {about['dtype']}, {about['mpi']}")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
