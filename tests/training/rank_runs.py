"""Runs of several processes, one after the other or at once."""

from __future__ import annotations

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import forks


@dataclass(frozen=True)
class Act:
    """What a rank does right after the update of a step: SIGTERM or SIGKILL to itself, or "hang"."""

    rank: int
    step: int
    what: str


@dataclass(frozen=True)
class Run:
    arguments: list[str]
    """Of `rm-gallery train`."""
    ranks: int = 2
    act: Act | None = None
    gradients: Path | None = None
    """Where those of the first step are written."""
    copy: tuple[str, str] | None = None
    """A run folder that is copied before: from, to."""


@dataclass(frozen=True)
class Ended:
    status: list[int]
    """By rank."""
    log: str
    seconds: float | None
    """From the act until the last rank ended."""


def run_all(runs: list[Run], folder: Path, *, at_once: bool = False) -> list[Ended]:
    with ThreadPoolExecutor(len(runs) if at_once else 1) as pool:
        return list(pool.map(_run, runs, [folder / f"run{number}" for number in range(len(runs))]))


def _run(run: Run, own: Path) -> Ended:
    log, acted = own.with_suffix(".log"), own.with_suffix(".acted")
    if run.copy:
        shutil.copytree(*run.copy)
    status = forks.finish(forks.ranks(run.ranks, be_rank, run, acted, log=log))
    seconds = time.time() - float(acted.read_text()) if acted.exists() else None
    return Ended(status, log.read_text(errors="replace"), seconds)


def be_rank(run: Run, acted: Path) -> int:
    """What a forked process does."""
    from rm_gallery import config
    from rm_gallery.cli import main
    from tests.training.short_runs import compose_plainly

    config.compose = compose_plainly
    rank = int(os.environ["RANK"])
    if run.act and run.act.rank == rank:
        what = run.act.what
        after_step(run.act.step, lambda: do(what, acted))
    if run.gradients:
        keep_gradients(rank, run.gradients)
    return main(["train", *run.arguments])


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
