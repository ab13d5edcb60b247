"""Runs of objectives with parameters of their own, or their own items: on one rank and on two, resumed, exported."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery.distributed.process_group import World
from tests import forks
from tests.small import write_pairs
from tests.training.objective_steps import KINDS, be_rank, step_of
from tests.training.process_checks import build
from tests.training.rank_runs import Act, Run, run_all
from tests.training.short_runs import assert_same_run, rows, settings

pytestmark = pytest.mark.slow


def rankings(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two to four responses with scores, some of them equal, as often as not to a prompt of an earlier row."""
    draw, found = random.Random(seed), []
    for number in range(count):
        size = draw.randint(2, 4)
        texts = [" ".join(draw.choices(["good", "bad", "so", "very"], k=draw.randint(1, 6))) for _ in range(size)]
        scores = [draw.randrange(3) for _ in texts]
        found.append({"prompt": f"Question {number // 2}?", "responses": texts, "scores": scores})
    return found


def losses(name: str, metric: str = "train/loss") -> list[float]:
    return [row[metric] for row in rows(Path("runs") / name) if metric in row]


def test_a_step_of_each_objective_is_that_of_one_rank_and_one_micro_batch(in_tmp: Path, qwen2_folder: Path) -> None:
    """Two ranks, DDP and FSDP2, in small micro-batches with shared prompts, against one rank that shares nothing."""
    status = forks.finish(forks.ranks(2, be_rank, qwen2_folder, in_tmp / "found", log=in_tmp / "log"))
    assert status == [0, 0], (in_tmp / "log").read_text(errors="replace")[-4000:]
    found = json.loads((in_tmp / "found").read_text())
    alone = World(0, 1, torch.device("cpu"))
    built = build(qwen2_folder, alone, "none")
    for kind in KINDS:
        expected = step_of(built, alone, kind, budget=100_000, share=False)
        assert all(each["loss"] > 0 and each["norm"] > 0 for each in expected), kind
        assert (expected[0]["own"] > 0) == (kind in ("rao_kupper", "davidson", "bins")), kind
        for strategy in ("ddp", "fsdp2"):
            for one, other in zip(found[strategy][kind], expected, strict=True):
                assert one == pytest.approx(other, rel=2e-4, abs=2e-5), (kind, strategy)


def test_a_run_of_two_phases_is_that_of_one_rank_and_resumes_in_either(in_tmp: Path, qwen2_folder: Path) -> None:
    graded = [{"prompt": f"Q{i // 2}?", "response": "good " * (i % 3 + 1), "score": i % 3} for i in range(40)]
    write_pairs(Path("train.parquet"), graded)
    write_pairs(Path("val.parquet"), graded[:12])
    options = (
        "objective.name=regression_then_bt", "objective.bins=3", "trainer.total_epochs=2", "optim.lr=1e-4",
        "model.strategy=fsdp2", "trainer.log_freq=2", "trainer.save_freq=4",
    )  # fmt: skip

    def run(folder: str, *more: str, **of_run: Any) -> Run:
        return Run(settings(qwen2_folder, folder, *options, *more), **of_run)

    stops = [Act(rank=1, step=step, what="SIGTERM") for step in (3, 6)]
    parts = [run("parts", act=act) for act in (*stops, None)]
    done = run_all([run("one", ranks=1), run("two"), *parts], in_tmp)
    assert [set(each.status) for each in done] == [{0}, {0}, {143}, {143}, {0}], "\n".join(each.log for each in done)
    assert "phases  5 steps of regression, then 3 on 20 pairs" in done[1].log
    assert_same_run(Path("runs/parts"), Path("runs/two"), last="global_step_8")
    steps = [row["step"] for row in rows(Path("runs/two")) if "train/loss" in row]
    assert steps == [2, 4, 5, 6, 8], "a log line ends each phase"
    for metric in ("train/loss", "train/accuracy", "train/grad_norm", "train/epoch"):
        assert losses("two", metric) == pytest.approx(losses("one", metric), abs=2e-4), metric


def test_the_threshold_of_ties_is_that_of_one_rank_and_is_resumed_and_exported(
    in_tmp: Path, qwen2_folder: Path
) -> None:
    write_pairs(Path("train.parquet"), rankings(24))
    write_pairs(Path("val.parquet"), rankings(8, seed=1))
    options = ("objective.name=davidson", "objective.threshold_lr=0.05", "trainer.save_freq=2", "optim.lr=1e-4")
    more_options = ("trainer.total_training_steps=6", "model.strategy=fsdp2", "optim.clip_grad=0.3")

    def run(folder: str, *more: str, **of_run: Any) -> Run:
        return Run(settings(qwen2_folder, folder, *options, *more_options, *more), **of_run)

    done = run_all(
        [
            run("one", ranks=1), run("two", "data.max_tokens_per_micro_batch=150"),
            run("parts", "data.max_tokens_per_micro_batch=150", act=Act(rank=1, step=3, what="SIGTERM")),
            run("parts", "data.max_tokens_per_micro_batch=150"),
        ], in_tmp,
    )  # fmt: skip
    assert [set(each.status) for each in done] == [{0}, {0}, {143}, {0}], "\n".join(each.log for each in done)
    assert_same_run(Path("runs/parts"), Path("runs/two"))
    for metric in ("train/loss", "train/threshold", "train/grad_norm", "train/tie_share", "train/accuracy_with_ties"):
        assert losses("two", metric) == pytest.approx(losses("one", metric), abs=2e-5), metric
    thresholds = losses("one", "train/threshold")
    assert len(set(thresholds)) == 6, "it is trained"
    records = [json.loads((Path("runs") / each / "global_step_6/config.json").read_text()) for each in ("two", "parts")]
    found = [each["rm_gallery"]["objective"] for each in records]
    assert found[0] == found[1] and found[0]["name"] == "davidson"
    assert found[0]["threshold"] == pytest.approx(losses("two", "val/threshold")[-1], rel=1e-9)
    assert (
        f"| threshold of the objective | {found[0]['threshold']:.4g} |"
        in Path("runs/two/global_step_6/README.md").read_text()
    )
