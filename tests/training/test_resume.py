"""A run that was stopped and started again is the run that was never stopped, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.small import text_pairs, write_pairs
from tests.training.short_runs import assert_same_run, send, train, when_logged


@pytest.fixture
def data(in_tmp: Path) -> Path:
    write_pairs(in_tmp / "train.parquet", text_pairs(24))
    write_pairs(in_tmp / "val.parquet", text_pairs(10, seed=1))
    return in_tmp


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_stopped_after_any_step_and_started_again(
    stop_after: int, data: Path, qwen2_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    same = ("trainer.test_freq=2", "trainer.log_freq=1", "optim.warmup_steps_ratio=0.3")
    whole = train(qwen2_folder, "whole", *same)
    when_logged(monkeypatch, stop_after, send(signal.SIGTERM))
    parts = train(qwen2_folder, "parts", *same, status=143)
    assert (
        f"stopped by SIGTERM after step {stop_after} of 6; global_step_{stop_after} is saved" in capsys.readouterr().err
    )
    train(qwen2_folder, "parts", *same)
    assert_same_run(parts, whole)
