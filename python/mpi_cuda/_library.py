"""The native library: its file, and its numbers and exported functions (`mpi_cuda.h`)."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import platform
import struct
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent / "lib"
LIBRARY = FOLDER / "libpjrt_mpi_cuda.so"
RANK_MARK = "MPI_CUDA_RANK_PROCESS"
#: Packages with an XLA plugin and its file, by the variable that tells the library where they are;
#: which of them is taken is the library's choice (`pjrt_plugin/src/inner/find.rs`).
WHEELS = {
    "MPI_CUDA_PLUGIN_CPU": [
        ("lammps_jax_pjrt_cpu", "pjrt_c_api_cpu_plugin.so"),
        ("xla_plugins.xla_cpu_pjrt", "xla_cpu_pjrt.so"),
    ],
    "MPI_CUDA_PLUGIN_CUDA": [
        ("jax_plugins.xla_cuda13", "xla_cuda_plugin.so"),
        ("jax_plugins.xla_cuda12", "xla_cuda_plugin.so"),
    ],
}


# Attribute values of the custom calls.
ATTRIBUTE_ANY = -1
ATTRIBUTE_PROC_NULL = -2
# Reductions in the order of their numbers; the user's own have larger ones.
REDUCTIONS = ("SUM", "PROD", "MIN", "MAX", "LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR")
# Communicators that always exist.
WORLD_NUMBER, DEFAULT_NUMBER, SELF_NUMBER = 0, 1, 2


class World(NamedTuple):
    """This process's place among the ranks; `family` is openmpi, mpich, mpi_abi or none."""

    rank: int
    size: int
    family: str


def _find_inner_plugins() -> None:
    """Tells the library where the wheels with XLA plugins are, as Python finds them."""
    for variable, wheels in WHEELS.items():
        found = [str(plugin) for wheel in wheels if (plugin := _file_of(*wheel))]
        if found and variable not in os.environ:
            os.environ[variable] = os.pathsep.join(found)


def _find_packages() -> None:
    """Tells the library where packages put theirs, such as the wheels of MPIs: what is installed in
    place, as a checkout is, cannot tell by its own path."""
    os.environ.setdefault("MPI_CUDA_PACKAGES", os.path.join(sys.prefix, "lib"))


