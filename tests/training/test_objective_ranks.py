"""Runs of objectives with parameters of their own, or their own items: on one rank and on two, resumed, exported."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.small import write_pairs
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


@pytest.mark.parametrize("name", ["rao_kupper", "davidson"])
def test_the_threshold_of_ties_is_that_of_one_rank_and_is_resumed_and_exported(
    name: str, in_tmp: Path, qwen2_folder: Path
) -> None:
    write_pairs(Path("train.parquet"), rankings(24))
    write_pairs(Path("val.parquet"), rankings(8, seed=1))
    strategy = "fsdp2" if name == "davidson" else "ddp"
    options = (f"objective.name={name}", "objective.threshold_lr=0.05", "trainer.save_freq=2", "optim.lr=1e-4")
    more_options = ("trainer.total_training_steps=6", f"model.strategy={strategy}", "optim.clip_grad=0.3")

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
    assert found[0] == found[1] and found[0]["name"] == name
    assert found[0]["threshold"] == pytest.approx(losses("two", "val/threshold")[-1], rel=1e-9)
    assert (
        f"| threshold of the objective | {found[0]['threshold']:.4g} |"
        in Path("runs/two/global_step_6/README.md").read_text()
    )
