"""The specification's "Launch Training Script" and "Advanced Configuration", as written but for names and counts."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import forks
from tests.small import text_pairs, write_pairs
from tests.spec.text import tab_blocks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def variables(in_tmp: Path, qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a person who has a small model, few pairs, two cores and no GPU."""
    for name, count, seed in (("train", 24, 0), ("test", 10, 1)):
        write_pairs(in_tmp / f"{name}.parquet", text_pairs(count, seed=seed))
    for name in ("NNODES", "NODE_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "MODEL_PATH": str(qwen2_folder),
        "TRAIN_FILE": str(in_tmp / "train.parquet"),
        "VAL_FILE": str(in_tmp / "test.parquet"),
        "SAVE_PATH": str(in_tmp / "checkpoints"),
        "MAX_LENGTH": "128",
        "TRAIN_BATCH_SIZE": "8",
        "TOTAL_EPOCHS": "1",
        "SWANLAB_MODE": "offline",
    }


def start(block: str, variables: dict[str, str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "-e", "-c", block], cwd=ROOT, env={**variables, **more}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(*started: subprocess.Popen[str]) -> list[str]:
    """Outputs, all of status 0."""
    try:
        outputs = [each.communicate(timeout=300)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    for each, output in zip(started, outputs, strict=True):
        assert each.returncode == 0, output[-5000:]
    return outputs


def exchange(block: str, **values: str) -> str:
    """The block with other values for some variables that it exports."""
    for name, value in values.items():
        block, count = re.subn(rf"export {name}=\S+", f"export {name}={value}", block)
        assert count, name
    return block


def last(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: value for row in rows for name, value in row.items() if name.startswith(("train/", "val/"))}


def facts(run: Path) -> dict[str, Any]:
    found = json.loads((run / "run.json").read_text())
    return {name: found[name] for name in ("world_size", "strategy")}


@pytest.mark.slow
def test_launch_training_script(spec: str, variables: dict[str, str], in_tmp: Path) -> None:
    """One machine with two processes, and two machines with one each: the same run."""
    [one] = tab_blocks(spec, "Single-node, multi-GPU", "bash")
    [several] = tab_blocks(spec, "Multi-node setup", "bash")
    master, worker = several.split("# On worker nodes (NODE_RANK=1,2,3...)\n")
    place = one.splitlines()[0]
    assert place.startswith("cd ")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    finish(start(exchange(one, N_GPUS_PER_NODE="2"), variables, EXPERIMENT_NAME="one"))
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NNODES": "2", "N_GPUS_PER_NODE": "1"}
    # Time stamps in the names of runs differ between machines.
    nodes = [(master, "started-0900"), (worker, "started-0901")]
    finish(*(start(f"{place}\n{exchange(part, **values)}", variables, EXPERIMENT_NAME=name) for part, name in nodes))
    runs = in_tmp / "checkpoints"
    assert sorted(run.name for run in runs.iterdir()) == ["one", "started-0900"], "rank 0 tells where to write"
    for name in ("one", "started-0900"):
        assert (runs / name / "global_step_3/model.safetensors").is_file()
        assert facts(runs / name) == {"world_size": 2, "strategy": "fsdp2"}
    assert last(runs / "started-0900") == pytest.approx(last(runs / "one"), rel=1e-3)


RUN_ALL = """
import sys
from rm_gallery.cli import main

for line in open(sys.argv[1]):
    if main(["train", *line.split()]):
        sys.exit(2)
"""


@pytest.mark.slow
def test_advanced_configuration(spec: str, variables: dict[str, str], in_tmp: Path) -> None:
    """Each section's YAML on two processes, and all give the same losses."""
    tabs = {
        "FSDP2 (PyTorch >= 2.4)": "fsdp2",
        "CPU Offloading (Memory-Constrained)": "fsdp2",
        "Gradient Checkpointing (Reduce Memory)": "ddp",
    }
    lines = []
    for number, tab in enumerate(tabs):
        [text] = tab_blocks(spec, tab, "yaml")
        assert set(yaml.safe_load(text)) == {"model"}
        (in_tmp / f"{number}.yaml").write_text(text)
        lines.append(
            f"--config {in_tmp}/{number}.yaml model.partial_pretrain={variables['MODEL_PATH']} optim.lr=1e-4 "
            f"model.fsdp_config.model_dtype=fp32 data.train_files={variables['TRAIN_FILE']} data.max_length=128 "
            f"data.train_batch_size=8 trainer.default_local_dir={in_tmp}/runs trainer.experiment_name={number}\n"
        )
    (in_tmp / "runs.txt").write_text("".join(lines))
    (in_tmp / "run_all.py").write_text(RUN_ALL)
    own = (str(in_tmp / "run_all.py"), str(in_tmp / "runs.txt"))
    log = in_tmp / "log"
    torchrun = forks.torchrun("--standalone", "--nproc_per_node=2", *own, log=log, variables=variables)
    status = forks.finish([torchrun])
    output = log.read_text(errors="replace")
    assert status == [0], output[-5000:]
    assert output.count("offloading has no effect on a CPU: everything is in host memory already") == 1
    runs = [in_tmp / "runs" / str(number) for number in range(len(tabs))]
    assert [facts(run)["strategy"] for run in runs] == list(tabs.values())
    for run in runs[1:]:
        assert last(run) == pytest.approx(last(runs[0]), rel=1e-4)
