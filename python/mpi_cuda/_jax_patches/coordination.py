"""JAX's coordination service, over the world that MPI knows.

Checkpoints, `live_devices` and others ask `jax.distributed` for the client of a service that its
`initialize` brings up before there is a backend. Here it comes up when it is first asked for: rank
0 starts the service, and all ranks connect to it, also those whose program has not asked
(`mpi_runtime/src/watch/coordinator.rs` tells them). A program that never asks pays nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import jax
from jax._src import distributed, xla_bridge
from jax._src.lib import _jax

from mpi_cuda import _library
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="the client of `jax.distributed` is there when it is asked for",
        used=(
            "distributed.State.client",
            "distributed.State.initialize",
            "distributed.State.num_processes",
            "distributed.State.preemption_sync_manager",
            "distributed.State.process_id",
            "distributed.State.shutdown",
            "distributed.global_state",
            "distributed.xla_bridge",
            "lib._jax.create_preemption_sync_manager",
            "lib._jax.get_distributed_runtime_client",
            "lib._jax.get_distributed_runtime_service",
            "xla_bridge.backends_are_initialized",
        ),
        without="an error at import",
        test="test_what_asks_for_the_coordination_service_has_it",
    ),
)

#: Seconds that a rank may take to come, as with JAX, and that rank 0 may take at its end.
COME, LATE = 300, 2
#: Where ranks note that they have disconnected.
ENDED = "mpi_cuda/ended"
#: Seconds after which a silent rank counts as dead, and the job ends. Who has died is noticed
#: otherwise, and a job that was stopped for a day has to go on. JAX's own where jobs survive that.
SILENT, SILENT_AND_GOES_ON = 7 * 24 * 3600, 100

_lock = threading.RLock()


class State(distributed.State):
    """JAX's state, whose client comes up when it is first asked for."""

    #: The client, if there is one, and whether we have brought it up.
    made: Any = None
    is_own = False
    manager: Any = None
    #: Our backend is there, and has not come to its end.
    is_offered = False
    #: A backend is being made; it must not see our client.
    is_hidden = False

    @property
    def client(self) -> Any:
        """Of the program's own service, or of ours, which comes up."""
        with _lock:
            if self.made is None and self.is_offered and not self.is_hidden:
                _bring_up(self)
            return self.made

    @client.setter
    def client(self, client: Any) -> None:
        self.made = client

    @property
    def preemption_sync_manager(self) -> Any:
        """Takes SIGTERM, so ours comes with the first question whether there was one."""
        with _lock:
            wanted = self.is_own and self.made and jax.config.jax_enable_preemption_service
            if self.manager is None and wanted and self.is_offered:
                self.manager = _jax.create_preemption_sync_manager()
                self.manager.initialize(self.made)
            return self.manager

    @preemption_sync_manager.setter
    def preemption_sync_manager(self, manager: Any) -> None:
        self.manager = manager

    def initialize(
        self,
        coordinator_address: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
        *arguments: Any,
        **options: Any,
    ) -> None:
        """As JAX does it before there is a backend, if the program says where to meet."""
        given = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
        ours = self.is_own or (self.made is None and self.is_offered)
        if not ours and (given or num_processes is not None or not _is_selected()):
            if _is_selected():
                _refuse_others(num_processes, process_id, *_library.by_launcher())
            super().initialize(
                coordinator_address, num_processes, process_id, *arguments, **options
            )
            return
        world = _library.start()
        _refuse_others(num_processes, process_id, world.size, world.rank)
        with _lock:
            if self.made is None:
                _bring_up(self)

    def shutdown(self) -> None:
        """Ours ends with the program, since other ranks may still need it. Where there is none, JAX
        would look for a client, which would bring ours up."""
        if not self.is_own and self.made is not None:
            super().shutdown()


class _Backends:
    """What `jax.distributed.initialize` asks whether it comes too late; over ours it never does."""

    def __getattr__(self, name: str) -> Any:
        return getattr(xla_bridge, name)

    def backends_are_initialized(self) -> bool:
        return xla_bridge.backends_are_initialized() and not _state().is_offered


_service: Any = None


def install() -> None:
    """Takes the place of JAX's state, wherever that is known."""
    state: Any = distributed.global_state
    made = [state.__dict__.pop(name, None) for name in ("client", "preemption_sync_manager")]
    state.__class__ = State
    state.made, state.manager = made
    setattr(distributed, "xla_bridge", _Backends())  # noqa: B010


@contextlib.contextmanager
def hidden(from_ours: bool) -> Iterator[None]:
    """While JAX makes a backend. With a client it would be one of all processes, so ours is not
    shown. Nor is the program's own shown to our backend, which would watch the service for
    processes that come and go, and print a line when it ends."""
    state = _state()
    with _lock:
        shown = state.made, state.process_id, state.num_processes
        state.is_hidden = True
        if state.is_own:
            state.made, state.process_id, state.num_processes = None, 0, 1
        elif from_ours:
            state.made = None
        try:
            yield
        finally:
            state.made, state.process_id, state.num_processes = shown
            state.is_hidden = False


