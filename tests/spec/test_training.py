"""The specification's sections on data, configuration, script, metrics and schedules, run as written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rm_gallery.cli import main
from tests.small import text_pairs, write_pairs
from tests.spec.text import code_blocks, tab_blocks

RECIPE = Path(__file__).parents[2] / "tutorials/cookbooks/training_reward_model/bradley_terry"
SIZES = ["data.max_length=128", "data.train_batch_size=8"]


@pytest.fixture
def folder(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the data files of the specification's YAML, and trackers that stay offline."""
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_pairs(in_tmp / "data/train.parquet", text_pairs(24))
    write_pairs(in_tmp / "data/test.parquet", text_pairs(10, seed=1))
    return in_tmp


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_required_structure(spec: str, folder: Path, qwen2_folder: Path) -> None:
    row = eval(code_blocks(spec, "Required Structure", "python")[0])
    assert set(row) == {"chosen", "rejected"}
    write_pairs(folder / "spec.parquet", [row] * 4)
    arguments = [f"model.partial_pretrain={qwen2_folder}", "data.train_files=spec.parquet", "data.max_length=512"]
    assert main(["train", *arguments, "trainer.default_local_dir=out"]) == 0
    assert list(folder.glob("out/*/global_step_1/model.safetensors"))


def test_configuration_file(spec: str, folder: Path, qwen2_folder: Path) -> None:
    [text] = code_blocks(spec, "1. Configuration", "yaml")
    (folder / "trainer.yaml").write_text(text)
    assert main(["train", "--config", "trainer.yaml", f"model.partial_pretrain={qwen2_folder}", *SIZES]) == 0
    run = folder / "checkpoints/bt/qwen2.5-7b-bt"
    assert (run / "global_step_9").is_dir(), "3 epochs of 24 pairs in batches of 8"
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    for section, values in yaml.safe_load(text).items():
        for key, value in values.items():
            if key not in ("partial_pretrain", "max_length", "train_batch_size"):
                found = resolved[section][key]
                wanted = float(value) if key == "lr" else value
                assert found == wanted or (isinstance(value, dict) and value.items() <= found.items()), key


def test_recipe_file_sets_every_key_of_the_specification(spec: str) -> None:
    theirs = yaml.safe_load(code_blocks(spec, "1. Configuration", "yaml")[0])
    ours = yaml.safe_load((RECIPE / "trainer.yaml").read_text())
    for section, values in theirs.items():
        assert set(values) <= set(ours[section])


def run_script(script: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(RECIPE.parents[3])}
    environment |= {"PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_script_configuration(spec: str, folder: Path, qwen2_folder: Path) -> None:
    """The specification's own script, with names and sizes exchanged, beside our trainer.py and trainer.yaml."""
    [script] = code_blocks(spec, "Training Script (run_bt.sh)", "bash")
    for name, value in (
        ("MODEL_PATH", qwen2_folder),
        ("TRAIN_FILE", "data/train.parquet"),
        ("VAL_FILE", "data/test.parquet"),
        ("MASTER_PORT", "29613"),
    ):
        script, count = re.subn(rf"^{name}=.*$", f"{name}={value}", script, flags=re.MULTILINE)
        assert count == 1
    script = script.replace("data.max_length=4096", SIZES[0]).replace("data.train_batch_size=256", SIZES[1])
    (folder / "run_bt.sh").write_text(script)
    for name in ("trainer.py", "trainer.yaml"):
        shutil.copy(RECIPE / name, folder)
    done = run_script(folder / "run_bt.sh", folder, N_GPUS_PER_NODE="1")
    assert done.returncode == 0, done.stderr
    [run] = (folder / "checkpoints/bt").iterdir()
    assert re.fullmatch(r"qwen2.5-7b-bt-\d{4}T\d{4}", run.name), "the run folder does not repeat the experiment's name"
    assert (run / "global_step_9/config.json").is_file()
    assert not (folder / "outputs").exists(), "Hydra writes nothing of its own"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "data",
        "run_bt.sh",
        "trainer.py",
        "trainer.yaml",
    }


@pytest.mark.slow
def test_our_script_checks_the_configuration_first(folder: Path) -> None:
    done = run_script(
        RECIPE / "run_bt.sh", folder, MODEL_PATH="./nowhere", TRAIN_FILE="data/train.parquet", VAL_FILE=""
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"rm-gallery: error: model.partial_pretrain=./nowhere: no such folder (working directory {folder})"
    ]


@pytest.mark.slow
def test_metrics_have_the_names_of_the_specification(spec: str, folder: Path, qwen2_folder: Path) -> None:
    names = re.findall(r"^- \*\*((?:train|val)/\w+)\*\*", spec, re.MULTILINE)
    assert len(names) == 5
    [block] = code_blocks(spec, "Logging to WandB/SwanLab", "bash")
    overrides = [shlex.split(line)[0] for line in block.splitlines() if line and not line.startswith("#")]
    assert len(overrides) == 3
    files = ["data.train_files=data/train.parquet", "data.val_files=data/test.parquet"]
    assert main(["train", f"model.partial_pretrain={qwen2_folder}", *files, *SIZES, *overrides]) == 0
    logged = {name for row in metrics(folder / "checkpoints/bt/qwen-bt-run1") for name in row}
    assert set(names) <= logged
    assert list((folder / "checkpoints/bt/qwen-bt-run1/wandb").rglob("*.wandb")), "wandb ran, offline"


@pytest.mark.parametrize(
    "name", ["cosine", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wsd", "constant"))]
)
def test_learning_rate_schedulers(spec: str, name: str, folder: Path, qwen2_folder: Path) -> None:
    [text] = tab_blocks(spec, "Learning Rate Schedulers", "yaml")
    (folder / "schedule.yaml").write_text(text.replace("cosine", name))
    files = ["data.train_files=data/train.parquet", "trainer.total_training_steps=40",
             "trainer.default_local_dir=out", "trainer.experiment_name=bt"]  # fmt: skip
    arguments = [f"model.partial_pretrain={qwen2_folder}", *files, *SIZES, "data.train_batch_size=1", "optim.lr=1e-3"]
    assert main(["train", "--config", "schedule.yaml", *arguments]) == 0
    rates = [row["train/lr"] for row in metrics(folder / "out/bt")]
    assert len(rates) == 40
    assert rates[0] < rates[1] < rates[2] == max(rates) == pytest.approx(1e-3), "two of 40 steps warm up"
    if name == "constant":
        assert set(rates[2:]) == {1e-3}
    elif name == "wsd":
        assert set(rates[2:36]) == {1e-3} and rates[37:] == sorted(rates[37:], reverse=True) and rates[-1] < 5e-4
    else:
        assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 1e-5
