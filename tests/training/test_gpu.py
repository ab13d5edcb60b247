"""Training on one GPU; each test has a sibling on the CPU in test_runs.py and test_exactness.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rm_gallery.cli import main
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.modeling.reward_model import load_reward_model
from tests.small import random_groups, text_pairs, write_pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; test_runs.py is the CPU sibling"),
]


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
