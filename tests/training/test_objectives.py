"""Runs of the objectives: labels that are missing or unused, options of other objectives, one run of each."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rm_gallery.cli import main
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup
from rm_gallery.errors import UserError
from rm_gallery.objectives import build_objective
from rm_gallery.schema import Comparison
from rm_gallery.training.config import TrainConfig
from rm_gallery.training.data_setup import check_labels
from rm_gallery.training.objective_config import ObjectiveConfig
from tests.small import text_pairs, write_pairs
from tests.training.short_runs import rows, settings, train


def with_labels(count: int, **labels: Any) -> list[dict[str, Any]]:
    return [
        {**row, **{key: value[number % len(value)] for key, value in labels.items()}}
        for number, row in enumerate(text_pairs(count))
    ]


def side(*comparisons: Comparison) -> Any:
    tails = [np.array([place], np.int32) for place in range(2)]
    groups = [
        (TokenGroup(np.zeros(0, np.int32), tails, [each]), Origin("a", row)) for row, each in enumerate(comparisons)
    ]
    return SimpleNamespace(data=TokenData.from_groups(groups))


def test_labels_that_are_missing_negative_or_unused(caplog: Any) -> None:
    def check(name: str, *train: Comparison, **options: Any) -> None:
        config = TrainConfig(objective=ObjectiveConfig(name=name, **options))  # type: ignore[arg-type]
        objective = build_objective(name, (), options)
        check_labels(config, objective, side(*train), {"data.val_files": side(plain)})

    plain, strong = Comparison(0, 1), Comparison(0, 1, margin=2.0, p_better=0.8)
    with pytest.raises(UserError, match=r"needs a margin of each comparison, and 1 of 2 have none \(first: a:1\)"):
        check("margin", strong, plain)
    with pytest.raises(UserError, match="needs a margin of 0 or more of each comparison, and 1 of 1 have none"):
        check("scaled", Comparison(0, 1, margin=-1.0))
    with pytest.raises(UserError, match=r"add the column data.p_chosen_key=p_chosen \(1 where all do\), or set"):
        check("soft", plain)
    check("soft", plain, label_smoothing=0.1)
    assert not caplog.text, "the smoothed label of a comparison without a share is known"
    with caplog.at_level(logging.INFO):
        check("margin", strong)
    assert "data.val_files: 1 of 1 comparisons have no margin (first: a:0)" in caplog.text
    assert "the data carry soft labels, which objective.name=margin does not use" in caplog.text


@pytest.mark.slow
def test_a_needed_label_that_is_missing_is_one_sentence(in_tmp: Path, qwen2_folder: Path, capsys: Any) -> None:
    write_pairs(Path("train.parquet"), with_labels(24, margin=[1.0, None, -1.0], p_chosen=[0.5]))
    write_pairs(Path("val.parquet"), text_pairs(6))

    def error(*overrides: str) -> str:
        assert main(["train", *settings(qwen2_folder, "no", *overrides)]) == 2
        return capsys.readouterr().err

    assert (
        "data.train_files: objective.name=margin needs a margin of each comparison, and 8 of 24 have none (first: "
        "train.parquet:1); add the column data.margin_key=margin, or responses with scores, or set "
        "objective.name=bradley_terry"
    ) in error("objective.name=margin")
    assert "needs a margin of 0 or more of each comparison, and 16 of 24 have none" in error("objective.name=scaled")
    assert "objective.label_smoothing=0.1 with objective.name=focal: it belongs to soft" in error(
        "objective.name=focal", "objective.label_smoothing=0.1"
    )
    write_pairs(Path("train.parquet"), with_labels(24, margin=[0.0]))
    assert "every margin is 0, so that nothing would be learned; set data.margin_key" in error("objective.name=scaled")
    write_pairs(Path("train.parquet"), with_labels(24, weight=[0.0]))
    assert "every weight is 0, so that nothing would be learned" in error()
    write_pairs(Path("train.parquet"), with_labels(24, p_chosen=[80]))
    assert error("objective.name=soft").rstrip().endswith("outside 0 to 1 (first: train.parquet:0); fix the data")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["margin", "scaled", "soft", "focal", "hinge"])
def test_a_run_of_each_objective_learns(name: str, in_tmp: Path, qwen2_folder: Path, caplog: Any) -> None:
    write_pairs(Path("train.parquet"), with_labels(24, margin=[1.0, 2.0], p_chosen=[0.8]))
    write_pairs(Path("val.parquet"), text_pairs(6))
    with caplog.at_level(logging.INFO):
        run = train(qwen2_folder, "a", f"objective.name={name}", "objective.center_coefficient=0.01", "optim.lr=1e-2",
                    "data.shuffle=false", "trainer.total_epochs=6")  # fmt: skip
    found = [row["train/loss"] for row in rows(run) if "train/loss" in row]
    assert sum(found[-3:]) < sum(found[:3])
    unused = {"margin": "soft labels", "scaled": "soft labels", "soft": "margins"}.get(name, "margins and soft labels")
    assert f"the data carry {unused}, which objective.name={name} does not use" in caplog.text
    if name in ("margin", "scaled", "soft"):
        assert "data.val_files: 6 of 6 comparisons have no" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", "lists"])
def test_regression_approaches_the_scores(layout: str, in_tmp: Path, qwen2_folder: Path) -> None:
    single = [{"prompt": f"Q{i % 6}?", "response": "good " * (i % 4 + 1), "score": i % 4} for i in range(24)]
    lists = [{"prompt": f"Q{i}?", "responses": ["good", "good good good"], "grades": [0, 2]} for i in range(12)]
    write_pairs(Path("train.parquet"), single if layout == "single" else lists)
    write_pairs(Path("val.parquet"), single if layout == "single" else lists)
    column = "score" if layout == "single" else "grades"
    options = ("optim.lr=1e-2", "trainer.val_before_train=true", "trainer.total_epochs=10")
    best = "trainer.save_best_metric=val/loss"
    run = train(qwen2_folder, "a", "objective.name=regression", f"objective.score_column={column}", best, *options)
    found = [row for row in rows(run) if "val/loss" in row]
    assert found[-1]["val/mse"] < 0.5 * found[0]["val/mse"]
    assert ("val/accuracy" in found[-1]) == (layout == "lists")


@pytest.mark.slow
def test_rankings_with_ties_give_the_same_run_for_any_token_budget(in_tmp: Path, qwen2_folder: Path) -> None:
    texts = ["bad", "so so", "good", "good good"]
    found = [{"prompt": f"Q{i}?", "responses": texts, "ranks": [3, 2, 1, 1 + i % 2]} for i in range(8)]
    write_pairs(Path("train.parquet"), found)
    write_pairs(Path("val.parquet"), found)
    losses = []
    for budget in (40, 5000):
        run = train(qwen2_folder, f"b{budget}", "objective.name=plackett_luce", "trainer.total_epochs=3",
                    f"data.max_tokens_per_micro_batch={budget}")  # fmt: skip
        losses.append([row["train/loss"] for row in rows(run) if "train/loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
