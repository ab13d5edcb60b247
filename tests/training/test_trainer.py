"""The loop by itself: steps that are not finite, gradient sums, clipping, validation that changes nothing."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery.data.batching.loader import StepBatches
from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.distributed.collectives import HostGroup
from rm_gallery.distributed.process_group import World
from rm_gallery.errors import TrainingStopped
from rm_gallery.modeling.parallel.master_weights import MasterWeights
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.objectives import Objective, bradley_terry
from rm_gallery.objectives.metrics import Sums
from rm_gallery.training.checkpoint import Progress
from rm_gallery.training.config import OptimConfig
from rm_gallery.training.optim import build_optimizer, build_schedule
from rm_gallery.training.trainer import Intervals, Trainer
from tests.small import DECODERS, ENCODERS, make_model, random_groups
from tests.training.short_runs import StandIn


class Recorder:
    """A sink that keeps what it is given; and a checkpointer that only counts."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.saved: list[Path] = []
        self.latest: Path | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(metrics)))

    def save(self, progress: Progress, sums: Mapping[str, float], *, is_last: bool = False) -> None:
        self.latest = Path(f"global_step_{progress.step}")
        self.saved.append(self.latest)

    def has_failed(self) -> bool:
        return False

    def wait(self) -> None: ...

    def describe_last_good(self, progress: Progress) -> str:
        return f"the last checkpoint from before is {self.latest}"


def step_batches(*groups_of_batches: list[Any]) -> StepBatches:
    batches = [collate(groups) for groups in groups_of_batches]
    count = sum(len(batch.better) for batch in batches)
    return StepBatches(batches, count, sum(batch.num_tokens for batch in batches), 1.0)


def build(
    folder: Path,
    *,
    objective: Objective = bradley_terry,
    total_steps: int = 4,
    max_bad_steps: int = 3,
    clip_grad: float = math.inf,
    dtype: torch.dtype = torch.float32,
    lr: float = 1e-3,
) -> tuple[Trainer, Recorder]:
    torch.manual_seed(0)
    model = load_reward_model(str(folder)).model
    weights = MasterWeights(model, dtype)
    config = OptimConfig(lr=lr, lr_scheduler="constant")
    recorder = Recorder()
    steps: Iterator[StepBatches] = (step_batches(random_groups(seed)) for seed in itertools.count())
    trainer = Trainer(
        model=model, weights=weights, objective=objective,
        optimizer=build_optimizer(weights.named_parameters(), config),
        schedule=build_schedule(config, total_steps), clip_grad=clip_grad, steps=steps, total_steps=total_steps,
        intervals=Intervals(log=1, validate=0, save=2), max_bad_steps=max_bad_steps, validate=None,
        checkpoints=recorder, sink=recorder, ranks=HostGroup(World(0, 1, torch.device("cpu"))),
    )  # fmt: skip
    return trainer, recorder


