"""The watch: a failure, a silence and a standstill are named; a clean end is none of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.distributed import HashStore

from rm_gallery.distributed.watchdog import Timing, Watchdog

TIMING = Timing(interval=0.02, dead_after=0.4, dead_after_error=0.2, grace=1000, short_grace=1000)
Start = Callable[..., Watchdog]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the watch of a rank in a run of three; all are stopped at the end."""
    store = HashStore()
    watches: list[Watchdog] = []

    def start_watch(rank: int, **options: Any) -> Watchdog:
        watch = Watchdog(
            store, rank=rank, world_size=3, name=f"rank {rank} on node{rank}", reports_others=rank == 0, timing=TIMING,
            timeout_seconds=options.pop("timeout_seconds", 1000),
        )  # fmt: skip
        watch.start()
        watches.append(watch)
        return watch

    yield start_watch
    for watch in watches:
        watch.stop()


def fall_silent(watch: Watchdog) -> None:
    """As a process that is killed: no more beats, no word."""
    watch._stopping.set()
    watch._thread.join()


def test_a_failure_is_known_to_all_others_and_only_the_first_counts(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("rm_gallery.distributed.watchdog.log.error", lambda text, *values: said.append(text % values))
    watches = [start(rank) for rank in range(3)]
    watches[1].report("the disk is full")
    watches[2].report("lost the connection to rank 1")
    assert watches[0].wait_for_cause(5) == "rank 1 on node1 failed: the disk is full"
    time.sleep(4 * TIMING.interval)
    assert said == ["rank 1 on node1 failed: the disk is full; ending"], "one process of a machine says it, once"
    assert watches[1].cause is None and watches[2].cause is None, "who failed itself has its own error to tell"


def test_a_process_that_falls_silent_is_named_to_all(start: Start) -> None:
    watches = [start(rank) for rank in range(3)]
    fall_silent(watches[2])
    for watch in watches[:2]:
        cause = watch.wait_for_cause(5)
        assert cause is not None and cause.startswith("rank 2 on node2 stopped answering")


def test_the_silence_of_rank_0_is_noticed_too(start: Start) -> None:
    watches = [start(rank) for rank in range(3)]
    time.sleep(4 * TIMING.interval)
    fall_silent(watches[0])
    cause = watches[1].wait_for_cause(5)
    assert cause is not None and cause.startswith("rank 0 on node0 stopped answering")


def test_who_keeps_the_others_waiting_is_named(start: Start) -> None:
    watches = [start(rank, timeout_seconds=0.5) for rank in range(3)]
    for watch in watches:
        watch.heartbeat("a forward pass")
    for rank in (0, 2):
        watches[rank].heartbeat("the end of a step")
    expected = "rank 1 on node1 has not moved for 0.5 s, while the others wait for it (the end of a step)"
    assert [watch.wait_for_cause(5) for watch in watches] == [expected] * 3, "the one that hangs must end as well"


def test_work_that_all_do_alike_may_take_long(start: Start) -> None:
    watches = [start(rank, timeout_seconds=0.1) for rank in range(3)]
    for watch in watches:
        watch.heartbeat("reading data")
    time.sleep(0.6)
    assert [watch.cause for watch in watches] == [None] * 3


def test_one_that_leaves_is_not_missed(start: Start) -> None:
    watches = [start(rank, timeout_seconds=0.2) for rank in range(3)]
    watches[2].stop()
    watches[0].heartbeat("the end of the run")
    watches[1].heartbeat("the end of the run")
    time.sleep(0.8)
    assert [watch.cause for watch in watches] == [None] * 3
