"""`trainer.eval_sets` and `trainer.save_best_metric`: metrics of their own, and nothing else changes."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.objectives import bradley_terry
from rm_gallery.training.checkpoint import Progress
from rm_gallery.training.metric_names import parse_metric, value_to_compare
from rm_gallery.training.validation import validate
from tests.small import random_groups, text_pairs, write_pairs
from tests.training.rank_runs import Run, run_all
from tests.training.short_runs import rows, send, settings, train, weights, when_logged, write_data

SETS = "trainer.eval_sets={easy: train.parquet, other: [other.parquet]}"


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()
    write_pairs(Path("other.parquet"), text_pairs(7, seed=5))


@pytest.mark.parametrize(
    ("name", "parts", "direction"),
    [
        ("val/loss", ("", "loss", ""), -1),
        ("val/accuracy/web/a", ("", "accuracy", "web/a"), 1),
        ("val/math/margin", ("math", "margin", ""), 1),
        ("val/math/loss/web", ("math", "loss", "web"), -1),
        ("val/mse_helpfulness", ("", "mse_helpfulness", ""), -1),
        ("val/reward_mean", ("", "reward_mean", ""), 0),
        ("train/loss", None, 0),
        ("val/math", None, 0),
    ],
)
def test_a_metric_s_name_has_parts_and_a_direction(name: str, parts: Any, direction: int) -> None:
    found = parse_metric(name)
    assert (found and (found.set, found.kind, found.source)) == parts
    assert (found.direction if found else 0) == direction


def test_the_best_loss_is_the_lowest_and_that_of_another_metric_is_forgotten() -> None:
    progress, best = Progress(), []
    assert not progress.use_metric("val/a/loss"), "nothing to forget yet"
    for step, loss in enumerate([math.nan, 0.5, 0.7, 0.4], start=1):
        progress.step = step
        progress.count_validation({"val/a/loss": loss, "val/accuracy": 0.5})
        best.append(progress.note_best({"val/a/loss": loss, "val/accuracy": 0.5}))
    assert best == [False, True, False, True]
    assert (progress.best_step, progress.best_accuracy, progress.validations_since_highest) == (4, 0.4, 0)
    assert math.isnan(value_to_compare({"val/a/accuracy": 1.0, "val/a/loss": math.nan}, "val/a/accuracy"))
    assert progress.use_metric("val/accuracy") and progress.best_step is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.save_best_metric=val/acuracy"],
         "val/acuracy: validation has no such metric. Did you mean 'val/accuracy'? It has val/accuracy, val/loss"),
        (["trainer.save_best_metric=val/hard/loss"], "val/hard/loss: validation has no such metric. Did you mean"),
        (["trainer.save_best_metric=val/easy/reward_mean"], "neither higher nor lower is better; set one of val/acc"),
        pytest.param(["trainer.save_best_metric=val/easy/accuracy/web"], "These data have a single source",
                     marks=pytest.mark.slow),
        (["trainer.eval_sets={loss: train.parquet}"], "trainer.eval_sets.loss: a set is named by letters, digits"),
        (["trainer.eval_sets={hard: no.parquet}"], "trainer.eval_sets.hard=no.parquet: no such file"),
        (["trainer.eval_sets=[train.parquet]"], "must be names with files, e.g. trainer.eval_sets.math=math.parquet"),
        (["trainer.eval_sets={hard: {part: 1}}"], "trainer.eval_sets.hard.part: unknown key"),
    ],
)  # fmt: skip
def test_an_unknown_metric_or_set_is_refused_before_training(
    overrides: list[str], message: str, qwen2_folder: Path, capsys: Any
) -> None:
    train(qwen2_folder, "run", SETS, *overrides, status=2)
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_sets_have_their_own_metrics_and_the_weights_stay_those_of_a_run_without(qwen2_folder: Path) -> None:
    every = ("trainer.test_freq=2", "data.max_tokens_per_micro_batch=2000", "trainer.val_before_train=true")
    plain = train(qwen2_folder, "plain", *every, "data.val_files=other.parquet", "model.dropout=0.1")
    found = train(qwen2_folder, "sets", *every, SETS, "model.dropout=0.1")
    ours, theirs = weights(found / "global_step_6"), weights(plain / "global_step_6")
    assert all(ours[name].equal(theirs[name]) for name in theirs), "bit for bit, with dropout's random numbers"
    expected = [row for row in rows(plain) if "val/loss" in row]
    validations = [row for row in rows(found) if "val/loss" in row]
    assert len(validations) == len(expected) == 4
    for row, own in zip(validations, expected, strict=True):
        of_set = {name.replace("other/", ""): value for name, value in row.items() if name.startswith("val/other/")}
        assert of_set.pop("val/n") == 7
        assert of_set == {name: value for name, value in own.items() if name.startswith("val/")}, "as validation data"
        assert row["val/easy/n"] == 24
    facts = json.loads((found / "run.json").read_text())
    assert facts["data"]["eval_sets"]["other"]["comparisons"] == 7
    assert "| val/other/accuracy |" in (found / "global_step_6" / "README.md").read_text()


@pytest.mark.slow
def test_the_best_of_another_metric_survives_a_restart(qwen2_folder: Path, monkeypatch: Any, caplog: Any) -> None:
    """Without validation data: the lowest loss of a set is the best checkpoint, and early stopping waits for it."""
    options = (
        "data.val_files=", SETS, "trainer.save_best=true", "trainer.save_best_metric=val/other/loss",
        "trainer.test_freq=1", "trainer.early_stopping_patience=2", "optim.lr=1e-1",
    )  # fmt: skip
    whole = train(qwen2_folder, "whole", *options)
    losses = {row["step"]: row["val/other/loss"] for row in rows(whole) if "val/other/loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert json.loads((whole / "best.json").read_text()) == {
        "checkpoint": f"global_step_{best}", "step": best, "val/other/loss": losses[best],
    }  # fmt: skip
    assert max(losses) == min(6, best + 2)
    when_logged(monkeypatch, 1, send(signal.SIGTERM))
    train(qwen2_folder, "parts", *options, status=143)
    parts = train(qwen2_folder, "parts", *options)
    assert rows(parts) == rows(whole)
    assert (parts / "best.json").read_text() == (whole / "best.json").read_text()


@pytest.mark.slow
def test_two_ranks_have_the_figures_of_one(qwen2_folder: Path, in_tmp: Path) -> None:
    runs = [Run(settings(qwen2_folder, f"ranks{number}", SETS, "optim.lr=1e-5"), ranks=number) for number in (1, 2)]
    done = run_all(runs, in_tmp)
    assert [each.status for each in done] == [[0], [0, 0]], "\n".join(each.log for each in done)
    one, two = ([row for row in rows(Path(f"runs/ranks{number}")) if "val/loss" in row][-1] for number in (1, 2))
    assert "val/other/length_correlation" in one
    assert two == pytest.approx(one, abs=2e-5)


def test_length_correlation_is_that_of_both_orders_of_each_pair(qwen2_folder: Path) -> None:
    model = load_reward_model(str(qwen2_folder)).model
    groups = random_groups(0) + random_groups(1)
    with torch.no_grad():
        batch = collate(groups)
        rewards = model(batch).double()
    lengths = torch.tensor([len(tail) for group in groups for tail in group.tails]).double()
    pairs = [torch.cat([each[batch.better] - each[batch.worse], each[batch.worse] - each[batch.better]])
             for each in (rewards, lengths)]  # fmt: skip
    found = validate(
        model, TokenData.from_groups((group, Origin()) for group in groups), bradley_terry, token_budget=500
    )
    assert found["val/length_correlation"] == pytest.approx(torch.corrcoef(torch.stack(pairs))[0, 1].item(), abs=1e-6)
