"""Where this process runs and how it meets the others: rank facts, device, seeds, small reductions.

The only file that asks the environment for ranks. Processes are started by torchrun, or by anything else that sets
its variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
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
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rm_gallery.distributed.watchdog import RankWatch
from rm_gallery.errors import StoppedBySignal, UserError, one_line

log = logging.getLogger(__name__)

T = TypeVar("T")

_START_SECONDS = 600.0  # machines of a cluster do not start together
_HOLD_SECONDS = 2.5  # how long a process that fails stays, so that the others can read why


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `world_size` data-parallel processes, and its device."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    """Place on this machine."""
    local_world_size: int = 1
    """Processes on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0


@dataclass
class _Meeting:
    """What the processes of this run share; one per process, while it is inside `processes`."""

    store: Any
    watch: RankWatch
    world: World
    barriers: int = 0


_meeting: _Meeting | None = None
_rendezvous: Any = None  # one store for all meetings of this process: rank 0 may be its host
_num_meetings = 0


@contextmanager
def processes(device: str = "auto", *, timeout_seconds: float = 1800.0) -> Iterator[World]:
    """Join the other processes of the run, and leave them when the block ends.

    device: `auto` takes a GPU when there is one, else the CPU. timeout_seconds: how long a process may be waited for.
    An error in the block ends all processes: this one says it, the others name this one. Ranks apart, the block must
    do the same everywhere. Raises UserError for variables that do not fit, a missing GPU, and processes that do not
    come.
    """
    global _meeting
    world = _world(device)
    if world.world_size == 1:
        yield world
        return
    assert _meeting is None, "the processes of this run have met already"
    _meeting = _join(world, timeout_seconds)
    watch = _meeting.watch
    stopped: StoppedBySignal | None = None
    try:
        try:
            yield world
        except StoppedBySignal as error:  # it comes to every process, after the run was saved
            stopped = error
        barrier("the end of the run")
        dist.destroy_process_group()
        watch.stop()
        _leave(_meeting)
    except KeyboardInterrupt:
        watch.report("stopped by Ctrl-C")
        raise
    except Exception as error:
        cause = None
        if _comes_from_others(error):
            if watch.speaks:
                log.error("lost the connection to another process; finding out which")
            cause = watch.wait_for_cause(20)
        if cause is not None:
            raise UserError(cause) from error
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        watch.report(kind + one_line(error, 1000))
        time.sleep(_HOLD_SECONDS)
        raise
    finally:
        watch.stop()
        _meeting = None
    if stopped is not None:
        raise stopped


def _world(device: str) -> World:
    # Schedulers set WORLD_SIZE for other purposes too; a launcher of ours is known by LOCAL_RANK.
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


def _join(world: World, timeout_seconds: float) -> _Meeting:
    global _rendezvous, _num_meetings
    try:
        if _rendezvous is None:
            _rendezvous, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_START_SECONDS)))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"rank {world.rank} cannot reach the other processes ({one_line(error)}); look at MASTER_ADDR="
            f"{os.environ.get('MASTER_ADDR')} and MASTER_PORT={os.environ.get('MASTER_PORT')}, or start with torchrun"
        ) from error
    _num_meetings += 1
    # After a restart the launcher's store still holds the keys of the attempt before; they would be taken for today's.
    store = dist.PrefixStore(f"rm_gallery/{_number('TORCHELASTIC_RESTART_COUNT', 0)}/{_num_meetings}", _rendezvous)
    _roll_call(store, "start", world, _START_SECONDS, "start")
    watch = RankWatch(
        store.clone(),  # type: ignore[attr-defined]
        rank=world.rank, world_size=world.world_size, timeout_seconds=timeout_seconds,
        name=f"rank {world.rank} on {socket.gethostname()}", speaks=world.local_rank == 0,
    )  # fmt: skip
    watch.start()
    dist.init_process_group(
        # Both on GPUs: offloaded weights, and objects, are sent between CPUs. No device_id: groups that are split from
        # this one would lose the CPU's half.
        "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=timeout_seconds + 60),  # the watch comes first: it can name who hangs
    )
    return _Meeting(store, watch, world)


def _leave(meeting: _Meeting) -> None:
    """Rank 0, which may be the host of the store, goes last."""
    count = meeting.store.add("left", 1)
    deadline = time.monotonic() + 10
    while meeting.world.is_main and count < meeting.world.world_size and time.monotonic() < deadline:
        time.sleep(0.01)
        count = meeting.store.add("left", 0)


def join_alone() -> None:
    """A process group of this process alone, for what cannot do without one; nothing when there is a group."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def world_size() -> int:
    """Processes of this run that have met; 1 outside `processes`."""
    return _meeting.world.world_size if _meeting else 1


def rank() -> int:
    """This process among them, from 0."""
    return _meeting.world.rank if _meeting else 0


def turn(what: str) -> None:
    """Say that this process comes to the next meeting point, so that one that does not come can be named."""
    if _meeting:
        _meeting.watch.turn(what)


def sum_over_ranks(values: Tensor, what: str = "a sum over the processes") -> Tensor:
    """The sum of a tensor over all processes, in place and on each; one process keeps its own."""
    if _meeting:
        turn(what)
        dist.all_reduce(values)
    return values


def sum_numbers(*numbers: float) -> list[float]:
    """The same for a few numbers of the host."""
    if _meeting is None:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64, device=_meeting.world.device)
    return sum_over_ranks(values).tolist()


def from_main(value: T) -> T:
    """Rank 0's value, on each rank."""
    if _meeting is None:
        return value
    turn("a value of rank 0")
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all ranks, on each, in the order of ranks."""
    if _meeting is None:
        return [value]
    turn("values of all ranks")
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier(what: str, seconds: float | None = None) -> None:
    """Wait until every process is here.

    Raises UserError that names who did not come within so many seconds; without `seconds` the run's timeout holds.
    """
    if _meeting is None:
        return
    _meeting.barriers += 1
    turn(what)
    seconds = _meeting.watch.timeout_seconds + 60 if seconds is None else seconds
    _roll_call(_meeting.store, f"barrier{_meeting.barriers}", _meeting.world, seconds, what)


def _roll_call(store: Any, key: str, world: World, seconds: float, what: str) -> None:
    """Count who is here; a wait inside the store would name nobody, and write lines of its own when it ends."""
    store.set(f"{key}/{world.rank}", socket.gethostname())
    if store.add(f"{key}/count", 1) == world.world_size:
        store.set(f"{key}/all", "")
    deadline = time.monotonic() + seconds
    pause = 0.001
    while not store.check([f"{key}/all"]):
        if _meeting and _meeting.watch.cause:
            raise UserError(_meeting.watch.cause)
        if time.monotonic() > deadline:
            missing = [str(other) for other in range(world.world_size) if not store.check([f"{key}/{other}"])]
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise UserError(f"rank {shown} of {world.world_size} did not come to {what} within {seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


_OF_OTHERS = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|store|timed out", re.IGNORECASE
)


def _comes_from_others(error: Exception) -> bool:
    """Whether a collective failed, which it does when another process ended."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(_OF_OTHERS.search(str(error)))
    )


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on all devices; parts of ours that shuffle take generators of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_apart(seed: int, world: World) -> None:
    """Give each rank noise of its own (dropout), once what must be equal was drawn; rank 0 goes on as it is."""
    if world.rank:
        seed_everything(seed + 1_000_003 * world.rank)
