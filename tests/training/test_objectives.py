"""Runs of the objectives: labels that are missing or unused, options of other objectives, one run of each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.cli import main
from tests.small import text_pairs, write_pairs
from tests.training.short_runs import rows, settings, train


def with_labels(count: int, **labels: Any) -> list[dict[str, Any]]:
    return [
        {**row, **{key: value[number % len(value)] for key, value in labels.items()}}
        for number, row in enumerate(text_pairs(count))
    ]


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
