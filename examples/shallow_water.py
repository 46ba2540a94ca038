"""A shallow-water ocean on any number of MPI ranks.

Nonlinear shallow-water equations on a beta plane, periodic in x, with walls in y; an unstable jet
as the initial state. The grid is an Arakawa C grid, decomposed in both dimensions; each rank
exchanges halos with its neighbours by `mpi_cuda.halo_exchange`, in token order, inside one jitted
loop of many steps.

    JAX_PLATFORMS=mpi_cuda mpirun -n 4 python examples/shallow_water.py --nx 256 --ny 128 --days 10

Sources: the discretisation of Sadourny (1975), "The dynamics of finite-difference models of the
shallow-water equations", J. Atmos. Sci. 32; time steps by the quasi-second-order Adams-Bashforth
scheme of ocean models (Marshall et al. 1997, "A finite-volume, incompressible Navier Stokes model
for studies of the ocean on parallel computers", J. Geophys. Res. 102), which evaluates the
equations once a step. Mass is conserved to rounding, because the continuity equation is in flux
form.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mpi_cuda as m

GRAVITY = 9.81
DEPTH = 100.0  # m
LENGTH_X, LENGTH_Y = 2.0e6, 1.0e6  # m
CORIOLIS, BETA = 1.0e-4, 2.0e-11  # 1/s, 1/(m s)
VISCOSITY = 150.0  # m²/s
DAMPING = 0.1  # of the time steps
DAY = 86400.0
MASS_BOUND = 1e-5
"""Largest relative change of the total mass, in float32."""


class Grid(NamedTuple):
    """This rank's part of the grid."""

    nx: int
    ny: int
    columns: int
    rows: int
    column: int
    row: int

    @property
    def dx(self) -> float:
        return LENGTH_X / self.nx

    @property
    def dy(self) -> float:
        return LENGTH_Y / self.ny

    def part(self, column: int, row: int) -> tuple[slice, slice]:
        """Rows and columns of the global grid that a rank owns; sizes differ by at most one."""
        y = [self.ny * i // self.rows for i in (row, row + 1)]
        x = [self.nx * i // self.columns for i in (column, column + 1)]
        return slice(*y), slice(*x)

    @property
    def own(self) -> tuple[slice, slice]:
        return self.part(self.column, self.row)


class Fields(NamedTuple):
    """Velocities and surface height with one halo cell on each side, or their time derivatives
    without."""

    u: jax.Array
    v: jax.Array
    h: jax.Array


class State(NamedTuple):
    """The fields, their time derivatives at the step before, and the token."""

    fields: Fields
    rates: Fields
    token: jax.Array


def decompose(nx: int, ny: int, size: int, rank: int) -> Grid:
    """As square as possible, with every rank at least two cells wide."""
    options = [c for c in range(1, size + 1) if size % c == 0]
    columns = min(options, key=lambda c: abs(nx / c - ny / (size // c)))
    rows = size // columns
    if nx < 2 * columns or ny < 2 * rows:
        raise SystemExit(f"the grid {nx}x{ny} is too small for {columns}x{rows} ranks")
    return Grid(nx, ny, columns, rows, rank % columns, rank // columns)


def exchange(
    grid: Grid, fields: Sequence[jax.Array], token: jax.Array
) -> tuple[Sequence[jax.Array], jax.Array]:
    """Fills the halos of all fields, each side in one message. Halos beyond a wall are kept."""
    ranks = (grid.rows, grid.columns)
    return m.halo_exchange(fields, ranks, periodic=(False, True), token=token)


def walls(grid: Grid, u: jax.Array, v: jax.Array, h: jax.Array):
    """No flow through the walls and no stress along them."""
    if grid.row == 0:
        u, h = u.at[0, :].set(u[1, :]), h.at[0, :].set(h[1, :])
        v = v.at[0, :].set(0.0)
    if grid.row == grid.rows - 1:
        u, h = u.at[-1, :].set(u[-2, :]), h.at[-1, :].set(h[-2, :])
        v = v.at[-2:, :].set(0.0)
    return u, v, h


def coriolis(grid: Grid) -> jax.Array:
    """Coriolis parameter at the corners of cells, halo included."""
    rows, _ = grid.own
    y = (np.arange(rows.start - 1, rows.stop + 1) + 1) * grid.dy - LENGTH_Y / 2
    return jnp.asarray(CORIOLIS + BETA * y, jnp.float32)[:, None]


# On the C grid u[j, i] is on the east face of cell (j, i), v[j, i] on its north face. Differences
# and averages below shrink the array by one; `inner` cuts what belongs to this rank.


def tendency(grid: Grid, fields: Fields, token: jax.Array) -> tuple[Fields, jax.Array]:
    """Time derivatives. Exchanges the fields, then vorticity and fluxes."""
    filled, token = exchange(grid, fields, token)
    u, v, h = walls(grid, *filled)
    depth = DEPTH + h
    dx, dy = grid.dx, grid.dy
    # Fluxes through east and north faces; energy at centres; vorticity at north-east corners.
    flux_x = 0.5 * (depth[:, :-1] + depth[:, 1:]) * u[:, :-1]
    flux_y = 0.5 * (depth[:-1, :] + depth[1:, :]) * v[:-1, :]
    kinetic = 0.25 * (u[1:, 1:] ** 2 + u[1:, :-1] ** 2 + v[1:, 1:] ** 2 + v[:-1, 1:] ** 2)
    pressure = jnp.zeros_like(h).at[1:, 1:].set(kinetic) + GRAVITY * h
    rotation = (v[:-1, 1:] - v[:-1, :-1]) / dx - (u[1:, :-1] - u[:-1, :-1]) / dy
    corner = 0.25 * (depth[:-1, :-1] + depth[1:, :-1] + depth[:-1, 1:] + depth[1:, 1:])
    q = (rotation + coriolis(grid)[:-1]) / corner
    # Values of the neighbours that the stencils need beyond what is computed here.
    full = partial(pad_to, h.shape)
    derived = [keep_inner(x) for x in (pressure, full(flux_x), full(flux_y))]
    derived, token = exchange(grid, [*derived, q_with_walls(grid, full(q))], token)
    pressure, flux_x, flux_y, q = derived
    if grid.row == grid.rows - 1:
        pressure = pressure.at[-1, :].set(pressure[-2, :])
        flux_x = flux_x.at[-1, :].set(flux_x[-2, :])
    if grid.row == 0:
        flux_x = flux_x.at[0, :].set(flux_x[1, :])

    qu = 0.5 * (
        q[1:-1, 1:-1] * 0.5 * (flux_y[1:-1, 1:-1] + flux_y[1:-1, 2:])
        + q[:-2, 1:-1] * 0.5 * (flux_y[:-2, 1:-1] + flux_y[:-2, 2:])
    )
    qv = 0.5 * (
        q[1:-1, 1:-1] * 0.5 * (flux_x[1:-1, 1:-1] + flux_x[2:, 1:-1])
        + q[1:-1, :-2] * 0.5 * (flux_x[1:-1, :-2] + flux_x[2:, :-2])
    )
    du = qu - (pressure[1:-1, 2:] - pressure[1:-1, 1:-1]) / dx + VISCOSITY * laplacian(u, dx, dy)
    dv = -qv - (pressure[2:, 1:-1] - pressure[1:-1, 1:-1]) / dy + VISCOSITY * laplacian(v, dx, dy)
    dh = -(flux_x[1:-1, 1:-1] - flux_x[1:-1, :-2]) / dx
    dh -= (flux_y[1:-1, 1:-1] - flux_y[:-2, 1:-1]) / dy
    if grid.row == grid.rows - 1:
        dv = dv.at[-1, :].set(0.0)
    return Fields(du, dv, dh), token


def pad_to(shape: tuple[int, ...], x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, n - k) for n, k in zip(shape, x.shape, strict=True)])


def keep_inner(x: jax.Array) -> jax.Array:
    return jnp.pad(x[1:-1, 1:-1], 1)


def q_with_walls(grid: Grid, q: jax.Array) -> jax.Array:
    """The halo is exchanged, but the wall's own vorticity, on the south row, is kept."""
    inner = keep_inner(q)
    return inner.at[0, :].set(q[0, :]) if grid.row == 0 else inner


def laplacian(x: jax.Array, dx: float, dy: float) -> jax.Array:
    centre = x[1:-1, 1:-1]
    return (x[1:-1, 2:] - 2 * centre + x[1:-1, :-2]) / dx**2 + (
        x[2:, 1:-1] - 2 * centre + x[:-2, 1:-1]
    ) / dy**2


def step(grid: Grid, dt: float, state: State) -> State:
    """One step of the quasi-second-order Adams-Bashforth scheme."""
    rates, token = tendency(grid, state.fields, state.token)
    fields = [
        x.at[1:-1, 1:-1].add(dt * ((1.5 + DAMPING) * new - (0.5 + DAMPING) * last))
        for x, new, last in zip(state.fields, rates, state.rates, strict=True)
    ]
    return State(Fields(*fields), rates, token)


def begin(grid: Grid, fields: Fields) -> State:
    """The state before the first step, which is one of Euler's."""
    return State(fields, *tendency(grid, fields, m.create_token()))


def initial_fields(grid: Grid) -> Fields:
    """A jet in geostrophic balance, with a small bump that makes it unstable."""
    rows, columns = grid.own
    x = (np.arange(grid.nx) + 0.5) * grid.dx
    y = (np.arange(grid.ny) + 0.5) * grid.dy - LENGTH_Y / 2
    width, speed = LENGTH_Y / 18, 3.0
    jet = speed / np.cosh(y / width) ** 2
    f = CORIOLIS + BETA * y
    height = -np.cumsum(f * jet / GRAVITY) * grid.dy
    height -= height.mean()
    bump = (
        0.05
        * np.exp(-(((y[:, None] + width) / width) ** 2))
        * (np.cos(2 * np.pi * 3 * x / LENGTH_X) + 0.4 * np.cos(2 * np.pi * 5 * x / LENGTH_X + 1.0))
    )
    u = np.broadcast_to(jet[:, None], (grid.ny, grid.nx))
    h = height[:, None] + bump
    local = [np.pad(field[rows, columns], 1).astype(np.float32) for field in (u, 0 * u, h)]
    return Fields(*map(jnp.asarray, local))


def totals(grid: Grid, state: State) -> tuple[jax.Array, State]:
    """Mean depth deviation and mean energy, over all ranks."""
    u, v, h = (field[1:-1, 1:-1] for field in state.fields)
    cells = grid.nx * grid.ny
    mass = h.sum() / cells
    energy = (0.5 * (DEPTH + h) * (u**2 + v**2) + 0.5 * GRAVITY * h**2).sum() / cells
    sums, token = m.allreduce(jnp.stack([mass, energy]), m.SUM, token=state.token)
    return sums, state._replace(token=token)


def gather_field(grid: Grid, field: jax.Array) -> np.ndarray | None:
    """The whole field on rank 0. Parts may differ in size by one, so they are padded."""
    rows, columns = -(-grid.ny // grid.rows), -(-grid.nx // grid.columns)
    inner = field[1:-1, 1:-1]
    padded = (
        jnp.zeros((rows, columns), field.dtype).at[: inner.shape[0], : inner.shape[1]].set(inner)
    )
    parts, _ = m.gather(padded, 0)
    if m.COMM_WORLD.rank != 0:
        return None
    whole = np.empty((grid.ny, grid.nx), np.float32)
    for rank, part in enumerate(np.asarray(parts)):
        where = grid.part(rank % grid.columns, rank // grid.columns)
        shape = tuple(s.stop - s.start for s in where)
        whole[where] = part[: shape[0], : shape[1]]
    return whole


def vorticity(grid: Grid, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Relative vorticity at corners, in units of the Coriolis parameter."""
    dv = (np.roll(v, -1, 1) - v) / grid.dx
    du = np.diff(u, axis=0, append=u[-1:]) / grid.dy
    return (dv - du) / CORIOLIS


class Pictures:
    """Frames of the run, on rank 0."""

    def __init__(self, grid: Grid, folder: Path):
        self.grid, self.folder, self.frames = grid, folder, []

    def add(self, days: float, h: np.ndarray, zeta: np.ndarray) -> None:
        self.frames.append((days, h, zeta))

    def _draw(self, figure, days: float, h: np.ndarray, zeta: np.ndarray) -> None:
        figure.clear()
        axes = figure.subplots(2, 1, sharex=True)
        extent = (0, LENGTH_X / 1e3, 0, LENGTH_Y / 1e3)
        fields = [
            (h, "surface height (m)", "viridis", None),
            (zeta, "vorticity / f", "RdBu_r", 0.35),
        ]
        for axis, (field, label, colours, limit) in zip(axes, fields, strict=True):
            high = limit or max(float(abs(frame[1]).max()) for frame in self.frames)
            low = -high
            image = axis.imshow(
                field,
                origin="lower",
                extent=extent,
                cmap=colours,
                vmin=low,
                vmax=high,
                aspect="auto",
            )
            figure.colorbar(image, ax=axis, label=label)
            for column in range(1, self.grid.columns):
                edge = self.grid.part(column, 0)[1].start * self.grid.dx / 1e3
                axis.axvline(edge, color="k", lw=0.8, ls="--")
            for row in range(1, self.grid.rows):
                edge = self.grid.part(0, row)[0].start * self.grid.dy / 1e3
                axis.axhline(edge, color="k", lw=0.8, ls="--")
            axis.set_ylabel("y (km)")
        axes[1].set_xlabel("x (km)")
        ranks = self.grid.columns * self.grid.rows
        axes[0].set_title(f"day {days:.1f}, {ranks} ranks (dashed: decomposition)")

    def save(self) -> list[Path]:
        """Writes a PNG of the last frame and a GIF of all."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from PIL import Image

        self.folder.mkdir(parents=True, exist_ok=True)
        figure = plt.figure(figsize=(8, 6.4), dpi=100, layout="constrained")
        images = []
        for frame in self.frames:
            self._draw(figure, *frame)
            figure.canvas.draw()
            images.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]))
        png, gif = self.folder / "shallow_water.png", self.folder / "shallow_water.gif"
        images[-1].save(png)
        small = [image.resize((560, 448)).quantize(64) for image in images]
        small[0].save(gif, save_all=True, append_images=small[1:], duration=120, loop=0)
        return [png, gif]


def progress(days: float, total: float, rate: float, mass: float, energy: float) -> None:
    done = int(30 * days / total)
    bar = "#" * done + "." * (30 - done)
    end = "\r" if sys.stdout.isatty() and days < total else "\n"
    print(
        f"[{bar}] day {days:5.1f} of {total:g}  {rate:7.1f} steps/s  "
        f"mass {mass:+.2e}  energy {energy:.4f}",
        end=end,
        flush=True,
    )


def benchmark(grid: Grid, run, state: State, steps: int = 2000) -> None:
    """Steps per second, and how much of a step the halo exchanges are when they are all it does."""

    @jax.jit
    def halos(state: State) -> jax.Array:
        def body(_, carry):
            fields, token = carry
            fields, token = exchange(grid, fields, token)
            more, token = exchange(grid, [*fields, fields[0]], token)
            return more[:3], token

        return jax.lax.fori_loop(0, steps, body, (list(state.fields), state.token))[1]

    jax.block_until_ready(halos(state))
    start = time.perf_counter()
    jax.block_until_ready(halos(state))
    exchanges = time.perf_counter() - start
    state, sums = run(state, steps)
    jax.block_until_ready(sums)
    start = time.perf_counter()
    state, sums = run(state, steps)
    jax.block_until_ready(sums)
    seconds = time.perf_counter() - start
    if m.COMM_WORLD.rank == 0:
        print(
            f"{grid.nx}x{grid.ny} on {m.COMM_WORLD.size} ranks: {steps / seconds:.1f} steps/s, "
            f"halo exchange {100 * exchanges / seconds:.0f}% "
            f"({exchanges / steps * 1e6:.1f} of {seconds / steps * 1e6:.1f} us)"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nx", type=int, default=192, help="cells in x, over all ranks")
    parser.add_argument("--ny", type=int, default=96, help="cells in y, over all ranks")
    parser.add_argument("--days", type=float, default=20.0, help="model days")
    parser.add_argument("--save", type=Path, help="write the final fields to this .npz")
    parser.add_argument("--pictures", type=Path, default=Path("out"), help="folder for PNG and GIF")
    parser.add_argument("--frames", type=int, default=40, help="about so many frames of the GIF")
    parser.add_argument("--benchmark", action="store_true", help="time the steps, draw nothing")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    world = m.COMM_WORLD
    grid = decompose(arguments.nx, arguments.ny, world.size, world.rank)
    speed = np.sqrt(GRAVITY * DEPTH)
    # The shortest gravity waves turn by 0.42 of an angle a step, for which the scheme is stable.
    dt = 0.15 * min(grid.dx, grid.dy) / speed
    state = jax.jit(partial(begin, grid))(initial_fields(grid))

    @partial(jax.jit, static_argnums=1, donate_argnums=0)
    def run(state: State, steps: int) -> tuple[State, jax.Array]:
        state = jax.lax.fori_loop(0, steps, lambda _, s: step(grid, dt, s), state)
        sums, state = totals(grid, state)
        return state, sums

    if arguments.benchmark:
        benchmark(grid, run, state)
        return 0

    total_steps = max(1, round(arguments.days * DAY / dt))
    chunk = max(1, total_steps // max(1, arguments.frames))
    chunks = -(-total_steps // chunk)
    pictures = Pictures(grid, arguments.pictures)
    state, sums = run(state, 0)
    first_mass, drift = float(sums[0]), 0.0
    if world.rank == 0:
        print(f"{grid.nx}x{grid.ny} cells on {grid.columns}x{grid.rows} ranks, step {dt:.0f} s")
    start, compiled = time.perf_counter(), 1
    for i in range(chunks + 1):
        u, v, h = (gather_field(grid, field) for field in state.fields)
        days = i * chunk * dt / DAY
        if world.rank == 0:
            pictures.add(days, h, vorticity(grid, u, v))
        if i == chunks:
            break
        state, sums = run(state, chunk)
        mass, energy = map(float, sums)
        if i == 0:
            start, compiled = time.perf_counter(), 0
        drift = max(drift, abs(mass - first_mass) / DEPTH)
        if world.rank == 0:
            rate = chunk * i / (time.perf_counter() - start) if i and not compiled else 0.0
            progress((i + 1) * chunk * dt / DAY, chunks * chunk * dt / DAY, rate, drift, energy)
        if not np.isfinite(energy) or drift > MASS_BOUND:
            raise SystemExit(f"mass changed by {drift:.1e} of the whole (bound {MASS_BOUND:g})")
    if world.rank == 0:
        print(f"mass conserved: {drift:.1e} of the whole (bound {MASS_BOUND:g})")
        for path in pictures.save():
            print(f"picture: {path.resolve()}")
        if arguments.save:
            np.savez(arguments.save, u=u, v=v, h=h)
            print(f"fields: {arguments.save.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