def processes() -> dict[str, int]:
    """What the program has told `jax.distributed`, as create options: MPI has to agree."""
    state = _state()
    if state.is_own or state.num_processes == 1:
        return {}
    return {"node_id": state.process_id, "num_nodes": state.num_processes}


def offer(processes: int) -> None:
    """Our backend is there, for so many processes."""
    if processes == _library.start().size:
        _state().is_offered = True
        _library.load().mpi_cuda_set_bring_up(_callback)


def _state() -> State:
    return cast(State, distributed.global_state)


def _is_selected() -> bool:
    return "mpi_cuda" in (jax.config.jax_platforms or "").split(",")


def _refuse_others(
    num_processes: int | None, process_id: int | None, size: int | None, rank: int | None
) -> None:
    """JAX's service would wait for processes that never come, and MPI has the last word.

    Raises:
      ValueError: a number differs from MPI's.
    """
    for name, asked, own in (
        ("num_processes", num_processes, size),
        ("process_id", process_id, rank),
    ):
        if own is not None and asked not in (None, own):
            raise ValueError(
                f"jax.distributed.initialize says {name}={asked}, and MPI says {own}: leave "
                "its arguments out, or the call, since the world comes from MPI"
            )


def _bring_up(state: State) -> None:
    world = _library.start()
    try:
        address = _start_service(world) if world.rank == 0 else _find_service()
        # A proxy for this host's own addresses is a mistake that gRPC would make.
        os.environ.setdefault("no_grpc_proxy", "127.0.0.1")
        client = _jax.get_distributed_runtime_client(
            address,
            world.rank,
            init_timeout=COME,
            shutdown_timeout=0,
            heartbeat_timeout=_silent(),
            use_compression=True,
        )
        client.connect()
    except Exception as error:
        raise RuntimeError(
            f"JAX's coordination service cannot be brought up on rank {world.rank}: {error}. "
            "jax.distributed.initialize(ADDRESS, SIZE, RANK) before the first use of JAX does it "
            "without MPI"
        ) from error
    state.made, state.is_own = client, True
    state.process_id, state.num_processes = world.rank, world.size


def _silent() -> int:
    return SILENT_AND_GOES_ON if jax.config.jax_enable_recoverability else SILENT


def _start_service(world: _library.World) -> str:
    global _service
    library = _library.load()
    # An option of the service's since JAX 0.10.
    survives = {"recoverable": True} if jax.config.jax_enable_recoverability else {}
    host = "[::]" if library.mpi_cuda_several_nodes() else "127.0.0.1"
    # Nobody else takes the port as long as it is bound here, and gRPC may bind it too.
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("", 0))
        port = reserved.getsockname()[1]
        _service = _jax.get_distributed_runtime_service(
            f"{host}:{port}",
            world.size,
            heartbeat_timeout=_silent(),
            cluster_register_timeout=COME,
            # Ranks end by themselves, and rank 0 waits for them (`end`).
            shutdown_timeout=0,
            **survives,
        )
    library.mpi_cuda_tell_coordinator(port)
    return f"127.0.0.1:{port}"


def _find_service() -> str:
    library, address = _library.load(), ctypes.create_string_buffer(64)
    start = time.monotonic()
    while (known := library.mpi_cuda_coordinator(address, len(address))) != 1:
        if known < 0 and time.monotonic() > start + LATE:
            raise RuntimeError(_library.last_error().removeprefix("mpi_cuda: "))
        if time.monotonic() > start + COME:
            raise RuntimeError(f"rank 0 has not started it within {COME} s")
        time.sleep(0.001)
    return address.value.decode()


def _on_wanted() -> None:
    """Another rank has asked for it, perhaps while this one waits at its end."""
    state = _state()
    try:
        with _lock:
            if state.made is None:
                _bring_up(state)
                if not state.is_offered:
                    _disconnect(state)
    except Exception as error:
        _library.log(str(error))


_callback = ctypes.CFUNCTYPE(None)(_on_wanted)


def leave() -> None:
    """This rank has come to its end: others that wait for it at a barrier hear that."""
    with _lock:
        state = _state()
        state.is_offered = False
        if state.is_own:
            _disconnect(state)


def _disconnect(state: State) -> None:
    if _library.load().mpi_cuda_has_died(0):
        # Nobody answers any more, and the client would ask once more when it is destroyed.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(state.made))
        return
    with contextlib.suppress(Exception):
        if state.manager is not None:
            state.manager.shutdown()
    state.manager = None
    with contextlib.suppress(Exception):
        state.made.shutdown()
        state.made.key_value_set(f"{ENDED}/{state.process_id}", "")


def end() -> None:
    """MPI has ended, if that was ours to end. Rank 0 waits for those that use its service."""
    global _service
    library, state = _library.load(), _state()
    library.mpi_cuda_set_bring_up(None)
    with _lock:
        if _service is not None and state.is_own:
            missing = set(range(state.num_processes))
            while True:
                ended = {key.rpartition("/")[2] for key, _ in state.made.key_value_dir_get(ENDED)}
                missing -= {rank for rank in missing if str(rank) in ended}
                missing -= {rank for rank in missing if library.mpi_cuda_has_died(rank)}
                if not missing:
                    break
                time.sleep(0.05)
            _service.shutdown()
        _service = None