def _file_of(package: str, file: str) -> Path | None:
    """A file in a package that is installed, without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(file)
    return path if path.is_file() else None


# Number of launches with operations that the main thread has asked for: the library's own, once it
# is loaded.
launches = ctypes.c_uint64(0)


@functools.cache
def load() -> ctypes.CDLL:
    """Loads the library. Nothing is initialised by that.

    Raises:
      RuntimeError: the library was not built, is not whole, or is of another system.
    """
    if not os.path.isfile(LIBRARY):
        raise RuntimeError(
            f"{LIBRARY} is missing, or its folder cannot be read: install the wheel of mpi_cuda "
            "again, or in a checkout run scripts/setup, which builds it"
        )
    _find_inner_plugins()
    _find_packages()
    if wrong := cut_off(LIBRARY):
        raise RuntimeError(f"{LIBRARY} {wrong}: install the wheel of mpi_cuda again")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise RuntimeError(_cannot_load(error)) from None
    _declare(library)
    global launches
    launches = ctypes.c_uint64.from_address(library.mpi_cuda_launches_by_main())
    return library


def _declare(library: ctypes.CDLL) -> None:
    """The types of its functions (`mpi_cuda.h`)."""
    int_pointer = ctypes.POINTER(ctypes.c_int)
    texts, pointers = [ctypes.c_char_p] * 2, [ctypes.c_void_p] * 2
    signatures: dict[str, tuple[object, list[object]]] = {
        "mpi_cuda_last_error": (ctypes.c_char_p, []),
        "mpi_cuda_log_prefix": (ctypes.c_char_p, []),
        "mpi_cuda_open_mpi": (ctypes.c_char_p, []),
        "mpi_cuda_about": (ctypes.c_char_p, []),
        "mpi_cuda_is_rank": (ctypes.c_int, []),
        "mpi_cuda_start": (
            ctypes.c_int,
            [int_pointer, int_pointer, ctypes.POINTER(ctypes.c_char_p)],
        ),
        "mpi_cuda_job": (ctypes.c_uint64, []),
        "mpi_cuda_comm": (
            ctypes.c_int64,
            [ctypes.c_uint64, ctypes.c_char_p, int_pointer, int_pointer],
        ),
        "mpi_cuda_op": (ctypes.c_int64, [ctypes.c_uint64]),
        "mpi_cuda_status": (ctypes.c_int64, [ctypes.c_void_p]),
        "mpi_cuda_reads_status": (None, []),
        "mpi_cuda_describe": (None, [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p]),
        "mpi_cuda_know_kinds": (None, [ctypes.c_uint64, ctypes.c_char_p]),
        "mpi_cuda_has_unread": (ctypes.c_int, []),
        "mpi_cuda_callback_failed": (None, [ctypes.c_char_p]),
        "mpi_cuda_launches_by_main": (ctypes.c_void_p, []),
        "mpi_cuda_refuse": (None, [ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p]),
        "mpi_cuda_is_awaited": (ctypes.c_int, []),
        "mpi_cuda_set_where": (None, [ctypes.c_void_p]),
        "mpi_cuda_coordinator": (ctypes.c_int, [ctypes.c_char_p, ctypes.c_size_t]),
        "mpi_cuda_has_died": (ctypes.c_int, [ctypes.c_int]),
        "mpi_cuda_several_nodes": (ctypes.c_int, []),
        "mpi_cuda_tell_coordinator": (None, [ctypes.c_uint16]),
        "mpi_cuda_set_bring_up": (None, [ctypes.c_void_p]),
        "mpi_cuda_wait": (ctypes.c_int, []),
        "mpi_cuda_in_flight": (ctypes.c_int, []),
        "mpi_cuda_launches_on_callers": (ctypes.c_int, []),
        "mpi_cuda_write_record": (ctypes.c_int, [ctypes.c_char_p]),
        "mpi_cuda_failed": (None, [ctypes.c_int, ctypes.c_char_p]),
        "mpi_cuda_main_thread_failed": (None, [ctypes.c_int, ctypes.c_char_p]),
        "mpi_cuda_abort": (None, [ctypes.c_int]),
        "mpi_cuda_ending": (None, []),
        "mpi_cuda_shutdown": (None, []),
        "mpi_cuda_register_ffi_target": (ctypes.c_int, [ctypes.c_char_p, ctypes.c_void_p]),
        "mpi_cuda_register_untyped_target": (
            ctypes.c_void_p,
            [ctypes.c_char_p, ctypes.c_void_p],
        ),
        "mpi_cuda_set_trampoline": (None, [ctypes.c_void_p]),
        "mpi_cuda_set_partitioner": (None, [ctypes.c_void_p]),
        "mpi_cuda_each_target": (None, [ctypes.c_void_p]),
        "mpi_cuda_partitioned": (
            None,
            [ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t],
        ),
        "mpi_cuda_on_gpu": (ctypes.c_int, []),
        "mpi_cuda_gather": (ctypes.c_int, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p]),
        "mpi_cuda_ping": (ctypes.c_double, [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]),
        "mpi_cuda_raw": (ctypes.c_double, [*texts, ctypes.c_int64, *pointers, ctypes.c_int]),
        "mpi_cuda_probe_next": (ctypes.c_int, []),
        "mpi_cuda_probe_report": (ctypes.c_int, [ctypes.c_char_p]),
    }
    for name, (result, arguments) in signatures.items():
        if not hasattr(library, name):
            raise RuntimeError(
                f"{LIBRARY} has no function {name}: it is another version's than the Python part. "
                "Install the wheel of mpi_cuda again, or in a checkout run scripts/setup"
            )
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


def cut_off(file: Path) -> str | None:
    """Whether a shared library's file ends before the segments that its headers name (elf(5)),
    which is a SIGBUS for who loads it. As `mpi_runtime/src/elf.rs`; its words are a predicate."""
    try:
        with file.open("rb") as library:
            header, length = library.read(64), os.fstat(library.fileno()).st_size
            if length == 0:
                return "is empty"
            if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
                return None
            (start,) = struct.unpack_from("<Q", header, 32)
            entry, count = struct.unpack_from("<HH", header, 54)
            library.seek(start)
            table = library.read(entry * count)
    except OSError:
        # The loader's own words are good.
        return None
    # Of each program header: its type, which is 1 where the segment is mapped, and where that lies.
    starts = range(0, len(table) - 55, entry) if entry else ()
    rows = [struct.unpack_from("<I4xQ16xQ", table, at) for at in starts]
    loaded = [at + size for kind, at, size in rows if kind == 1 and size]
    needed = max([start + entry * count, *loaded])
    if needed <= length:
        return None
    return f"has {length} bytes of {needed} or more: it was cut off when it was copied"


def _cannot_load(error: OSError) -> str:
    """What the loader says, and which systems the library is for."""
    name, version = platform.libc_ver()
    own = f"{name} {version}" if name else "a C library that is not glibc, such as musl"
    return (
        f"{LIBRARY} cannot be loaded ({error}). The wheel of mpi_cuda is for Linux on x86_64 with "
        f"glibc 2.28 or newer; this Python is on {platform.machine()} with {own}. If that fits, "
        "install the wheel again; else build on this machine (scripts/setup, or the sdist)"
    )


def last_error() -> str:
    """Text of the last error of this thread."""
    return load().mpi_cuda_last_error().decode(errors="replace")


def log_prefix() -> str:
    """What stands before each line of the log: time, host, rank and the library's name."""
    try:
        return load().mpi_cuda_log_prefix().decode(errors="replace")
    except RuntimeError:
        # Whoever needs the library says why it cannot be loaded.
        return "mpi_cuda: "


def log(text: str) -> None:
    """Prints a line of the log, as the library itself does."""
    line = f"{log_prefix()}{text.removeprefix('mpi_cuda: ')}\n"
    try:
        print(line, end="", file=sys.stderr or sys.__stderr__, flush=True)
    except Exception:
        os.write(2, line.encode(errors="replace"))


