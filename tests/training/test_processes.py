"""Several processes: one step and its pieces in every strategy, and the end of a run that loses a process.

The whole loss curves are compared in test_strategies.py.
"""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin
from rm_gallery.distributed.process_group import World
from rm_gallery.modeling.config import FsdpConfig
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.objectives import bradley_terry
from rm_gallery.training.validation import validate
from tests import forks
from tests.small import random_groups
from tests.training.process_checks import STRATEGIES, build, gradients

pytestmark = pytest.mark.slow

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def found(qwen2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes of process_checks.py found, and the folder they wrote into."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "model").symlink_to(qwen2_folder)
    script = Path(__file__).with_name("process_checks.py")
    options = ("--standalone", "--nproc_per_node=2", "--max_restarts=1")
    process = forks.torchrun(*options, str(script), str(folder), log=folder / "log")
    assert forks.finish([process]) == [0], process.log.read_text(errors="replace")[-6000:]
    return [{**json.loads((folder / f"{rank}.json").read_text()), "folder": str(folder)} for rank in range(2)]


def test_processes_meet_again_after_one_was_killed(found: list[dict[str, Any]]) -> None:
    assert [each["attempt"] for each in found] == [1, 1], "the first attempt lost rank 1"


@pytest.mark.parametrize("kind", ["plain", "checkpointing", "bf16"])
def test_a_step_has_the_gradient_of_one_process(kind: str, found: list[dict[str, Any]], qwen2_folder: Path) -> None:
    groups = random_groups(0)[:2] + random_groups(1)[3:4]
    settings = {"fsdp_config": FsdpConfig(model_dtype="bf16")} if kind == "bf16" else {}
    alone = gradients(build(qwen2_folder, ALONE, "none", **settings), ALONE, groups)
    assert alone["norm"] == pytest.approx(math.sqrt(sum(alone["squares"].values())), rel=1e-6)
    tolerance = {"rel": 0.05, "abs": 1e-3} if kind == "bf16" else {"rel": 1e-5, "abs": 1e-9}
    for each in found:
        for strategy in STRATEGIES:
            step = each["strategies_give_one_gradient"][kind][strategy]
            assert step["loss"] == pytest.approx(alone["loss"], **tolerance), strategy
            assert step["norm"] == pytest.approx(alone["norm"], **tolerance), strategy
            assert step["squares"] == pytest.approx(alone["squares"], **tolerance), strategy


def test_no_process_holds_the_whole_model(found: list[dict[str, Any]], qwen2_folder: Path) -> None:
    whole = sum(parameter.numel() for parameter in load_reward_model(str(qwen2_folder)).model.parameters())
    parts = [each["each_process_holds_its_part"] for each in found]
    assert sum(parts) == whole
    assert max(parts) < 0.52 * whole


def test_the_optimizer_has_float32_and_decays_matrices(found: list[dict[str, Any]], qwen2_folder: Path) -> None:
    model = load_reward_model(str(qwen2_folder)).model
    for each in found:
        for strategy in STRATEGIES:
            assert each["types_are_as_configured"][strategy] == {
                "layer": "torch.bfloat16",
                "head": "torch.float32",
                "rewards": "torch.float32",
                "weights": ["torch.float32"],
                "decayed": sorted(name for name, parameter in model.named_parameters() if parameter.ndim > 1),
            }


def test_a_step_that_is_bad_on_one_rank_is_skipped_by_all(found: list[dict[str, Any]]) -> None:
    results = [each["a_bad_step_on_one_rank_is_skipped_by_all"] for each in found]
    assert results[0] == results[1]
    for strategy in STRATEGIES:
        assert results[0][strategy]["finite"] == [True, False, True]
        first, third = results[0][strategy]["losses"]
        assert third < first, "the first step was made, and the third one too"


def test_validation_is_shared_and_gives_the_figures_of_one_process(
    found: list[dict[str, Any]], qwen2_folder: Path
) -> None:
    data = TokenData.from_groups((group, Origin()) for seed in range(3) for group in random_groups(seed))
    model, _ = build(qwen2_folder, ALONE, "none")
    alone = validate(model, data, bradley_terry, token_budget=400)
    for each in found:
        for strategy in STRATEGIES:
            assert each["figures_of_validation"][strategy] == pytest.approx(alone, abs=1e-5)


def test_a_sharded_model_is_exported_in_full_or_not_at_all(found: list[dict[str, Any]], qwen2_folder: Path) -> None:
    model, _ = build(qwen2_folder, ALONE, "none")
    folder = Path(found[0]["folder"])
    for strategy in STRATEGIES:
        files = folder / f"files-{strategy}"
        index = json.loads((files / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = {name: load_file(files / file)[name] for name, file in index.items()}
        assert len(set(index.values())) > 2
        assert tensors.keys() == model.network.state_dict().keys()
        for name, value in model.network.state_dict().items():
            assert torch.equal(tensors[name], value), name
        assert not list((folder / f"full-{strategy}").glob("*"))
        for each in found:
            assert "File too large" in each["a_sharded_model_is_exported_in_full"][strategy]


def test_processes_agree_on_the_run_folder_and_refuse_other_settings(found: list[dict[str, Any]]) -> None:
    for each in found:
        agreed = each["the_run_folder_is_that_of_rank_0"]
        assert agreed["run_dir"] == "out/run-0"
        assert (
            agreed["refused"] == "optim.lr=2e-06 on rank 1, but 1e-06 on rank 0; start all ranks with the same settings"
        )


def test_who_does_not_come_in_time_is_named(found: list[dict[str, Any]]) -> None:
    assert found[0]["who_does_not_come_is_named"] == "rank 1 of 2 did not reach the test within 0.3 s"
    assert found[1]["who_does_not_come_is_named"] == ""


def test_the_loss_of_a_process_on_another_machine_ends_the_run_and_is_named(tmp_path: Path) -> None:
    """Two launchers that know nothing of each other: only the processes themselves can tell."""
    script = tmp_path / "lost.py"
    script.write_text(
        "import os, signal, torch\n"
        "from rm_gallery.distributed import collectives, process_group\n"
        "with process_group.processes('cpu') as world:\n"
        "    collectives.sum_over_ranks(torch.ones(1))\n"
        "    if world.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    collectives.sum_over_ranks(torch.ones(1))\n"
    )
    meeting = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={forks.free_port()}")
    nodes = [
        forks.torchrun(*meeting, f"--node_rank={node}", str(script), log=tmp_path / f"{node}.log") for node in range(2)
    ]
    assert all(forks.finish(nodes, 120))
    assert f"rank 1 on {socket.gethostname()} stopped answering" in nodes[0].log.read_text()
