"""`model.heads`: several heads on one backbone; the reward is their mean, from training to scoring."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery import RewardScorer
from rm_gallery.cli import main
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.modeling.export import rescore
from rm_gallery.objectives import OBJECTIVES
from rm_gallery.objectives.heads import Heads
from tests.small import make_model, random_groups, text_pairs
from tests.training.rank_runs import Run, run_all
from tests.training.short_runs import rows, settings, train, write_data

HEADS = "model.heads=3"
NAMES = ["head_1", "head_2", "head_3"]
LAST = "global_step_6"


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


@pytest.mark.parametrize("name", ["bradley_terry", "davidson", "plackett_luce"])
def test_the_loss_is_the_mean_over_the_heads_and_metrics_are_of_the_mean_reward(name: str) -> None:
    batch = collate(random_groups(0))
    rewards = torch.randn(len(batch.reward_index), 3, dtype=torch.float64, requires_grad=True)
    own = OBJECTIVES[name]
    loss, sums = Heads(own)(rewards, batch)
    expected = [own(rewards[:, head], batch)[0].item() for head in range(3)]
    assert loss.item() == pytest.approx(statistics.mean(expected)) and sums["loss"].item() == pytest.approx(loss.item())
    of_mean = own(rewards.detach().mean(dim=1), batch)[1]
    assert {key: sums[key] for key in of_mean if key != "loss"} == {k: v for k, v in of_mean.items() if k != "loss"}
    margins = (rewards[batch.better] - rewards[batch.worse]).tolist()
    assert sums["margin_std"].item() == pytest.approx(sum(map(statistics.pstdev, margins)))
    empty = collate([])
    assert Heads(own)(torch.zeros(0, requires_grad=True), empty)[1].keys() == sums.keys()


def outputs_of(folder: Path, **options: Any) -> list[dict[str, float]]:
    texts = [row["chosen"] for row in text_pairs(6)]
    with RewardScorer.from_folder(folder, device="cpu", **options) as scorer:
        return [row for [row] in scorer.score_attributes([scorer.build_group(None, [text]) for text in texts])]


def check(folder: Path, count: int = 3) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == NAMES[:count]
    assert config["rm_gallery"]["attribute_weights"] == pytest.approx([1 / count] * count)
    for row in outputs_of(folder):
        heads = [row[name] for name in NAMES[:count]]
        assert row["reward"] == pytest.approx(statistics.mean(heads), abs=1e-5)
        assert row["std"] == pytest.approx(statistics.pstdev(heads), abs=1e-5) and row["std"] > 1e-4


@pytest.mark.slow
def test_heads_are_trained_exported_and_scored(qwen2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(qwen2_folder, "run", HEADS)
    check(run / LAST)
    with RewardScorer.from_folder(run / LAST, device="cpu") as scorer:
        ids = [scorer.engine.tokenizer(row["chosen"])["input_ids"] for row in text_pairs(6)]
        pairs = scorer.score_pairs([(row["chosen"], row["rejected"]) for row in text_pairs(10, seed=1)])
    found = [[row[name] for name in NAMES] for row in outputs_of(run / LAST)]
    assert [each for row in found for each in row] == pytest.approx(rescore(run / LAST, ids), abs=1e-4)
    val = next(row for row in reversed(rows(run)) if "val/loss" in row)
    assert val["val/accuracy"] == statistics.mean(chosen > rejected for chosen, rejected in pairs)
    assert val["val/margin_std"] > 0
    card = (run / LAST / "README.md").read_text()
    assert "A reward model with 3 reward heads on one backbone" in card and "bradley-terry" in card
    command = ["score", "--model", str(run), "val.parquet", "--output", "out.jsonl", "--device", "cpu"]
    assert main(command) == 0
    row = json.loads(Path("out.jsonl").read_text().splitlines()[0])
    assert {"reward_chosen", "reward_chosen_head_1", "reward_rejected_std"} <= row.keys()
    again = train(run / LAST, "again", HEADS, "trainer.total_training_steps=1", "optim.lr=1e-30") / "global_step_1"
    assert [row["reward"] for row in outputs_of(again)] == pytest.approx(
        [row["reward"] for row in outputs_of(run / LAST)], abs=1e-5
    )
    capsys.readouterr()
    assert main(["train", *settings(run / LAST, "other", "model.heads=2")]) == 2
    assert "a reward head of 3 outputs (head_1, head_2, head_3), but" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [("bert", ()), ("qwen2", ("model.lora.rank=4",))])
def test_encoders_and_adapters_have_heads(in_tmp: Path, kind: str, options: tuple[str, ...]) -> None:
    check(train(make_model(kind, in_tmp / "base"), "run", "model.heads=2", *options) / LAST, 2)


@pytest.mark.slow
def test_two_ranks_train_what_one_does(qwen2_folder: Path, in_tmp: Path) -> None:
    more = (HEADS, "optim.lr=1e-4")
    done = run_all(
        [
            Run(settings(qwen2_folder, "one", *more), ranks=1),
            Run(settings(qwen2_folder, "two", *more, "model.strategy=fsdp2", "data.max_tokens_per_micro_batch=100")),
        ],
        in_tmp,
    )
    assert [set(each.status) for each in done] == [{0}, {0}], "\n".join(each.log for each in done)
    for ours, theirs in zip(rows(Path("runs/two")), rows(Path("runs/one")), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)


def test_settings_that_have_no_heads_are_refused(qwen2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("objective.name=regression",), "model.heads=3 with objective.name=regression"),
        (("model.head_init=zero",), "the heads would be equal"),
        (("model.heads=0",), "model.heads"),
        (("trainer.reward_statistics=normalize",), "with 3 outputs: other programs have one mean"),
    ):
        assert main(["validate-config", *settings(qwen2_folder, "run", HEADS, *more)]) == 2
        assert message in capsys.readouterr().err
