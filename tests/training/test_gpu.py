"""Training on one GPU; each test has a sibling on the CPU in test_runs.py and test_exactness.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check.training import syncs_forbidden
from rm_gallery.cli import main
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.modeling.reward_model import load_reward_model
from tests.small import random_groups, text_pairs, write_pairs

pytestmark = pytest.mark.gpu


def test_rewards_on_the_gpu_equal_those_on_the_cpu(qwen2_folder: Path) -> None:
    model = load_reward_model(str(qwen2_folder)).model
    batch = collate(random_groups(0))
    with torch.no_grad():
        on_cpu = model(batch)
        on_gpu = model.cuda()(batch.to(torch.device("cuda"))).cpu()
    torch.testing.assert_close(on_cpu, on_gpu, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_on_the_gpu_follows_the_run_on_the_cpu(dtype: str, in_tmp: Path, qwen2_folder: Path) -> None:
    write_pairs(in_tmp / "train.parquet", text_pairs(24))
    curves = []
    for device in ("cpu", "cuda"):
        arguments = [
            f"model.partial_pretrain={qwen2_folder}", f"model.fsdp_config.model_dtype={dtype}", "data.max_length=128",
            "data.train_files=train.parquet", "data.train_batch_size=8", "optim.lr=1e-4", f"trainer.device={device}",
            "trainer.default_local_dir=runs", f"trainer.experiment_name={device}",
        ]  # fmt: skip
        assert main(["train", *arguments]) == 0
        lines = (in_tmp / "runs" / device / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["train/loss"] for line in lines])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4 if dtype == "fp32" else 0.05)


def curve(model: Path, name: str, *settings: str) -> list[float]:
    """Losses of twelve steps on the GPU, in the working directory."""
    write_pairs(Path("train.parquet"), text_pairs(96))
    arguments = [
        f"model.partial_pretrain={model}", "data.max_length=128", "data.train_files=train.parquet", "optim.lr=1e-4",
        "data.train_batch_size=8", "data.max_tokens_per_micro_batch=256", "trainer.device=cuda",
        "trainer.default_local_dir=runs", f"trainer.experiment_name={name}", *settings,
    ]  # fmt: skip
    assert main(["train", *arguments]) == 0
    lines = (Path("runs") / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


SETTINGS = {
    "compile": ["model.compile=true"],
    "liger": ["model.use_liger=true"],
    "full checkpointing": ["model.enable_gradient_checkpointing=true"],
    "selective checkpointing": ["model.enable_gradient_checkpointing=true", "model.checkpointing_mode=selective"],
    "flex": ["model.attention=flex"],
    "optimizer offload": ["model.fsdp_config.optimizer_offload=true"],
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_does_not_change_the_curve(setting: str, dtype: str, in_tmp: Path, qwen2_folder: Path) -> None:
    if setting == "liger":
        pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    same = f"model.fsdp_config.model_dtype={dtype}"
    plain = curve(qwen2_folder, "plain", same)
    assert curve(qwen2_folder, "other", same, *SETTINGS[setting]) == pytest.approx(
        plain, abs=1e-4 if dtype == "fp32" else 0.02
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(dtype: str, in_tmp: Path, qwen2_folder: Path) -> None:
    same = [f"model.fsdp_config.model_dtype={dtype}", "trainer.save_freq=6", "model.dropout=0.1"]
    same += ["optim.lr_scheduler=constant"]
    whole = curve(qwen2_folder, "whole", *same)
    first = curve(qwen2_folder, "parts", *same, "trainer.total_training_steps=6")
    both = curve(qwen2_folder, "parts", *same)
    assert both == first + both[len(first) :] == whole
    files = [Path("runs") / name / "global_step_12" / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_step_waits_for_the_gpu_once(in_tmp: Path, qwen2_folder: Path) -> None:
    """Nothing between the first micro-batch and the sum of gradients waits, once kernels are loaded."""
    with syncs_forbidden(after=2) as watched:
        curve(qwen2_folder, "run")
    assert len(watched) == 10
