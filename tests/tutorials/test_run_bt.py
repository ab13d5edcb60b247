"""run_bt.sh: which settings win, and what it refuses; torchrun and the check are stood in for by a script."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RECIPE = Path(__file__).parents[2] / "tutorials/cookbooks/training_reward_model/bradley_terry"
WORD = "import json, os, sys; open(os.environ['SEEN'], 'a').write(json.dumps([sys.argv[1:], dict(os.environ)]) + '\\n')"


class Seen:
    """What the script called: first the check, then torchrun."""

    def __init__(self, done: subprocess.CompletedProcess[str], file: Path) -> None:
        self.status, self.errors = done.returncode, done.stderr
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        calls = [(arguments, variables) for arguments, variables in calls if arguments[:1] == ["-m"]]
        self.check = calls[0] if calls else ([], {})
        self.launch = calls[1] if len(calls) > 1 else ([], {})

    def option(self, name: str) -> str | None:
        """Of torchrun."""
        return next((text.partition("=")[2] for text in self.launch[0] if text.startswith(f"--{name}=")), None)

    def setting(self, key: str) -> str:
        """The last value that trainer.py gets for a key."""
        return [text.partition("=")[2] for text in self.launch[0] if text.startswith(f"{key}=")][-1]


def run(tmp_path: Path, *arguments: str, script: Path = RECIPE / "run_bt.sh", **variables: str) -> Seen:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{WORD}\n")
    python.chmod(0o755)
    ours = {"PATH": os.environ["PATH"], "PYTHON": str(python), "SEEN": str(tmp_path / "seen"), **variables}
    done = subprocess.run(
        ["bash", str(script), *arguments],
        cwd=tmp_path, env=ours, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return Seen(done, tmp_path / "seen")


def test_alone_it_starts_one_process_on_a_free_port(tmp_path: Path) -> None:
    seen = run(tmp_path, N_GPUS_PER_NODE="3")
    assert seen.status == 0, seen.errors
    assert (seen.option("nnodes"), seen.option("nproc_per_node")) == ("1", "3")
    assert "--standalone" in seen.launch[0] and seen.option("master_port") is None
    assert str(RECIPE / "trainer.py") in seen.launch[0]
    assert int(seen.launch[1]["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 3)


def test_without_a_variable_it_takes_the_active_environment_then_that_of_the_checkout(tmp_path: Path) -> None:
    recipe = tmp_path / "checkout/tutorials/cookbooks/training_reward_model/bradley_terry"
    recipe.mkdir(parents=True)
    script = shutil.copy(RECIPE / "run_bt.sh", recipe)
    for name in ("checkout/.venv", "active"):
        (tmp_path / name / "bin").mkdir(parents=True)
        python = tmp_path / name / "bin/python"
        python.write_text(f'#!/bin/bash\n[ "$1" != -m ] || echo {name} >> {tmp_path}/started\n')
        python.chmod(0o755)
    for variables in ({}, {"VIRTUAL_ENV": str(tmp_path / "active")}):
        subprocess.run(["bash", script], env={"PATH": os.environ["PATH"], **variables}, check=True, timeout=60)
    assert (tmp_path / "started").read_text().split() == ["checkout/.venv"] * 2 + ["active"] * 2, "check and launch"


def test_an_interpreter_without_the_dependencies_is_named_in_a_sentence(tmp_path: Path) -> None:
    python = tmp_path / "bare"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -I -S "$@"\n')  # the standard library only
    python.chmod(0o755)
    seen = run(tmp_path, PYTHON=str(python))
    checkout = RECIPE.parents[3]
    assert seen.status == 2
    assert seen.errors == (
        f"run_bt.sh: error: {python} lacks numpy, torch, transformers, hydra, pydantic, pyarrow; "
        f"activate the environment of RM-Gallery, or run pip install -e {checkout}\n"
    )


def test_a_port_that_is_named_is_taken(tmp_path: Path) -> None:
    seen = run(tmp_path, MASTER_PORT="29611")
    assert (seen.option("master_addr"), seen.option("master_port")) == ("127.0.0.1", "29611")


@pytest.mark.parametrize(
    "variables",
    [
        {"NNODES": "4", "NODE_RANK": "2"},
        {"WORLD_SIZE": "4", "RANK": "2"},
        {"NNODES": "4", "NODE_RANK": "2", "WORLD_SIZE": "32", "RANK": "17"},
    ],
)
def test_both_names_of_nodes_work_and_the_first_wins(variables: dict[str, str], tmp_path: Path) -> None:
    seen = run(tmp_path, MASTER_ADDR="192.168.1.10", MASTER_PORT="29500", N_GPUS_PER_NODE="8", **variables)
    assert [seen.option(name) for name in ("nnodes", "node_rank", "master_addr", "master_port", "nproc_per_node")] == [
        "4", "2", "192.168.1.10", "29500", "8",
    ]  # fmt: skip
    assert not {"RANK", "WORLD_SIZE"} & set(seen.check[1]), "the check is one process"


def test_every_setting_comes_from_the_environment_and_arguments_win(tmp_path: Path) -> None:
    given = {
        "SAVE_PATH": "out", "MODEL_PATH": "m", "TRAIN_FILE": "t", "VAL_FILE": "", "PROJECT_NAME": "p",
        "EXPERIMENT_NAME": "e", "MAX_LENGTH": "7", "MICRO_BATCH_SIZE_PER_GPU": "3", "TRAIN_BATCH_SIZE": "5",
        "LR": "1e-3", "CLIP_GRAD": "4", "TOTAL_EPOCHS": "6", "SAVE_FREQ": "8", "TEST_FREQ": "9", "LOGGER": "console",
        "MAX_RESTARTS": "2",
    }  # fmt: skip
    seen = run(tmp_path, "optim.lr=2e-3", "model.strategy=fsdp2", **given)
    assert seen.status == 0, seen.errors
    assert seen.option("max_restarts") == "2"
    assert {key: seen.setting(key) for key in (
        "trainer.default_local_dir", "model.partial_pretrain", "data.train_files", "data.val_files",
        "trainer.project_name", "trainer.experiment_name", "data.max_length", "data.micro_batch_size_per_gpu",
        "data.train_batch_size", "optim.lr", "optim.clip_grad", "trainer.total_epochs", "trainer.save_freq",
        "trainer.test_freq", "trainer.logger", "model.strategy",
    )} == {
        "trainer.default_local_dir": "out/e", "model.partial_pretrain": "m", "data.train_files": "t",
        "data.val_files": "", "trainer.project_name": "p", "trainer.experiment_name": "e", "data.max_length": "7",
        "data.micro_batch_size_per_gpu": "3", "data.train_batch_size": "5", "optim.lr": "2e-3",
        "optim.clip_grad": "4", "trainer.total_epochs": "6", "trainer.save_freq": "8", "trainer.test_freq": "9",
        "trainer.logger": "console", "model.strategy": "fsdp2",
    }  # fmt: skip
    words = seen.launch[0]
    assert seen.check[0][-len(given) - 1 :] == words[-len(given) - 1 :], "what is checked is what runs"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "four"}, "NNODES=four is not a number"),
        ({"N_GPUS_PER_NODE": "0"}, "NNODES and N_GPUS_PER_NODE must be at least 1"),
        (
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"},
            "NODE_RANK=2 with NNODES=2: nodes count from 0 to 1",
        ),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR, the address of node 0, on every node"),
    ],
)
def test_what_cannot_meet_is_refused_in_a_sentence(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    seen = run(tmp_path, **variables)
    assert (seen.status, seen.errors) == (2, f"run_bt.sh: error: {message}\n")
    assert seen.launch == ([], {})


def test_the_examples_of_schedulers_set_what_the_script_reads() -> None:
    script = (RECIPE / "run_bt.sh").read_text()
    service, job = yaml.safe_load_all((RECIPE / "kubernetes.yaml").read_text())
    spec = job["spec"]
    [container] = spec["template"]["spec"]["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert all(f"${{{name}" in script for name in variables)
    assert spec["completions"] == spec["parallelism"] == int(variables["NNODES"])
    assert int(variables["N_GPUS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    name, subdomain = job["metadata"]["name"], spec["template"]["spec"]["subdomain"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{subdomain}", "the name of pod 0 of an indexed job"
    assert service["metadata"]["name"] == subdomain and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}


@pytest.mark.slow
def test_the_slurm_example_starts_the_script_once_on_each_node(tmp_path: Path) -> None:
    """With stand-ins for srun (two tasks) and scontrol."""
    programs = {
        "scontrol": "echo node7; echo node8",
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "run_bt.sh").write_text(
        'echo "$NODE_RANK/$NNODES $N_GPUS_PER_NODE $MASTER_ADDR:$MASTER_PORT $EXPERIMENT_NAME $*"\n'
    )
    slurm = {
        "SLURM_SUBMIT_DIR": str(recipe), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "120345", "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(RECIPE / "slurm.sbatch"), "optim.lr=1e-6", "model.strategy=fsdp2"],
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **slurm},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        f"{node}/2 4 node7:20345 bt-120345 optim.lr=1e-6 model.strategy=fsdp2" for node in range(2)
    ], done.stderr
