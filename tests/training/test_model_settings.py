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


@pytest.mark.slow
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
        (["model.attention=flash"], "model.attention"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_in_words(
    settings: list[str], message: str, in_tmp: Path, qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(in_tmp / "train.parquet", text_pairs(24))
    assert train(qwen2_folder, "refused", *settings) != 0
    assert message in capsys.readouterr().err


def test_a_head_of_another_trainer_is_kept_and_exported_as_score(
    in_tmp: Path, qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    write_pairs(in_tmp / "train.parquet", text_pairs(8))
    folder = Path(shutil.copytree(qwen2_folder, in_tmp / "trl"))
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.tensor([-0.25])}
    save_file({**load_file(folder / "model.safetensors"), **head}, folder / "model.safetensors")
    assert train(folder, "kept", "optim.lr=1e-12") == 0
    exported = load_file(in_tmp / "runs/kept/global_step_1/model.safetensors")
    torch.testing.assert_close(exported["score.weight"], head["v_head.summary.weight"])
    said = capsys.readouterr().err
    assert f"reward head: loaded from v_head.summary.weight of {folder}; checkpoints have it as score.weight" in said
    assert "its bias of -0.25 is dropped, since checkpoints have none: rewards start 0.25 higher than those of" in said
    assert train(folder, "new", "optim.lr=1e-12", "model.new_head=true") == 0
    said = capsys.readouterr().err
    assert "reward head: newly initialized with trainer.seed=0, which replaces that of the folder" in said
    assert "2 tensors are not read, since the model has no place for them: v_head.summary.bias" in said


def test_a_tokenizer_with_more_tokens_than_rows_needs_a_key(
    in_tmp: Path, qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    write_pairs(in_tmp / "train.parquet", text_pairs(8))
    folder = Path(shutil.copytree(qwen2_folder, in_tmp / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|a|>", "<|b|>", "<|c|>"])
    tokenizer.save_pretrained(folder)
    assert train(folder, "refused") == 2
    assert "the tokenizer has 2 tokens beyond them (ids 264 to 265, first: '<|b|>')" in capsys.readouterr().err
    assert train(folder, "resized", "model.resize_embeddings=true") == 0
    exported = load_file(in_tmp / "runs/resized/global_step_1/model.safetensors")
    assert exported["model.embed_tokens.weight"].shape == (266, 32)
