"""`trainer.early_stopping_patience` with the metrics of every objective, and with metrics that a validation lacks."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.training.checkpoint.state import Progress
from rm_gallery.training.metric_names import parse_metric
from tests.small import write_pairs
from tests.training.short_runs import rows, settings, train
from tests.training.test_attributes import rated_rows
from tests.training.test_objective_ranks import rankings

STOPS = ("trainer.early_stopping_patience=2", "trainer.test_freq=1", "trainer.total_training_steps=8")


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": " ".join(draw.choices(["good", "bad", "so"], k=4))},
            ]
        }
        for number in range(count)
    ]


def write(kind: str) -> None:
    made: Any = {"rankings": rankings, "rated": rated_rows, "chats": conversations}[kind]
    for name, count, seed in (("train", 24, 0), ("val", 8, 1)):
        found = made(count, seed)
        if kind == "rated":
            found = [{**row, "score": row["helpfulness"]} for row in found]
        write_pairs(Path(f"{name}.parquet"), found)


OBJECTIVES = {
    "bradley_terry": ("rankings", ()), "davidson": ("rankings", ("objective.threshold_lr=1e-30",)),
    "regression": ("rated", ()), "attributes": ("rated", ("model.attributes=[helpfulness, verbosity]",)),
    "sft": ("chats", ()),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_stops_by_any_of_its_metrics(
    in_tmp: Path, qwen2_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """With a learning rate that changes nothing no validation is better than the first one."""
    kind, more = OBJECTIVES[name]
    write(kind)
    options = (f"objective.name={name}", "optim.lr=1e-30", *STOPS, *more)
    run = train(qwen2_folder, "default", *options)
    assert (run / "global_step_3").is_dir() and not (run / "global_step_8").exists()
    validation = next(row for row in rows(run) if any(key.startswith("val/") for key in row))
    assert train(qwen2_folder, "unknown", *options, "trainer.save_best_metric=val/none", status=2)
    known = re.search(r"It has (.*)", capsys.readouterr().err)
    assert known
    for metric in known[1].split(", "):
        assert metric in validation, "what is offered exists"
        assert (parsed := parse_metric(metric)) and parsed.direction
    metric = known[1].split(", ")[-1]
    run = train(qwen2_folder, "last", *options, f"trainer.save_best_metric={metric}")
    assert (run / "global_step_3").is_dir() and not (run / "global_step_8").exists(), metric


@pytest.mark.slow
def test_the_first_of_two_phases_does_not_stop_a_run(in_tmp: Path, qwen2_folder: Path) -> None:
    write("rated")
    more = ("objective.name=regression_then_bt", "objective.regression_steps=5", "optim.lr=1e-30", *STOPS)
    run = train(qwen2_folder, "run", *more, "trainer.total_training_steps=20")
    assert (run / "global_step_8").is_dir() and not (run / "global_step_20").exists()


@pytest.mark.slow
def test_a_validation_without_the_metric_stops_nothing(
    in_tmp: Path, qwen2_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores of single responses have no pairs, and so no accuracy."""
    rows_of = [{"prompt": f"Question {n}?", "response": "good " * (n % 5), "score": n % 5} for n in range(24)]
    write_pairs(Path("train.parquet"), rows_of)
    write_pairs(Path("val.parquet"), rows_of[:5])
    run = train(qwen2_folder, "run", "objective.name=regression", *STOPS)
    assert (run / "global_step_8").is_dir()
    assert "this validation has no val/accuracy, so it is not compared with others" in caplog.text
    assert "trainer.save_best_metric to one of val/loss, val/mse" in caplog.text


def test_the_best_value_and_the_count_follow_the_direction_of_the_metric() -> None:
    for metric, values, count in (
        ("val/loss", (0.7, 0.6, 0.65, 0.6), 2), ("val/accuracy", (0.5, 0.6, 0.55, 0.6), 2),
        ("val/mse", (1, 2, 3), 2), ("val/perplexity", (3, 2, 1), 0), ("val/token_accuracy", (0.1, 0.3, 0.2), 1),
        ("val/tie_log_likelihood", (-3, -2, -2.5), 1), ("val/ema/margin", (1, float("nan"), 2), 0),
    ):  # fmt: skip
        progress = Progress(best_metric=metric)
        for value in values:
            progress.count_validation({metric: float(value)})
        assert progress.validations_since_highest == count, metric
    assert json.loads(json.dumps(progress.as_dict()))["best_metric"] == "val/ema/margin"


def test_sft_has_no_accuracy_of_pairs(in_tmp: Path, qwen2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rm_gallery.cli import main

    write("chats")
    options = settings(qwen2_folder, "run", "objective.name=sft", *STOPS, "trainer.save_best_metric=val/accuracy")
    assert main(["validate-config", *options]) == 2
    assert "It has val/loss, val/perplexity, val/token_accuracy" in capsys.readouterr().err
