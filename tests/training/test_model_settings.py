"""Settings of how the model runs: none changes the loss curve, and those that cannot run here say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rm_gallery.cli import main
from tests.small import text_pairs, write_pairs


def train(model: Path, name: str, *settings: str) -> int:
    return main(
        [
            "train",
            f"model.partial_pretrain={model}",
            "model.fsdp_config.model_dtype=fp32",
            "trainer.device=cpu",
            "data.train_files=train.parquet",
            "data.max_length=128",
            "data.train_batch_size=8",
            "optim.lr=1e-4",
            "trainer.default_local_dir=runs",
            f"trainer.experiment_name={name}",
            *settings,
        ]
    )


def losses(name: str) -> list[float]:
    lines = (Path("runs") / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def test_kernels_and_recomputation_give_one_loss_curve(in_tmp: Path, qwen2_folder: Path) -> None:
    write_pairs(in_tmp / "train.parquet", text_pairs(24))
    choices = {
        "plain": ["model.attention=plain"],
        "sdpa": ["model.attention=sdpa"],
        "full": ["model.enable_gradient_checkpointing=true"],
        "selective": ["model.enable_gradient_checkpointing=true", "model.checkpointing_mode=selective"],
        "liger": ["model.use_liger=true"],
    }
    for name, settings in choices.items():
        assert train(qwen2_folder, name, *settings) == 0
    for name in choices:
        assert losses(name) == pytest.approx(losses("plain"), abs=1e-6), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.attention=varlen"], "model.attention=varlen: it needs a GPU; set auto"),
        (["model.attention=flex"], "model.attention=flex: it needs a GPU; set auto"),
        (["model.attention=plain", "model.dropout=0.1"], "attention=plain: it does not support attention dropout"),
        (["model.attention=flash"], "model.attention"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_in_words(
    settings: list[str], message: str, in_tmp: Path, qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(in_tmp / "train.parquet", text_pairs(24))
    assert train(qwen2_folder, "refused", *settings) != 0
    assert message in capsys.readouterr().err
