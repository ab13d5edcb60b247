"""The process group of a run: rank, world size, device, rendezvous, barrier and seeds.

Processes are started by torchrun, or by anything else that sets its variables: RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. Only this file reads them.
"""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rm_gallery.distributed.watchdog import Watchdog
from rm_gallery.errors import StoppedBySignal, UserError, one_line

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 600.0  # machines of a cluster do not start at the same time
_EXIT_DELAY_S = 2.5  # a failed process stays this long, so that the others can read its error from the store


@dataclass(frozen=True)
class World:
    """Rank of this process among the data-parallel processes, and its device."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    """Rank on this machine."""
    local_world_size: int = 1
    """Processes on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is the main process (rank 0), which writes files and logs."""
        return self.rank == 0


@dataclass
class _Run:
    """The store, watchdog and world of this process inside `processes`, if there are several processes."""

    store: Any
    watchdog: Watchdog
    world: World
    barriers: int = 0


_run: _Run | None = None
_rendezvous_store: Any = None  # kept for later runs of this process, since rank 0 may host it
_num_runs = 0


@contextmanager
def processes(device: str = "auto", *, timeout_seconds: float = 1800.0) -> Iterator[World]:
    """Initialize the process group, and destroy it when the block ends. All ranks must run the same collectives.

    device: `auto` uses a GPU if there is one, else the CPU. timeout_seconds: how long ranks may wait for one another.
    An error in the block ends all processes: this one reports the error, the others report which rank failed.
    Raises UserError for inconsistent variables, a missing GPU, and ranks that do not reach the rendezvous in time.
    """
    global _run
    world = _world(device)
    if world.world_size == 1:
        yield world
        return
    assert _run is None, "the process group is initialized already"
    _run = _join(world, timeout_seconds)
    watchdog = _run.watchdog
    stopped: StoppedBySignal | None = None
    try:
        try:
            yield world
        except StoppedBySignal as error:  # raised on every rank, after saving
            stopped = error
        barrier("the end of the run")
        dist.destroy_process_group()
        watchdog.stop()
        _leave(_run)
    except KeyboardInterrupt:
        watchdog.report("stopped by Ctrl-C")
        raise
    except Exception as error:
        cause = None
        if _is_connection_error(error):
            if watchdog.reports_others:
                log.error("lost the connection to another rank; waiting for the report of which rank failed")
            cause = watchdog.wait_for_cause(20)
        if cause is not None:
            raise UserError(cause) from error
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        watchdog.report(kind + one_line(error, 1000))
        time.sleep(_EXIT_DELAY_S)
        raise
    finally:
        watchdog.stop()
        _run = None
    if stopped is not None:
        raise stopped


def _world(device: str) -> World:
    # Schedulers set WORLD_SIZE for other purposes too; LOCAL_RANK is set by torchrun only.
    launched = "LOCAL_RANK" in os.environ
    world_size = _number("WORLD_SIZE", 1) if launched else 1
    rank = _number("RANK", 0) if world_size > 1 else 0
    if rank >= world_size:
        raise UserError(f"RANK={rank} with WORLD_SIZE={world_size}: ranks count from 0; start with torchrun")
    local_rank = _number("LOCAL_RANK", 0)
    local_world_size = _number("LOCAL_WORLD_SIZE", 1) if launched else 1
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda, but torch finds no GPU; set trainer.device=auto or cpu")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{local_world_size} processes on {socket.gethostname()}, but torch finds {torch.cuda.device_count()} "
                "GPUs there; start one process for each (N_GPUS_PER_NODE, --nproc_per_node)"
            )
        torch.cuda.set_device(local_rank)
        place = torch.device("cuda", local_rank)
    else:
        place = torch.device("cpu")
    return World(rank, world_size, place, local_rank, local_world_size)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"environment variable {name}={text!r} is not a number; unset it, or start with torchrun")
    return int(text)


def _join(world: World, timeout_seconds: float) -> _Run:
    global _rendezvous_store, _num_runs
    try:
        if _rendezvous_store is None:
            _rendezvous_store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_START_TIMEOUT_S)))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"rank {world.rank} cannot reach the other processes ({one_line(error)}); check MASTER_ADDR="
            f"{os.environ.get('MASTER_ADDR')} and MASTER_PORT={os.environ.get('MASTER_PORT')}, or start with torchrun"
        ) from error
    _num_runs += 1
    # After a restart the launcher's store still holds the keys of the previous attempt, hence the prefix.
    store = dist.PrefixStore(f"rm_gallery/{_number('TORCHELASTIC_RESTART_COUNT', 0)}/{_num_runs}", _rendezvous_store)
    _store_barrier(store, "start", world, _START_TIMEOUT_S, "start")
    watchdog = Watchdog(
        store.clone(),  # type: ignore[attr-defined]
        rank=world.rank, world_size=world.world_size, timeout_seconds=timeout_seconds,
        name=f"rank {world.rank} on {socket.gethostname()}", reports_others=world.local_rank == 0,
    )  # fmt: skip
    watchdog.start()
    dist.init_process_group(
        # gloo and nccl: offloaded weights and Python objects are sent from host memory. No device_id: groups split
        # from this one would lose the gloo backend.
        "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=timeout_seconds + 60),  # the watchdog acts first: it can name the rank that hangs
    )
    return _Run(store, watchdog, world)


def _leave(run: _Run) -> None:
    """Leave the rendezvous; rank 0 leaves last, since it may host the store."""
    count = run.store.add("left", 1)
    deadline = time.monotonic() + 10
    while run.world.is_main and count < run.world.world_size and time.monotonic() < deadline:
        time.sleep(0.01)
        count = run.store.add("left", 0)


def init_single_process() -> None:
    """Initialize a process group of world size 1 unless there is a group; FSDP needs one."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def current_world() -> World | None:
    """The world inside `processes` if there are several processes, else None."""
    return _run.world if _run else None


