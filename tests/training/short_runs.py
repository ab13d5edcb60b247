"""Small training runs that can be stopped after any step, and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from rm_gallery.cli import main
from rm_gallery.config import compose, text_keys_of
from rm_gallery.objectives.bradley_terry import BradleyTerry
from rm_gallery.training.trackers.base import JsonLines
from tests.small import text_pairs, write_pairs

NOT_COMPARED = (
    "time", "perf/pairs_per_second", "perf/conversations_per_second", "perf/tokens_per_second", "perf/step_seconds",
)  # fmt: skip


def settings(model: Path, name: str, *overrides: str) -> list[str]:
    """A float32 run of 6 steps on train.parquet (24 pairs) in runs/NAME, with validation on val.parquet."""
    values = {
        "model.partial_pretrain": str(model),
        "model.fsdp_config.model_dtype": "fp32",
        "data.train_files": "train.parquet",
        "data.val_files": "val.parquet",
        "data.max_length": "128",
        "data.train_batch_size": "8",
        "data.max_tokens_per_micro_batch": "300",
        "optim.lr": "1e-3",
        "trainer.total_epochs": "2",
        "trainer.default_local_dir": "runs",
        "trainer.experiment_name": name,
        "trainer.logger": "[]",
        "trainer.device": "cpu",
    }
    values.update(override.split("=", 1) for override in overrides)
    return [f"{key}={value}" for key, value in values.items()]


def compose_plainly(kind: type, file: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """As `rm_gallery.config.compose` for overrides without Hydra's grammar; Hydra takes 0.15 s."""
    if file is not None:
        return compose(kind, file, overrides)
    text_keys = text_keys_of(kind)
    values: dict[str, Any] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, name = key.split(".")
        section = values
        for each in sections:
            section = section.setdefault(each, {})
        is_text = key in text_keys and value not in ("", "null") and not re.match(r"\[|{[^%{]", value)
        section[name] = value if is_text else yaml.safe_load(value)
    return values


def write_data() -> None:
    """24 training and 10 validation pairs in the working directory."""
    write_pairs(Path("train.parquet"), text_pairs(24))
    write_pairs(Path("val.parquet"), text_pairs(10, seed=1))


def train(model: Path, name: str, *overrides: str, status: int = 0) -> Path:
    """Run it; returns the run folder."""
    assert main(["train", *settings(model, name, *overrides)]) == status
    return Path("runs") / name


def when_logged(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None], *, val: bool = False) -> None:
    """Do something once, right after the training (or validation) row of a step was written."""
    original, done = JsonLines.log, list[int]()

    def log(self: JsonLines, metrics: Any, at: int) -> None:
        original(self, metrics, at)
        if at == step and not done and any(name.startswith("val/" if val else "train/") for name in metrics):
            done.append(step)
            action()

    monkeypatch.setattr(JsonLines, "log", log)


@dataclass(frozen=True)
class StandIn(BradleyTerry):
    """The Bradley-Terry objective with another function from rewards and a batch to the loss and metric sums."""

    function: Callable[..., Any] = lambda *_: None

    def __call__(self, rewards: Any, batch: Any) -> Any:
        return self.function(rewards, batch)


class Lost(BaseException):
    """What ends a run at once, as SIGKILL does, but for this process."""


def lose() -> None:
    raise Lost


def send(number: signal.Signals) -> Callable[[], None]:
    """A signal to this process."""
    return lambda: os.kill(os.getpid(), number)


def rows(run: Path) -> list[dict[str, Any]]:
    """Every row of metrics.jsonl but times and rates."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in NOT_COMPARED} for line in lines]


def weights(folder: Path) -> dict[str, Any]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def assert_same_run(found: Path, expected: Path, last: str = "global_step_6") -> None:
    """The same metrics row by row, and the same weights bit for bit."""
    assert rows(found) == rows(expected)
    ours, theirs = weights(found / last), weights(expected / last)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
