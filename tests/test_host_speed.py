"""A processor without units for bfloat16 is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rm_gallery.host_speed import bf16_slowdown
from rm_gallery.training import build
from tests.training.short_runs import train, write_data


def test_it_is_a_ratio_of_times() -> None:
    assert 0 < bf16_slowdown() < 10_000


@pytest.mark.parametrize(
    ("dtype", "slowdown", "said"), [("bf16", 8.71, True), ("bf16", 0.3, False), ("fp32", 8.7, False)]
)
def test_a_run_says_which_type_is_faster(
    in_tmp: Path, qwen2_folder: Path, monkeypatch: Any, capsys: Any, dtype: str, slowdown: float, said: bool
) -> None:
    write_data()
    monkeypatch.setattr(build, "bf16_slowdown", lambda: slowdown)
    train(qwen2_folder, "run", f"model.fsdp_config.model_dtype={dtype}", "trainer.total_training_steps=1")
    sentence = "matrices 8.7 times slower in bf16 than in fp32; model.fsdp_config.model_dtype=fp32 trains faster here"
    assert (sentence in capsys.readouterr().err) == said
