"""Runs of several processes one after the other, by forking one process that has loaded torch: that takes longest.

    python rank_runs.py RUNS.json

RUNS.json lists runs: {"ranks": 2, "arguments": [of `rm-gallery train`], "log": FILE} with, if wanted,
"act": {"rank": 1, "step": 3, "what": "SIGTERM" | "SIGKILL" | "hang"}, done right after the update of that step,
"gradients": FILE for those of the first step, and "copy": [FROM, TO], a run folder that is copied before. Adds to each
run "status" by rank, and "seconds" by rank since the act.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def run_all(runs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run them in a process of its own, with the working directory of this one; they come back with their outcome."""
    path = folder / "runs.json"
    for number, run in enumerate(runs):
        run["log"] = str(folder / f"run{number}.log")
    path.write_text(json.dumps(runs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True, timeout=280)
    done: list[dict[str, Any]] = json.loads(path.read_text())
    return done


def log_of(run: dict[str, Any]) -> str:
    return Path(run["log"]).read_text(errors="replace")


def fork_ranks(run: dict[str, Any]) -> None:
    """Start the processes of one run, and wait for all of them."""
    if "copy" in run:
        shutil.copytree(*run["copy"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    acted = Path(run["log"] + ".acted")
    children = {}
    for rank in range(run["ranks"]):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run["ranks"]))
            os.environ.update(LOCAL_WORLD_SIZE=str(run["ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            be_rank(rank, run, acted)
        children[child] = rank
    run["status"], run["seconds"] = [None] * run["ranks"], [None] * run["ranks"]
    for _ in range(run["ranks"]):
        child, status = os.wait()
        rank = children[child]
        run["status"][rank] = os.waitstatus_to_exitcode(status)
        if acted.exists():
            run["seconds"][rank] = time.time() - float(acted.read_text())


def be_rank(rank: int, run: dict[str, Any], acted: Path) -> None:
    """What a forked process does; it does not come back."""
    from rm_gallery.cli import main

    output = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    act = run.get("act")
    if act and act["rank"] == rank:
        after_step(act["step"], lambda: do(act["what"], acted))
    if run.get("gradients"):
        keep_gradients(rank, Path(run["gradients"]))
    status = 1
    try:
        status = main(["train", *run["arguments"]])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def after_step(step: int, action: Any) -> None:
    from rm_gallery.training.trainer import Trainer

    original = Trainer.train_step

    def train_step(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if self.progress.step + 1 == step:
            action()
        return result

    Trainer.train_step = train_step  # type: ignore[method-assign]


def do(what: str, acted: Path) -> None:
    acted.write_text(str(time.time()))
    if what == "hang":
        time.sleep(600)
    os.kill(os.getpid(), signal.Signals[what])


def keep_gradients(rank: int, path: Path) -> None:
    """Write the gradients of the first step that this process makes, whole."""
    from rm_gallery.training.trainer import Trainer

    original, first = Trainer.train_step, [True]

    def train_step(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if first.pop() if first else False:
            found = {name: p.grad for name, p in self.weights.named_parameters() if p.grad is not None}
            whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
            if rank == 0:
                torch.save(whole, path)
        return result

    Trainer.train_step = train_step  # type: ignore[method-assign]


def main_of_runs(path: Path) -> None:
    from rm_gallery.training import build

    assert build  # loaded before the forks
    runs = json.loads(path.read_text())
    for run in runs:
        fork_ranks(run)
        path.write_text(json.dumps(runs))


if __name__ == "__main__":
    main_of_runs(Path(sys.argv[1]))
