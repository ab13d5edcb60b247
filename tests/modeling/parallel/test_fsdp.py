"""Sharding in one process: wrapped modules, group sizes, and FSDP2 on one rank, which one GPU with offloading runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.distributed.process_group import World
from rm_gallery.errors import UserError
from rm_gallery.modeling.config import FsdpConfig, ModelConfig
from rm_gallery.modeling.freezing import freeze
from rm_gallery.modeling.meta_init import init_on_meta
from rm_gallery.modeling.parallel.apply import resolve_strategy
from rm_gallery.modeling.parallel.fsdp import ShardingSpec, modules_to_shard, shard
from rm_gallery.modeling.parallel.master_weights import MasterWeights
from rm_gallery.modeling.parallel.strategy import choose_strategy
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.objectives import bradley_terry
from rm_gallery.planning.memory import Layout, Pack, step_memory
from rm_gallery.planning.model_shape import load_shape
from tests.small import DECODERS, ENCODERS, make_model, random_groups

CPU = torch.device("cpu")


@pytest.fixture
def group_of_one() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", DECODERS + ENCODERS)
def test_the_layers_are_wrapped(kind: str, tmp_path: Path) -> None:
    model = load_reward_model(str(make_model(kind, tmp_path))).model
    found = modules_to_shard(model, 0)
    assert len(found) == 2 and len({type(module) for module in found}) == 1
    assert "Layer" in type(found[0]).__name__


def test_wrapped_modules_have_min_num_params_and_inner_ones_come_first(qwen2_folder: Path) -> None:
    model = load_reward_model(str(qwen2_folder)).model
    found = modules_to_shard(model, 2000)
    sizes = []
    for number, module in enumerate(found):
        inside = {id(p) for earlier in found[:number] for p in earlier.parameters()}
        sizes.append(sum(p.numel() for p in module.parameters() if id(p) not in inside))
        assert not any(module in earlier.modules() for earlier in found[:number]), "inner ones come first"
    assert min(sizes) >= 2000
    assert model not in found and model.network not in found, "a decoder's network is never called"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp2_on_one_rank_takes_the_same_step(dtype: torch.dtype, qwen2_folder: Path, group_of_one: None) -> None:
    batch = collate(random_groups(0))
    world = World(0, 1, CPU)
    meta, files = init_on_meta(str(qwen2_folder), seed=0)
    torch.manual_seed(0)
    whole = load_reward_model(str(qwen2_folder)).model
    model = meta.model
    weights = shard(model, files, ShardingSpec(dtype, 1, offload=True), world)
    alone = MasterWeights(whole, dtype)
    found = []
    for each, own in ((model, weights), (whole, alone)):
        loss = bradley_terry(each(batch), batch)[0]
        own.backward(loss, is_last=True)
        found.append(own.gather_gradients(loss.detach().double(), math.inf))
    assert found[0] == pytest.approx(found[1], rel=1e-5 if dtype == torch.float32 else 0.02)
    sharded = dict(weights.named_parameters())
    for name, value in alone.named_parameters():
        assert torch.equal(sharded[name].full_tensor(), value), name  # type: ignore[attr-defined]


def test_frozen_shards_are_in_the_compute_dtype(qwen2_folder: Path, group_of_one: None) -> None:
    """As `rm-gallery estimate` counts them: only trained parameters are float32."""
    meta, files = init_on_meta(str(qwen2_folder), seed=0)
    freeze(meta.model.network, 1)
    shard(meta.model, files, ShardingSpec(torch.bfloat16, 1), World(0, 1, CPU))
    parameters: list[Any] = list(meta.model.parameters())
    assert {(each.requires_grad, each.dtype) for each in parameters} == {(True, torch.float32), (False, torch.bfloat16)}
    layout = Layout("fsdp2", 1, 1, 2, False, False, False, False)
    counted = step_memory(load_shape(str(qwen2_folder), freeze=1), layout, Pack(1, 1, 1), overhead=0).weights
    assert sum(each.to_local().nbytes for each in parameters) == counted


BF16 = FsdpConfig(model_dtype="bf16")


def test_auto_replicates_small_models_and_shards_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 100 * 18 * 4
    monkeypatch.setattr("rm_gallery.modeling.parallel.apply._memory_per_process", lambda world: memory)
    world = World(0, 4, CPU)
    assert resolve_strategy(ModelConfig(fsdp_config=BF16), world, 100) == "ddp"
    assert resolve_strategy(ModelConfig(fsdp_config=BF16), world, 101) == "fsdp2"
    assert resolve_strategy(ModelConfig(fsdp_config=replace(BF16, cpu_offload=True)), world, 100) == "fsdp2"
    assert resolve_strategy(ModelConfig(strategy="fsdp", fsdp_config=BF16), World(0, 1, CPU), 1) == "none"


def test_fsdp_is_an_alias_of_fsdp2_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rm_gallery"):
        assert resolve_strategy(ModelConfig(strategy="fsdp", fsdp_config=BF16), World(0, 2, CPU), 1) == "fsdp2"
        assert resolve_strategy(ModelConfig(strategy="fsdp2", fsdp_config=BF16), World(0, 2, CPU), 1) == "fsdp2"
    line = "model.strategy=fsdp runs FSDP2 (fully_shard): FSDP1 is deprecated in PyTorch"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_group_sizes_that_do_not_divide_are_refused() -> None:
    world = World(0, 4, CPU)
    config = ModelConfig(strategy="fsdp2", fsdp_config=replace(BF16, fsdp_size=3))
    with pytest.raises(UserError, match=r"fsdp_size=3 does not divide the 4 processes"):
        resolve_strategy(config, world, 1)
    with pytest.raises(UserError, match=r"fsdp_size=8 does not divide the 4 processes"):
        resolve_strategy(ModelConfig(strategy="fsdp", fsdp_config=replace(BF16, fsdp_size=8)), world, 1)
    assert resolve_strategy(ModelConfig(strategy="fsdp2", fsdp_config=replace(BF16, fsdp_size=1)), world, 1) == "ddp"


def test_offloading_without_effect_on_a_cpu_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(
        "rm_gallery.modeling.parallel.apply.log.info", lambda text, *values: logged.append(text % values)
    )
    config = ModelConfig(strategy="ddp", fsdp_config=replace(BF16, cpu_offload=True, offload_params=True))
    assert resolve_strategy(config, World(0, 2, CPU), 1) == "ddp"
    assert logged == ["model.fsdp_config: offloading has no effect on a CPU: everything is in host memory already"]


@pytest.mark.parametrize(
    ("optimizer", "master_weights", "per_parameter"),
    [
        ("adamw", "fp32", 18), ("adamw_8bit", "fp32", 12.03125), ("muon", "fp32", 15.6), ("adafactor", "fp32", 10),
        ("adamw", "bf16_stochastic", 14), ("adamw_8bit", "bf16_stochastic", 8.03125),
    ],
)  # fmt: skip
def test_auto_counts_the_state_of_the_optimizer(
    optimizer: str, master_weights: Any, per_parameter: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(fsdp_config=replace(BF16, master_weights=master_weights))
    for share, expected in ((1.01, "ddp"), (0.99, "fsdp2")):
        memory = 4 * 1000 * per_parameter * share
        monkeypatch.setattr("rm_gallery.modeling.parallel.apply._memory_per_process", lambda _, memory=memory: memory)
        assert resolve_strategy(config, World(0, 2, CPU), 1000, optimizer=optimizer, num_matrix=600) == expected


def test_ddp_on_gpus_cannot_offload_weights() -> None:
    def choose(world_size: int) -> str:
        return choose_strategy(
            "ddp", world_size=world_size, memory=1e9, state_bytes=18, offload=True, fsdp_size=-1, on_gpu=True,
        )  # fmt: skip

    with pytest.raises(UserError, match=r"model.strategy=ddp cannot offload weights"):
        choose(2)
    assert choose(1) == "fsdp2", "one GPU offloads through fsdp2"
