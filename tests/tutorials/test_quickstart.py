"""The README's quick start, step by step: it learns, what it learned depends on the prompt, and it shows it."""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rm_gallery.cli import main
from rm_gallery.schema import Comparison, PreferenceGroup
from rm_gallery.scoring import RewardScorer

RECIPE = Path(__file__).parents[2] / "tutorials/cookbooks/training_reward_model/quickstart"
PACKAGE = "tutorials.cookbooks.training_reward_model.quickstart"


def run_steps(top: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Path:
    """The folder `quickstart` after the steps of `make quickstart`, but for the last."""
    monkeypatch.chdir(top)
    monkeypatch.setattr(sys, "argv", ["prepare", "quickstart"])
    runpy.run_module(f"{PACKAGE}.prepare", run_name="__main__")
    assert main(["train", "--config", str(RECIPE / "quickstart.yaml"), *overrides]) == 0
    return top / "quickstart"


def accuracy(scorer: RewardScorer, rows: list[dict[str, object]], prompts: list[object]) -> float:
    """Share of rows whose chosen answer gets the higher reward, each under the prompt given."""
    groups = [
        PreferenceGroup(prompt, [[{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")],
                        (Comparison(0, 1),), "chat")  # type: ignore[arg-type]
        for row, prompt in zip(rows, prompts, strict=True)
    ]  # fmt: skip
    return sum(chosen > rejected for chosen, rejected in scorer.score(groups)) / len(rows)


@pytest.mark.slow
def test_it_learns_what_depends_on_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_steps(tmp_path, monkeypatch)
    scorer = RewardScorer.from_folder(folder / "run/global_step_625", device="cpu")
    rows = pq.read_table(folder / "data/val.parquet").to_pylist()
    prompts = [row["prompt"] for row in rows]
    logged = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][-1]
    assert accuracy(scorer, rows, prompts) == pytest.approx(logged["val/accuracy"]), "scorer and trainer agree"
    assert logged["val/accuracy"] >= 0.90
    random.Random(0).shuffle(prompts)
    assert accuracy(scorer, rows, prompts) < 0.65


@pytest.mark.slow
def test_it_shows_what_it_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_steps(tmp_path, monkeypatch, "trainer.total_training_steps=2")
    monkeypatch.setattr(sys, "argv", ["show", str(folder)])
    runpy.run_module(f"{PACKAGE}.show", run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("P(first is better)") == 2
    assert "rm-gallery train model.partial_pretrain=" in printed
    assert (folder / "run/curves.png").is_file()
