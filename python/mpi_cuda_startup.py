"""Runs when Python starts in an MPI job or with our platform selected (`mpi_cuda_startup.pth`).
Nothing is imported or initialised here.

Under an MPI launcher, the MPI is opened before `mpi4py.MPI` is imported, by the rule of
docs/mpi.md, so that mpi4py uses the same: its wheel serves several MPIs and, where more than one is
installed, takes the first it finds; the wrong one sees a world of size 1.

And where the backend mpi_cuda is selected, an `import mpi4jax` gets our bridge instead of its own
(`mpi_cuda/_bridge/mpi4jax.py`), and whoever imports `mpi4py.MPI` under a launcher joins the world
then: that is collective, and all ranks import it, while the first use of JAX may come before an
mpi4py collective on one rank and after it on another. `jax.distributed.initialize()` imports our
package, which knows the world, if nothing else has.

Under MPICH's mpirun, a rank that ends by an exception before MPI has begun there ends the job.
"""

import os
import sys


class _Bridge:
    """Finds our module where mpi4jax imports its bridge."""

    PACKAGE = "mpi4jax._src.xla_bridge."

    @staticmethod
    def _selected() -> bool:
        jax = sys.modules.get("jax")
        platforms = getattr(getattr(jax, "config", None), "jax_platforms", None)
        if platforms is None:
            platforms = os.environ.get("JAX_PLATFORMS", "")
        return "mpi_cuda" in platforms.split(",")

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if not name.startswith(cls.PACKAGE) or not cls._selected():
            return None
        from importlib.util import spec_from_file_location

        if name != f"{cls.PACKAGE}mpi_xla_bridge_cpu":
            raise ImportError(f"{name} is not used with the backend mpi_cuda")
        folder = os.path.dirname(os.path.abspath(__file__))
        return spec_from_file_location(
            name, os.path.join(folder, "mpi_cuda", "_bridge", "mpi4jax.py")
        )


class _Mpi4py:
    """Joins the world right after `mpi4py.MPI` has been imported. Refuses to import it with another
    MPI than that of this process, and where MPI could only end the process."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "mpi4py.MPI":
            return None
        selected = _Bridge._selected()
        if selected or _launched():
            wrong = _open()
            if selected:
                _refuse(wrong or _other_abi())
        if not selected:
            return None
        if _joined() is None:
            if not _launched() and not _without_pmi():
                return None
            if sys.modules["mpi4py"].rc.initialize:
                _refuse(_alone("_library").refused_child())
        if spec := _found_by_others(cls, name, path, target):
            spec.loader = _JoinAfter(spec.loader)
            return spec
        raise ImportError(
            f"mpi4py has no module for the MPI of this process, {_alone('_library').open_mpi()}: "
            "its wheels have those of Open MPI and MPICH, and none for the ABI of the MPI "
            f"standard. {_remedy()}build mpi4py against this MPI, or do without it"
        )


class _JoinAfter:
    """A loader, and what comes after it."""

    def __init__(self, loader):  # type: ignore[no-untyped-def]
        self.loader = loader

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        # Before another MPI is loaded, where the file says which it is.
        if library := _joined():
            _refuse(library.other_mpi(spec.origin))
        return self.loader.create_module(spec)

    def exec_module(self, module):  # type: ignore[no-untyped-def]
        library = _joined()
        if library is None:
            if _without_pmi() and ".openmpi." in os.path.basename(module.__spec__.origin):
                self._alone_or_not(module)
            else:
                self.loader.exec_module(module)
            if module.Is_initialized():
                _join()
            return
        rc = sys.modules["mpi4py"].rc
        initialize, rc.initialize = rc.initialize, False
        try:
            self.loader.exec_module(module)
        finally:
            rc.initialize = initialize
        _refuse(library.other_mpi(module.__spec__.origin, module.Get_library_version()))

    def _alone_or_not(self, module):  # type: ignore[no-untyped-def]
        environment = os.environ
        tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks != "1" and environment.get("MPI_CUDA_SINGLETON") != "1":
            raise ImportError(
                f"srun started {tasks} tasks without a process management for MPI, so Open MPI "
                "would end them: use srun --mpi=pmix (for MPICH --mpi=pmi2); MPI_CUDA_SINGLETON=1 "
                f"runs {tasks} separate worlds of size 1 on purpose"
            )
        # By this variable Open MPI takes the task for a rank, and ends it if it finds no PMI.
        nodes = environment.pop("SLURM_NODELIST", None)
        try:
            self.loader.exec_module(module)
        finally:
            if nodes is not None:
                environment["SLURM_NODELIST"] = nodes


class _Distributed:
    """Lets `jax.distributed.initialize` import our package first."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "jax.distributed":
            return None
        if spec := _found_by_others(cls, name, path, target):
            spec.loader = _PackageFirst(spec.loader)
        return spec