def snapshot(model: RewardModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def broken_on(steps: set[int], how: str) -> Objective:
    """The Bradley-Terry loss, with a loss or a gradient that is not finite in these calls (from 1)."""
    calls = itertools.count(1)

    def objective(rewards: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, sums = bradley_terry(rewards, batch)
        if next(calls) in steps:
            # 0 * sqrt(0) has the value 0 and the gradient nan.
            loss = loss * math.nan if how == "loss" else loss + torch.sqrt((rewards * 0).abs()).sum()
        return loss, sums

    return StandIn(function=objective)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(how: str, qwen2_folder: Path, caplog: Any) -> None:
    trainer, recorder = build(qwen2_folder, objective=broken_on({2}, how))
    before = snapshot(trainer.model)
    result = trainer.train_step(next(trainer.steps), Sums())
    assert result.is_finite and any((a != b).any() for a, b in zip(before, snapshot(trainer.model), strict=True))
    before, sums = snapshot(trainer.model), Sums()
    assert not trainer.train_step(next(trainer.steps), sums).is_finite
    assert all((a == b).all() for a, b in zip(before, snapshot(trainer.model), strict=True))
    assert sums.read() == {}, "the bad step is in no mean"
    with caplog.at_level(logging.WARNING):
        trainer, recorder = build(qwen2_folder, objective=broken_on({2}, how))
        trainer.train()
    assert [row["train/bad_steps"] for _, row in recorder.rows] == [0, 1, 1, 1]
    assert "step 2 skipped: not finite" in caplog.text
    assert all(math.isfinite(p.detach().sum()) for p in trainer.model.parameters())


def test_too_many_bad_steps_in_a_row_stop_the_run_in_words(qwen2_folder: Path) -> None:
    trainer, recorder = build(qwen2_folder, objective=broken_on({3, 4, 5}, "loss"), total_steps=10)
    with pytest.raises(TrainingStopped, match=r"step 5: 3 consecutive steps were not finite.*global_step_4.*optim.lr"):
        trainer.train()
    assert recorder.saved == [Path("global_step_2"), Path("global_step_4")]


def test_a_run_in_which_every_step_is_skipped_ends_in_words_without_its_last_checkpoint(qwen2_folder: Path) -> None:
    trainer, recorder = build(
        qwen2_folder, objective=broken_on({1, 2, 3, 4}, "gradient"), total_steps=4, max_bad_steps=9
    )
    with pytest.raises(TrainingStopped, match=r"step 4: all 4 steps were skipped: not finite .* nothing was trained"):
        trainer.train()
    assert recorder.saved == [Path("global_step_2")]


def test_bad_steps_that_are_not_in_a_row_do_not_stop_the_run(qwen2_folder: Path) -> None:
    trainer, recorder = build(qwen2_folder, objective=broken_on({1, 2, 4, 5, 7, 8}, "loss"), total_steps=9)
    trainer.train()
    assert recorder.rows[-1][1]["train/bad_steps"] == 6


def test_accumulating_micro_batches_gives_the_gradient_of_one(qwen2_folder: Path) -> None:
    groups = random_groups(3) + random_groups(4)
    found = []
    for cut in ([groups], [groups[:3], groups[3:4], groups[4:]], [[group] for group in groups], [[], groups]):
        trainer, _ = build(qwen2_folder)
        result = trainer.train_step(step_batches(*cut), Sums())
        found.append((result.loss, result.grad_norm, snapshot(trainer.model)))
    for loss, norm, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        assert norm == pytest.approx(found[0][1], rel=1e-5)
        for a, b in zip(weights, found[0][2], strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_gradients_are_clipped_to_the_norm(qwen2_folder: Path) -> None:
    trainer, _ = build(qwen2_folder, clip_grad=0.01)
    result = trainer.train_step(step_batches(random_groups(1)), Sums())
    norm = torch.stack([parameter.grad.norm() for parameter in trainer.parameters if parameter.grad is not None]).norm()
    assert result.grad_norm > 0.1, "the logged norm is the one before clipping"
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_updates_too_small_for_bfloat16_still_reach_the_master_weights(qwen2_folder: Path) -> None:
    trainer, _ = build(qwen2_folder, dtype=torch.bfloat16, lr=1e-7)
    masters = [parameter.detach().clone() for parameter in trainer.parameters]
    assert {parameter.dtype for parameter in trainer.parameters} == {torch.float32}
    trainer.train_step(next(trainer.steps), Sums())
    changed = sum(int((a != b).sum()) for a, b in zip(masters, trainer.parameters, strict=True))
    assert changed > 0.5 * sum(a.numel() for a in masters)
    backbone = trainer.model.network.model.layers[0].mlp.up_proj.weight
    assert backbone.dtype == torch.bfloat16 and trainer.model.head.weight.dtype == torch.float32
    named = dict(trainer.weights.named_parameters())
    assert torch.equal(backbone, named["network.model.layers.0.mlp.up_proj.weight"].bfloat16())


@pytest.mark.slow
def test_bfloat16_gradients_are_summed_in_float32(qwen2_folder: Path) -> None:
    """Many micro-batches: a bfloat16 sum of equal gradients would stop growing; the float32 sum does not."""
    trainer, _ = build(qwen2_folder, dtype=torch.bfloat16)
    groups = random_groups(5)
    once = trainer.train_step(step_batches(groups), Sums()).grad_norm
    trainer, _ = build(qwen2_folder, dtype=torch.bfloat16)
    assert trainer.train_step(step_batches(*[groups] * 64), Sums()).grad_norm == pytest.approx(once, rel=1e-3)


def test_rewards_are_float32_under_bfloat16(qwen2_folder: Path) -> None:
    trainer, _ = build(qwen2_folder, dtype=torch.bfloat16)
    rewards = trainer.model(collate(random_groups(6)))
    assert rewards.dtype == torch.float32
    assert not torch.equal(rewards, rewards.bfloat16().float()), "they are not rounded to bfloat16 on the way"


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    folder = make_model("bert", tmp_path, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    batch = collate(random_groups(7))
    still = load_reward_model(str(folder)).model.train()
    noisy = load_reward_model(str(folder), dropout=0.3).model.train()
    with torch.no_grad():
        assert torch.equal(still(batch), still(batch))
        assert not torch.equal(noisy(batch), noisy(batch))


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS + ENCODERS)
def test_every_architecture_trains_in_bfloat16(kind: str, tmp_path: Path) -> None:
    folder = make_model(kind, tmp_path, initializer_range=0.02)
    exact, _ = build(folder)
    rounded, _ = build(folder, dtype=torch.bfloat16)
    batches = step_batches(random_groups(8))
    expected = exact.train_step(batches, Sums())
    found = rounded.train_step(batches, Sums())
    assert found.is_finite
    assert found.loss == pytest.approx(expected.loss, abs=0.05)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=0.2)


def test_training_stops_after_so_many_validations_without_a_higher_accuracy(qwen2_folder: Path, caplog: Any) -> None:
    caplog.set_level("INFO", "rm_gallery")
    accuracies = iter([0.5, 0.7, 0.7, 0.6, 0.9])
    trainer, recorder = build(qwen2_folder, total_steps=9)
    trainer.intervals, trainer.patience = Intervals(log=1, validate=1, save=0), 2
    trainer.validate = lambda before_pack: {"val/accuracy": next(accuracies), "val/loss": 1.0}
    trainer.train()
    assert (trainer.progress.step, recorder.saved) == (4, [Path("global_step_4")])
    assert "early stopping at step 4: no val/accuracy above 0.7000 in the last 2 validations" in caplog.text


def test_long_steps_and_validations_are_told_by_micro_batch(qwen2_folder: Path) -> None:
    trainer, _ = build(qwen2_folder, total_steps=1)
    trainer.steps = iter([step_batches(random_groups(0), random_groups(1), random_groups(2))])
    told: list[str] = []

    def validate(before_pack: Any) -> dict[str, float]:
        before_pack()
        return {}

    trainer.tick, trainer.validate = told.append, validate
    trainer.train()
    assert told == ["micro-batch 2/3", "micro-batch 3/3", "validation, micro-batch 1"]
