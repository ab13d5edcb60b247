"""One process, and the variables that a launcher sets; what several do is in training/test_processes.py."""

from __future__ import annotations

import pytest
import torch

from rm_gallery.distributed import collectives, process_group
from rm_gallery.distributed.process_group import World, processes
from rm_gallery.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_no_group_and_keeps_its_values() -> None:
    with processes("cpu") as world:
        assert world == World(0, 1, torch.device("cpu"))
        assert world.is_main
        values = torch.tensor([1.0, 2.0])
        assert collectives.sum_over_ranks(values) is values
        assert collectives.sum_numbers(3, 4.5) == [3, 4.5]
        assert collectives.broadcast("folder") == "folder"
        assert collectives.all_gather(7) == [7]
        process_group.barrier("anything")
        assert not torch.distributed.is_initialized()
    assert (process_group.rank(), process_group.world_size()) == (0, 1)


def test_variables_of_a_scheduler_alone_do_not_make_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    with processes("cpu") as world:
        assert (world.rank, world.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 with WORLD_SIZE=2: ranks count from 0"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "rank 0 cannot reach the other processes.*MASTER_ADDR=None.*torchrun"),
    ],
)
def test_variables_that_do_not_fit_are_named(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LOCAL_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), processes("cpu"):
        pass


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_START_TIMEOUT_S", 0.5)
    world = World(1, 4, torch.device("cpu"))
    store = torch.distributed.HashStore()
    store.set("start/3", "node3")
    with pytest.raises(UserError, match=r"rank 0, 2 of 4 did not reach start within 0.5 s"):
        process_group._store_barrier(store, "start", world, 0.5, "start")


def test_an_error_of_a_collective_is_told_from_an_own_one() -> None:
    broken = "[../third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:20010"
    assert process_group._is_connection_error(RuntimeError(broken))
    assert process_group._is_connection_error(torch.distributed.DistBackendError("NCCL error"))
    assert not process_group._is_connection_error(
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")
    )
    assert not process_group._is_connection_error(ValueError("store"))


def test_ranks_draw_apart_and_rank_0_as_one_process() -> None:
    drawn = []
    for rank in range(3):
        process_group.seed_everything(5)
        process_group.seed_per_rank(5, World(rank, 3, torch.device("cpu")))
        drawn.append(torch.rand(1).item())
    process_group.seed_everything(5)
    assert drawn[0] == torch.rand(1).item()
    assert len(set(drawn)) == 3