def world_size() -> int:
    """Number of data-parallel processes; 1 outside `processes`."""
    return _run.world.world_size if _run else 1


def rank() -> int:
    """Data-parallel rank of this process; 0 outside `processes`."""
    return _run.world.rank if _run else 0


def heartbeat(what: str) -> None:
    """Count a heartbeat before a collective (`what`), so that the watchdog can name a rank that does not reach it."""
    if _run:
        _run.watchdog.heartbeat(what)


def barrier(what: str, seconds: float | None = None) -> None:
    """Wait until every rank has called it.

    seconds: timeout, by default that of the run. Raises UserError that names the missing ranks.
    """
    if _run is None:
        return
    _run.barriers += 1
    heartbeat(what)
    seconds = _run.watchdog.timeout_seconds + 60 if seconds is None else seconds
    _store_barrier(_run.store, f"barrier{_run.barriers}", _run.world, seconds, what)


def _store_barrier(store: Any, key: str, world: World, seconds: float, what: str) -> None:
    """A barrier that polls the store: a blocking wait of the store would not tell which ranks are missing."""
    store.set(f"{key}/{world.rank}", socket.gethostname())
    if store.add(f"{key}/count", 1) == world.world_size:
        store.set(f"{key}/all", "")
    deadline = time.monotonic() + seconds
    pause = 0.001
    while not store.check([f"{key}/all"]):
        if _run and _run.watchdog.cause:
            raise UserError(_run.watchdog.cause)
        if time.monotonic() > deadline:
            missing = [str(other) for other in range(world.world_size) if not store.check([f"{key}/{other}"])]
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise UserError(f"rank {shown} of {world.world_size} did not reach {what} within {seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


_CONNECTION_ERROR = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|store|timed out", re.IGNORECASE
)


def _is_connection_error(error: Exception) -> bool:
    """Whether a collective failed, as it does when another process ends."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(_CONNECTION_ERROR.search(str(error)))
    )


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on all devices. The data order has separate generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_per_rank(seed: int, world: World) -> None:
    """Seed ranks above 0 differently (for dropout), after drawing what must be equal on all; rank 0 is unchanged."""
    if world.rank:
        seed_everything(seed + 1_000_003 * world.rank)
