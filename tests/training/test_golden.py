"""A stored loss curve: 50 steps on fixed data. A refactor must reproduce it.

After a deliberate change of the computation: `python -m tests.training.test_golden` writes it anew, and the change log
says why.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from rm_gallery.cli import main
from tests.small import chat_pairs, make_model, write_pairs

CURVE = Path(__file__).with_name("golden_curve.json")


def train(folder: Path) -> list[float]:
    """Loss of each step of a run that shuffles, packs, clips, warms up and decays."""
    write_pairs(folder / "train.parquet", chat_pairs(60))
    model = make_model("qwen2", folder / "model")
    status = main(
        [
            "train",
            f"model.partial_pretrain={model}",
            "model.fsdp_config.model_dtype=fp32",
            f"data.train_files={folder / 'train.parquet'}",
            "data.max_length=128",
            "data.train_batch_size=8",
            "data.max_tokens_per_micro_batch=512",
            "optim.lr=1e-4",
            "optim.weight_decay=0.1",
            "optim.warmup_steps_ratio=0.1",
            "trainer.total_training_steps=50",
            "trainer.device=cpu",
            f"trainer.default_local_dir={folder / 'run'}",
            "trainer.experiment_name=bt",
        ]
    )
    assert status == 0
    lines = (folder / "run/bt/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def test_the_loss_curve_is_the_stored_one(tmp_path: Path) -> None:
    stored = json.loads(CURVE.read_text(encoding="utf-8"))
    assert stored[-1] < stored[0], "the stored run learned something"
    assert train(tmp_path) == pytest.approx(stored, abs=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        CURVE.write_text(json.dumps(train(Path(name))) + "\n", encoding="utf-8")
