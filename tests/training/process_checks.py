"""What two processes do together; started by torchrun from test_processes.py.

    torchrun --nproc_per_node=2 --max_restarts=1 process_checks.py FOLDER

The first attempt loses a process; the second makes all checks. Each writes what it found to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from rm_gallery.data.batching.loader import StepBatches
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin
from rm_gallery.distributed import collectives, process_group
from rm_gallery.distributed.collectives import HostGroup
from rm_gallery.distributed.process_group import World, processes
from rm_gallery.errors import UserError
from rm_gallery.modeling.config import FsdpConfig, ModelConfig
from rm_gallery.modeling.export import InputRecord, write_weights
from rm_gallery.modeling.meta_init import init_on_meta
from rm_gallery.modeling.parallel.apply import apply
from rm_gallery.modeling.parallel.fsdp import ShardedWeights
from rm_gallery.modeling.parallel.master_weights import TrainedWeights
from rm_gallery.modeling.parallel.strategy import Strategy
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.objectives import bradley_terry
from rm_gallery.objectives.metrics import Sums
from rm_gallery.training.checkpoint.save import Checkpoints, WeightsFolder
from rm_gallery.training.checkpoint.state import Progress, RunTensors, SavedWeights
from rm_gallery.training.checkpoint.tensor_files import ShardWriter
from rm_gallery.training.config import OptimConfig, TrainConfig
from rm_gallery.training.optim import build_optimizer, build_schedule
from rm_gallery.training.setup import agree_on_run
from rm_gallery.training.trainer import Intervals, Trainer
from rm_gallery.training.trainer_config import CheckpointConfig
from rm_gallery.training.validation import validate
from tests.small import make_tokenizer, random_groups
from tests.training.short_runs import StandIn

FLOAT32 = FsdpConfig(model_dtype="fp32")
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2")
Built = tuple[RewardModel, TrainedWeights]
Check = Callable[[Path, World], Any]


def build(folder: Path, world: World, strategy: Strategy, *, seed: int = 0, **config: Any) -> Built:
    """A model as a run builds it: on the meta device if its parameters are sharded."""
    model_config = ModelConfig(**{"fsdp_config": FLOAT32, **config})
    files = None
    if strategy == "fsdp2":
        loaded, files = init_on_meta(str(folder), seed=seed)
    else:
        torch.manual_seed(seed)
        loaded = load_reward_model(str(folder))
    return loaded.model, apply(loaded.model, model_config, world, strategy=strategy, files=files)


def gradients(built: Built, world: World, groups: list[Any], *, micro_batches: int = 2) -> dict[str, Any]:
    """Loss, norm and gradients of a step over these groups, dealt out to the ranks in turn."""
    model, weights = built
    model.train()
    count = sum(len(group.comparisons) for group in groups)
    parts = [groups[index :: world.world_size * micro_batches] for index in range(world.world_size * micro_batches)]
    loss = torch.zeros((), dtype=torch.float64)
    for number in range(micro_batches):
        batch = collate(parts[number * world.world_size + world.rank])
        part = bradley_terry(model(batch), batch)[0] / count
        weights.backward(part, is_last=number == micro_batches - 1)
        loss += part.detach()
    value, norm = weights.gather_gradients(loss, math.inf)
    found = {name: parameter.grad for name, parameter in weights.named_parameters() if parameter.grad is not None}
    return {"loss": value, "norm": norm, "squares": squares(found, weights)}


def squares(found: Mapping[str, Any], weights: TrainedWeights) -> dict[str, float]:
    """Sum of squares of each whole gradient."""
    whole = {}
    for name, _ in weights.named_parameters():
        gradient = found.get(name)
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        value = 0.0 if local is None else float(local.double().square().sum())
        whole[name] = collectives.sum_numbers(value)[0] if isinstance(weights, ShardedWeights) else value
    return whole


def strategies_give_one_gradient(folder: Path, world: World) -> Any:
    """Of an uneven share of groups, with two micro-batches, one of them empty on rank 1."""
    groups = random_groups(0)[:2] + random_groups(1)[3:4]
    found = {strategy: gradients(build(folder, world, strategy), world, groups) for strategy in STRATEGIES}
    checkpointing = {
        strategy: gradients(build(folder, world, strategy, enable_gradient_checkpointing=True), world, groups)
        for strategy in STRATEGIES
    }
    mixed = {
        strategy: gradients(build(folder, world, strategy, fsdp_config=FsdpConfig(model_dtype="bf16")), world, groups)
        for strategy in STRATEGIES
    }
    return {"plain": found, "checkpointing": checkpointing, "bf16": mixed}


def each_process_holds_its_part(folder: Path, world: World) -> Any:
    _, weights = build(folder, world, "fsdp2")
    return sum(parameter.to_local().numel() for _, parameter in weights.named_parameters())  # type: ignore[attr-defined]


def types_are_as_configured(folder: Path, world: World) -> Any:
    """Layers compute in bfloat16, the head in float32, and the optimizer has float32."""
    found = {}
    for strategy in STRATEGIES:
        model, weights = build(folder, world, strategy, fsdp_config=FsdpConfig(model_dtype="bf16"))
        seen: dict[str, str] = {}

        def note(name: str, seen: dict[str, str] = seen) -> Any:
            return lambda module, inputs, output: seen.update({name: str(output.dtype)})

        layer = next(module for name, module in model.named_modules() if name.endswith("mlp"))
        layer.register_forward_hook(note("layer"))
        model.head.register_forward_hook(note("head"))
        rewards = model(collate(random_groups(0)))
        named = dict(weights.named_parameters())
        optimizer = build_optimizer(weights.named_parameters(), OptimConfig(weight_decay=0.1))
        decayed = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
        found[strategy] = {
            **seen,
            "rewards": str(rewards.dtype),
            "weights": sorted({str(parameter.dtype) for parameter in named.values()}),
            "decayed": sorted(name for name, parameter in named.items() if id(parameter) in decayed),
        }
    return found


class NoSaves:
    """Stands where a run has its checkpoints."""

    def has_failed(self) -> bool:
        return False


def a_bad_step_on_one_rank_is_skipped_by_all(folder: Path, world: World) -> Any:
    found = {}
    for strategy in STRATEGIES:
        model, weights = build(folder, world, strategy)
        calls = iter(range(100))

        def objective(rewards: Any, batch: Any, calls: Any = calls) -> Any:
            loss, sums = bradley_terry(rewards, batch)
            is_bad = next(calls) == 1 and world.rank == 1
            return loss * (math.nan if is_bad else 1), sums

        trainer = Trainer(
            model=model, weights=weights, objective=StandIn(function=objective), steps=iter(()), clip_grad=1.0,
            total_steps=3,
            optimizer=build_optimizer(weights.named_parameters(), OptimConfig(lr=1e-3)),
            schedule=build_schedule(OptimConfig(), 3), intervals=Intervals(1, 0, 0), max_bad_steps=9, validate=None,
            checkpoints=NoSaves(), sink=None, ranks=HostGroup(world),  # type: ignore[arg-type]
        )  # fmt: skip
        batch = collate(random_groups(0))
        step = StepBatches([batch], 2 * len(batch.better), batch.num_tokens, 1.0)
        results = [trainer.train_step(step, Sums()) for _ in range(3)]
        found[strategy] = {
            "finite": [result.is_finite for result in results],
            "losses": [result.loss for result in results if result.is_finite],
        }
    return found


def figures_of_validation(folder: Path, world: World) -> Any:
    data = TokenData.from_groups((group, Origin()) for seed in range(3) for group in random_groups(seed))
    found = {}
    for strategy in STRATEGIES:
        model, _ = build(folder, world, strategy)
        found[strategy] = validate(model, data, bradley_terry, token_budget=400, device=world.device)
    return found


def a_sharded_model_is_exported_in_full(folder: Path, world: World) -> Any:
    """From its saved shards, in several small files; and with a full disk every rank raises the error."""
    found = {}
    for strategy in STRATEGIES:
        model, weights = build(folder, world, strategy)
        tensors = RunTensors(model, weights, build_optimizer(weights.named_parameters(), OptimConfig()))
        state = folder.parent / f"state-{strategy}"
        dcp.save(tensors.read(), checkpoint_id=state, storage_writer=ShardWriter(state, world.rank))
        if world.rank == 0:
            saved, target = SavedWeights(state), folder.parent / f"files-{strategy}"
            write_weights(target, saved.meta_tensors(), torch.float32, read=saved.read, max_shard_bytes=20_000)
        weights_folder = WeightsFolder(
            model, make_tokenizer(), InputRecord("text"), torch.float32, world.device, exact=True,
            probes=random_groups(0)[:1],
        )  # fmt: skip
        run_dir = folder.parent / f"full-{strategy}"
        checkpoints = Checkpoints(run_dir, CheckpointConfig(), tensors, weights_folder, HostGroup(world), facts={})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        try:
            checkpoints.save(Progress(step=1), {}, is_last=True)
            found[strategy] = "no error was raised"
        except UserError as error:
            found[strategy] = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            checkpoints.close()
    return found


def the_run_folder_is_that_of_rank_0(folder: Path, world: World) -> Any:
    config = TrainConfig()
    own = replace(config.trainer, experiment_name=f"run-{world.rank}", default_local_dir=f"out/run-{world.rank}")
    agreed = agree_on_run(replace(config, trainer=own), world)
    other = replace(config, optim=replace(config.optim, lr=1e-6 * (world.rank + 1)))
    return {"run_dir": str(agreed.trainer.run_dir), "refused": refusal(lambda: agree_on_run(other, world))}


def who_does_not_come_is_named(folder: Path, world: World) -> Any:
    if world.rank == 1:
        time.sleep(1.0)
    return refusal(lambda: process_group.barrier("the test", 0.3))


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


CHECKS: tuple[Check, ...] = (
    strategies_give_one_gradient,
    each_process_holds_its_part,
    types_are_as_configured,
    a_bad_step_on_one_rank_is_skipped_by_all,
    figures_of_validation,
    a_sharded_model_is_exported_in_full,
    the_run_folder_is_that_of_rank_0,
    who_does_not_come_is_named,
)


def main(folder: Path) -> None:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with processes("cpu") as world:
        if attempt == 0:
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            collectives.all_gather("lost")
        found = {check.__name__: check(folder / "model", world) for check in CHECKS}
        (folder / f"{world.rank}.json").write_text(json.dumps({"attempt": attempt, **found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
