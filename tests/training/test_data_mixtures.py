"""Training on several sources: weights decide how often a pair is used, and validation is told by source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.cli import main
from tests.small import text_pairs, write_pairs


def train(model: Path, *words: str, run: str = "out/bt") -> tuple[dict[str, Any], list[dict[str, float]]]:
    """run.json, and the rows of metrics.jsonl."""
    assert main(["train", f"model.partial_pretrain={model}", "data.max_length=128", "data.train_batch_size=4",
                 "trainer.default_local_dir=out", "trainer.experiment_name=bt", "model.fsdp_config.model_dtype=fp32",
                 *words]) == 0  # fmt: skip
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return json.loads(Path(run, "run.json").read_text()), rows


def test_a_weight_is_how_often_a_pair_is_used_in_an_epoch(in_tmp: Path, qwen2_folder: Path) -> None:
    write_pairs(in_tmp / "a.parquet", text_pairs(8))
    write_pairs(in_tmp / "b.parquet", text_pairs(8, seed=1))
    write_pairs(in_tmp / "c.parquet", text_pairs(8, seed=2))
    files = "data.train_files=[a.parquet,{path: b.parquet, weight: 2},{path: c.parquet, weight: 0.5}]"
    facts, _ = train(qwen2_folder, files)
    assert facts["total_steps"] == (8 + 16 + 4) / 4


def test_validation_is_told_by_source(in_tmp: Path, qwen2_folder: Path) -> None:
    write_pairs(in_tmp / "a.parquet", text_pairs(8))
    by_row = [{**row, "source": "web" if number % 4 else "forum"} for number, row in enumerate(text_pairs(12, seed=3))]
    write_pairs(in_tmp / "val.parquet", by_row)
    _, rows = train(qwen2_folder, "data.train_files=a.parquet", "data.val_files=val.parquet")
    last = next(row for row in reversed(rows) if "val/accuracy" in row)
    parts = {name: last[f"val/accuracy/{name}"] for name in ("web", "forum")}
    assert last["val/accuracy"] == pytest.approx((9 * parts["web"] + 3 * parts["forum"]) / 12)
    assert last["val/loss"] == pytest.approx((9 * last["val/loss/web"] + 3 * last["val/loss/forum"]) / 12)


def test_margins_and_soft_labels_are_said_to_be_unused(
    in_tmp: Path, qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(in_tmp / "a.parquet", [{**row, "margin": 1.5, "p_chosen": 0.75} for row in text_pairs(8)])
    train(qwen2_folder, "data.train_files=a.parquet")
    printed = capsys.readouterr().err
    assert printed.count("the data carry margins and soft labels, which objective.name=bradley_terry does not use") == 1


def test_a_weight_of_a_row_multiplies_its_loss(in_tmp: Path, qwen2_folder: Path) -> None:
    rows = text_pairs(8)
    write_pairs(in_tmp / "a.parquet", rows)
    write_pairs(in_tmp / "b.parquet", [{**row, "weight": 3.0} for row in rows])
    norms = []
    for name in ("a", "b"):
        words = [f"data.train_files={name}.parquet", f"trainer.experiment_name={name}", "data.train_batch_size=8"]
        _, metrics = train(qwen2_folder, *words, "optim.clip_grad=0", run=f"out/{name}")
        norms.append(metrics[0]["train/grad_norm"])
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-4)