def warn(text: str) -> None:
    """Gives a warning of Python's for the caller's caller. It begins with the library's name, which
    filters know it by, and ends with who gives it, and when."""
    who = log_prefix().removesuffix("mpi_cuda: ").removesuffix(": ")
    warnings.warn(f"mpi_cuda: {text}" + (f" [{who}]" if who else ""), stacklevel=3)


def open_mpi() -> str:
    """Opens the MPI of this process, and initialises nothing. Tells its file; an empty text if
    there is none and none is needed.

    Raises:
      RuntimeError: there is none, or there are two; with the remedy.
    """
    file = load().mpi_cuda_open_mpi()
    if file is None:
        raise RuntimeError(last_error())
    return os.fsdecode(file)


def refused_child() -> str | None:
    """Why this process is none that may join as a rank, such as a child of one; None if it is."""
    return last_error() if load().mpi_cuda_is_rank() < 0 else None


@functools.cache
def start() -> World:
    """Joins the MPI world, if that has not happened. Collective over the ranks of the job.

    Raises:
      RuntimeError: with what is wrong and the remedy, e.g. for the wrong launcher.
    """
    rank, size, family = ctypes.c_int(), ctypes.c_int(), ctypes.c_char_p()
    if load().mpi_cuda_start(ctypes.byref(rank), ctypes.byref(size), ctypes.byref(family)):
        raise RuntimeError(last_error())
    if mark := _c_environment(RANK_MARK):
        os.environ[RANK_MARK] = mark
    # By its name, which does not import the package if mpi_cuda_startup has loaded it alone.
    importlib.import_module("mpi_cuda._lifecycle").install()
    importlib.import_module("mpi_cuda._where").install(load())
    return World(rank.value, size.value, (family.value or b"none").decode())


def started() -> World | None:
    """The world, if it was joined."""
    return start() if start.cache_info().currsize else None


def by_launcher() -> tuple[int | None, int | None]:
    """The number of ranks and this process's own: by the world, if it was joined, and else by the
    variables of Open MPI's launcher or of PMI, as far as they say it."""
    if (world := started()) is not None:
        return world.size, world.rank
    for prefix in ("OMPI_COMM_WORLD", "PMI"):
        size, rank = (os.environ.get(f"{prefix}_{name}", "") for name in ("SIZE", "RANK"))
        if size.isdigit() and rank.isdigit() and os.environ.get("MPI_CUDA_SINGLETON") != "1":
            return int(size), int(rank)
    return None, None


def _c_environment(name: str) -> str | None:
    """What C's environment says; Python's copy is from its start."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    value = getenv(name.encode())
    return None if value is None else value.decode()


#: How files and versions name the families.
_FAMILIES = {
    "openmpi": ("openmpi", "Open MPI"),
    "mpich": ("mpich", "MPICH"),
    "mpi_abi": ("mpiabi", "the MPI standard's ABI"),
}


def other_mpi(file: str, version: str | None = None) -> str | None:
    """What is wrong with mpi4py's `MPI`, by its file, and by its version and the MPIs in this
    process if it is loaded: None if it uses the MPI that was joined, or that cannot be said."""
    world = started()
    own = world.family if world is not None else "none"
    if own == "none":
        return None
    for family, (in_file, words) in _FAMILIES.items():
        named = f".{in_file}." in os.path.basename(file) or words in (version or "")
        if named and own != family:
            return (
                f"mpi4py uses {words} ({file}), and mpi_cuda has joined the job with "
                f"{_FAMILIES[own][1]} ({open_mpi()}): one process can use only one. Unset "
                "MPI4PY_MPIABI and MPI4PY_LIBMPI, set them to the MPI whose launcher started the "
                "job, or write `from mpi4py import MPI` before the first use of JAX"
            )
    if version is not None:
        try:
            open_mpi()
        except RuntimeError as error:
            return str(error)
    return None


def other_abi(wanted: str, file: str) -> str | None:
    """What is wrong with the ABI that mpi4py was told to use, in a process that has opened the MPI
    `file`: None if it is the ABI of that."""
    # As mpi4py's `_mpiabi` reads it, and as `mpi_runtime/src/mpi/libraries.rs` tells ABIs apart.
    asked = "".join(letter for letter in wanted.lower() if letter not in " -_")
    asked = "mpich" if asked == "impi" else asked
    if hasattr(ctypes.CDLL(file), "ompi_mpi_comm_self"):
        own = "openmpi"
    else:
        own = "mpiabi" if os.path.basename(file).startswith("libmpi_abi") else "mpich"
    if asked == own:
        return None
    words = dict(_FAMILIES.values())
    uses = f"has mpi4py use {words[asked]}" if asked in words else "is no MPI that mpi4py knows"
    return (
        f"MPI4PY_MPIABI={wanted} {uses}, and the MPI of this process is {words[own]} ({file}): one "
        "process can use only one. Unset MPI4PY_MPIABI"
    )


def is_ours(backend: Any) -> bool:
    """Whether a JAX backend is ours (`pjrt_plugin/src/compile/mod.rs`, platform_version)."""
    return "MPI ranks " in str(getattr(backend, "platform_version", ""))
