"""Each rank's profile has files of its own.

JAX names them after the machine and the second, so ranks of a machine that profile into one folder
would overwrite each other's, and those of one profile could be in several folders.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax._src import profiler
from jax._src.lib import _profiler

from mpi_cuda import _library
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="each rank's profile has files of its own",
        used=("lib._profiler.ProfilerSession", "profiler._write_perfetto_trace_file"),
        without="ranks of one machine overwrite each other's profiles",
        test="test_ranks_of_a_machine_keep_their_profiles_apart",
    ),
)

#: Where XProf looks for profiles in a folder of logs.
_PROFILES = Path("plugins", "profile")
#: How many profiles this process has written, by folder, and the last file for Perfetto.
_written: dict[str, int] = {}
_last_trace: dict[str, Path] = {}


def install() -> None:
    """Wraps what writes the files of a profile."""
    module: Any = _profiler
    session = getattr(module, "ProfilerSession", None)
    if session is not None:
        module.ProfilerSession = _session(session)
    # Since JAX 0.12 what was collected is written by a function.
    if export := getattr(module, "export_to_xprof", None):
        module.export_to_xprof = _export(export)
    if write := getattr(profiler, "_write_perfetto_trace_file", None):
        setattr(profiler, "_write_perfetto_trace_file", _perfetto(write))  # noqa: B010


def _session(original: Any) -> Any:
    class ProfilerSession(original):
        """Takes a profile, and writes it where no other rank does."""

        def __init__(self, *options: Any) -> None:
            super().__init__(*options)
            self._session = "".join(str(getattr(one, "session_id", "") or "") for one in options)

        def stop_and_export(self, folder: str) -> None:
            with _own_folder(folder, self._session) as own:
                super().stop_and_export(own)

    return ProfilerSession


def _export(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def export_to_xprof(data: Any, folder: str, session_id: str = "") -> None:
        with _own_folder(folder, session_id) as own:
            original(data, own, session_id=session_id)

    return export_to_xprof


def _perfetto(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _write_perfetto_trace_file(folder: Any) -> Any:
        trace = _last_trace.get(str(folder))
        if trace is None:
            return original(folder)
        # JAX looks for the only trace of a folder.
        with tempfile.TemporaryDirectory(dir=trace.parent, prefix=".perfetto-") as own:
            alone = Path(own) / _PROFILES / "run"
            alone.mkdir(parents=True)
            try:
                os.link(trace, alone / trace.name)
            except OSError:
                # Some file systems have no links.
                shutil.copyfile(trace, alone / trace.name)
            made = Path(original(own))
            kept = trace.with_name(f"{trace.name.removesuffix('.trace.json.gz')}.{made.name}")
            return made.replace(kept)

    return _write_perfetto_trace_file


@contextmanager
def _own_folder(folder: str, session: str) -> Iterator[str]:
    """A folder for what JAX writes. Then the files move into `folder`, with the rank in their
    names, into the same folder for the same profile of each rank: the job's start and a number."""
    world = _library.started()
    # Elsewhere than in a file system nothing can be moved.
    if world is None or world.size == 1 or "://" in str(folder):
        yield folder
        return
    place = os.path.realpath(folder)
    number = _written[place] = _written.get(place, 0) + 1
    Path(folder).mkdir(parents=True, exist_ok=True)
    own = tempfile.mkdtemp(dir=folder, prefix=f".rank-{world.rank}-")
    try:
        yield own
        run = Path(folder) / _PROFILES / (session or f"{_start_of_job()}_{number}")
        run.mkdir(parents=True, exist_ok=True)
        for file in Path(own).glob(f"{_PROFILES}/*/*"):
            host, ending, kind = _parts(file.name)
            moved = file.replace(run / f"{host}.rank-{world.rank:05}{ending}")
            if kind == "trace":
                _last_trace[folder] = moved
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _parts(name: str) -> tuple[str, str, str]:
    """The host in the name of a file, what follows it, and which of the two files it is."""
    for ending, kind in ((".xplane.pb", "space"), (".trace.json.gz", "trace")):
        if name.endswith(ending):
            return name.removesuffix(ending), ending, kind
    return name, "", "other"


@functools.cache
def _start_of_job() -> str:
    """When the job started, the same on all ranks."""
    nanoseconds = _library.load().mpi_cuda_job()
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y_%m_%d_%H_%M_%S', time.gmtime(seconds))}_{rest // 10**6:03}"
