"""Strategies on GPUs; each test has a sibling on the CPU in test_strategies.py, test_processes.py and test_fsdp.py.

Started by torchrun on two GPUs; offloading on one as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small import text_pairs, write_pairs

ROOT = Path(__file__).parents[2]
OFFLOAD = "model.fsdp_config.cpu_offload=true"
CASES = {
    "ddp": ["model.strategy=ddp"],
    "fsdp2": ["model.strategy=fsdp2"],
    "fsdp2-offload": ["model.strategy=fsdp2", OFFLOAD],
    "optimizer-offload": ["model.strategy=fsdp2", "model.fsdp_config.optimizer_offload=true"],
    "checkpointing": ["model.strategy=fsdp2", "model.enable_gradient_checkpointing=true"],
}
pytestmark = pytest.mark.gpu


def losses(folder: Path, model: Path, name: str, processes: int, *settings: str) -> list[float]:
    """The loss curve of a run on so many GPUs."""
    arguments = [
        f"model.partial_pretrain={model}", "model.fsdp_config.model_dtype=fp32", "data.max_length=128",
        f"data.train_files={folder / 'train.parquet'}", "data.train_batch_size=7", "optim.lr=1e-4",
        "data.max_tokens_per_micro_batch=512", "trainer.device=cuda", f"trainer.default_local_dir={folder}",
        f"trainer.experiment_name={name}", *settings,
    ]  # fmt: skip
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "rm_gallery.cli"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "train", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_a_strategy_on_gpus_follows_one_gpu(case: str, qwen2_folder: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs; test_strategies.py is the sibling on the CPU")
    write_pairs(tmp_path / "train.parquet", text_pairs(40))
    one = losses(tmp_path, qwen2_folder, "one", 1)
    assert losses(tmp_path, qwen2_folder, case, 2, *CASES[case]) == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("setting", [OFFLOAD, "model.fsdp_config.optimizer_offload=true"])
def test_one_gpu_offloads(setting: str, qwen2_folder: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "train.parquet", text_pairs(24))
    one = losses(tmp_path, qwen2_folder, "one", 1)
    assert losses(tmp_path, qwen2_folder, "offload", 1, setting) == pytest.approx(one, abs=1e-4)