class _PackageFirst:
    """A loader, and a function that imports the package."""

    def __init__(self, loader):  # type: ignore[no-untyped-def]
        self.loader = loader

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        return self.loader.create_module(spec)

    def exec_module(self, module):  # type: ignore[no-untyped-def]
        self.loader.exec_module(module)
        from functools import wraps

        original = module.initialize

        @wraps(original)
        def initialize(*arguments, **options):  # type: ignore[no-untyped-def]
            module.initialize = original
            if _Bridge._selected():
                # It has its own part in this (mpi_cuda/_jax_patches/coordination.py).
                import mpi_cuda  # noqa: F401
            return original(*arguments, **options)

        module.initialize = initialize


def _found_by_others(finder, name, path, target):  # type: ignore[no-untyped-def]
    """What would be imported without `finder`; none if it is not there."""
    for other in sys.meta_path:
        find = getattr(other, "find_spec", None)
        spec = find(name, path, target) if find and other is not finder else None
        if spec is not None and spec.loader is not None:
            return spec
    return None


def _refuse(wrong):  # type: ignore[no-untyped-def]
    if wrong:
        raise ImportError(wrong)


def _other_abi() -> str | None:
    """What is wrong with `MPI4PY_MPIABI`, which an mpi4py of several modules reads."""
    abis = sys.modules.get("mpi4py._mpiabi")
    if not getattr(abis, "_registry", {}).get("mpi4py.MPI"):
        return None
    wanted = getattr(abis, "MPIABI", None) or os.environ.get("MPI4PY_MPIABI")
    file = _alone("_library").open_mpi() if wanted is not None else ""
    return _alone("_library").other_abi(wanted, file) if file else None


def _remedy() -> str:
    names = ("MPI_CUDA_LIBMPI", "MPI_CUDA_MPI", "MPI4PY_LIBMPI", "MPI4PY_MPIABI")
    own = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return f"Unset {' and '.join(own)}, " if own else ""


def _open() -> str | None:
    """Opens the MPI that this process uses; what is wrong if that fails."""
    try:
        _alone("_library").open_mpi()
    except Exception as error:
        return str(error)
    return None


def _join() -> None:
    try:
        # How a rank ends, and who says where it is, are installed when it joins.
        _alone("_lifecycle")
        _alone("_where")
        _alone("_library").start()
    except Exception:
        # Whoever creates the backend hears of it.
        pass


def _alone(module):  # type: ignore[no-untyped-def]
    """A module of the package without the package, which imports jax; that reads variables that the
    program may still set."""
    from importlib.util import module_from_spec, spec_from_file_location

    name = f"mpi_cuda.{module}"
    if name not in sys.modules:
        folder = os.path.dirname(os.path.abspath(__file__))
        spec = spec_from_file_location(name, os.path.join(folder, "mpi_cuda", f"{module}.py"))
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _joined():  # type: ignore[no-untyped-def]
    """The module that knows the world, if it was joined."""
    library = sys.modules.get("mpi_cuda._library")
    return library if library is not None and library.started() else None


def _without_pmi() -> bool:
    """Whether this is a task of srun's without what MPI finds other tasks by."""
    environment = os.environ
    step = environment.get("SLURM_STEP_ID", "")
    # Steps from here up are no srun (slurm/slurm.h): a batch script, an interactive shell.
    is_step = step.isdigit() and int(step) < 0xFFFFFFF0
    by = ("PMIX_RANK", "PMI_RANK", "PMI_FD", "OMPI_COMM_WORLD_RANK")
    return is_step and not any(name in environment for name in by)


def _launched() -> bool:
    sizes = (os.environ.get(name, "") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    return any(size not in ("", "1") for size in sizes) or "PMIX_RANK" in os.environ


def _failed_early(process: int) -> None:
    """Ends the job, if this rank ends by an exception before MPI has begun."""
    # As in mpi_cuda/_lifecycle.py. pytest leaves one there that it has expected.
    failed = getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1")
    if not failed or "pytest" in sys.modules or os.getpid() != process:
        return
    if _Bridge._selected() and _joined() is None:
        from contextlib import suppress

        # The exception that the rank ends by is the one to be seen.
        with suppress(Exception):
            _alone("_failed_early").end_job()


def _forked(mark: str = "MPI_CUDA_RANK_PROCESS") -> None:
    """Marks a child that was forked from a rank (`mpi_runtime/src/world/child.rs`), which is one
    once it has imported JAX. After the start the library notices forks itself."""
    if "jax" in sys.modules and _Bridge._selected() and _joined() is None:
        os.environ[mark] = f"{os.getppid()} forked as {os.getpid()}"


if _launched() and os.environ.get("MPI_CUDA_SINGLETON") != "1":
    os.register_at_fork(after_in_child=_forked)
if "HYDI_CONTROL_FD" in os.environ and _launched() and os.environ.get("MPI_CUDA_SINGLETON") != "1":
    import atexit

    atexit.register(_failed_early, os.getpid())
sys.meta_path[:0] = [_Bridge, _Distributed, _Mpi4py]
