"""Runs of `objective.name=attributes`: exported outputs, scoring, continuing, adapters, encoders, several processes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery import RewardScorer
from rm_gallery.cli import main
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.errors import UserError
from rm_gallery.modeling.export import rescore
from tests.scoring.models import make_checkpoint
from tests.small import make_model, write_pairs
from tests.training.rank_runs import Run, run_all
from tests.training.short_runs import rows, settings, train

NAMES = ("helpfulness", "verbosity", "coherence")
SETTINGS = ("objective.name=attributes", "model.attributes=[helpfulness, verbosity, coherence]")
WEIGHTS = "model.attribute_weights={helpfulness: 0.5, coherence: -1.0}"
CHAT = [{"role": "user", "content": "Question 1?"}, {"role": "assistant", "content": "good good bad"}]


def rated_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """One or two rated responses to each prompt; verbosity is not always known, coherence is in an object."""
    draw, found = random.Random(seed), []
    for number in range(count):
        for _ in range(2 if number % 3 else 1):
            good, long = draw.randint(0, 4), draw.randint(0, 4)
            row = {"prompt": f"Question {number}?", "response": "good " * good + "bad " * (4 - good) + "so " * long}
            numbers = {"helpfulness": good, "verbosity": None if number % 5 == 0 else long}
            found.append({**row, **numbers, "attributes": {"coherence": 4.0 - good}})
    return found


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_pairs(Path("train.parquet"), rated_rows(12, 0))
    write_pairs(Path("val.parquet"), rated_rows(6, 1))


def last(run: Path) -> Path:
    return max(run.glob("global_step_*"), key=lambda path: int(path.name.rpartition("_")[2]))


def outputs_of(scorer: RewardScorer) -> dict[str, float]:
    [[found]] = scorer.score_attributes([scorer.build_group(CHAT[:1], [CHAT[1:]])])
    return found


@pytest.mark.slow
def test_outputs_have_names_and_their_weighted_sum_is_the_reward(qwen2_folder: Path) -> None:
    folder = last(train(qwen2_folder, "a", *SETTINGS, WEIGHTS))
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "helpfulness", "1": "verbosity", "2": "coherence"}
    assert config["problem_type"] == "regression"
    scorer = RewardScorer.from_folder(folder, device="cpu")
    found = outputs_of(scorer)
    ids = scorer.engine.tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert [found[name] for name in NAMES] == pytest.approx(rescore(folder, [ids]), abs=1e-4)
    reward = 0.5 * found["helpfulness"] - found["coherence"]
    assert found["reward"] == pytest.approx(reward, abs=1e-5)
    assert OpenAIChatModel(str(folder), is_local=True, device="cpu").chat(CHAT).parsed == {"reward": found["reward"]}
    other = RewardScorer.from_folder(folder, device="cpu", weights={"verbosity": 2.0})
    assert outputs_of(other)["reward"] == pytest.approx(2 * found["verbosity"], abs=1e-5)
    with pytest.raises(
        UserError, match=r"the model has no attribute 'length'; it has helpfulness, verbosity, coherence"
    ):
        RewardScorer.from_folder(folder, device="cpu", weights={"length": 1.0})
    command = ["score", "--model", str(folder), "val.parquet", "--output", "out.jsonl", "--device", "cpu"]
    assert main([*command, "--weights", "verbosity=1"]) == 0
    scored = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert all(
        row["reward"] == row["reward_verbosity"] and {f"reward_{name}" for name in NAMES} <= set(row) for row in scored
    )


@pytest.mark.slow
def test_evaluate_takes_weights_of_the_outputs(qwen2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = last(train(qwen2_folder, "a", *SETTINGS, WEIGHTS))
    pairs = [{"prompt": f"why {n}", "chosen": f"because {n}", "rejected": "no " * n} for n in range(1, 9)]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in pairs))
    plain = ["evaluate", "pairs.jsonl", "--no-probes", "--no-baselines", "--device", "cpu", "--json", "out.json"]
    command = [*plain, "--model", str(folder)]
    scorer = RewardScorer.from_folder(folder, device="cpu", weights={"verbosity": 2.0, "coherence": -1.0})
    groups = [scorer.build_group(row["prompt"], [row["chosen"], row["rejected"]]) for row in pairs]
    expected = [better - worse for better, worse in scorer.score(groups)]
    assert main([*command, "--weights", "verbosity=2, coherence=-1"]) == 0
    [model] = json.loads(Path("out.json").read_text())["models"]
    assert model["weights"] == {"helpfulness": 0.0, "verbosity": 2.0, "coherence": -1.0}
    assert model["sets"][0]["mean_margin"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    capsys.readouterr()
    other = make_checkpoint("qwen2", Path("other"), style="chat", seed=1)[0]
    for model_folder, weights, sentence in (
        (folder, "length=1", f"--weights: model={folder}: weights: the model has no attribute 'length'; it has"),
        (other, "length=1", "weights are for models with attributes, and none is named"),
        (folder, "verbosity", "argument --weights: 'verbosity': must be NAME=NUMBER,..., e.g. helpfulness=0.65"),
        (folder, "verbosity=1,verbosity=2", "has a name twice; give it once"),
    ):
        try:
            assert main([*plain, "--model", str(model_folder), "--weights", weights]) == 2
        except SystemExit as stopped:
            assert stopped.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "lora"])
def test_adapters_and_encoders_give_the_outputs_of_the_trainer(kind: str, tmp_path: Path) -> None:
    """The check of the checkpoint compares them with those of plain transformers (and peft)."""
    model = make_model("bert" if kind == "bert" else "qwen2", tmp_path / "model")
    options = ("model.lora.rank=4", "trainer.export_dtype=fp32") if kind == "lora" else ()
    folder = last(train(model, "a", *SETTINGS, WEIGHTS, *options))
    found = outputs_of(RewardScorer.from_folder(folder, device="cpu"))
    assert found["reward"] == pytest.approx(0.5 * found["helpfulness"] - found["coherence"], abs=1e-5)
    if kind == "lora":
        assert main(["merge", str(folder), "--output", "merged"]) == 0
        assert outputs_of(RewardScorer.from_folder("merged", device="cpu")) == pytest.approx(found, abs=1e-4)
    continued = train(folder, "b", *SETTINGS, "trainer.val_before_train=true")
    [before] = [row for row in rows(continued) if row["step"] == 0]
    [after] = [row for row in rows(folder.parent) if "val/loss" in row]
    assert before["val/loss"] == pytest.approx(after["val/loss"], abs=1e-4), "it starts where the first run ended"


def test_other_names_than_those_of_the_folder_are_refused(
    qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*overrides: str) -> str:
        assert main(["train", *settings(qwen2_folder, "no", *overrides)]) == 2
        return capsys.readouterr().err

    assert "objective.name=bradley_terry with model.attributes=['helpfulness']" in error(
        "model.attributes=[helpfulness]"
    )
    assert "name the columns, e.g. model.attributes=[helpfulness]" in error("objective.name=attributes")
    other = error("objective.name=attributes", "model.attributes=[helpfulness, length]")
    assert "no column 'length' of model.attributes" in other
    weights = error(*SETTINGS, "model.attribute_weights={length: 1.0}")
    assert "model.attribute_weights={'length': 1.0}: 'length' is not in model.attributes" in weights


@pytest.mark.slow
def test_other_outputs_than_those_of_the_folder_are_refused(
    qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = last(train(qwen2_folder, "a", *SETTINGS))
    renamed = ("objective.name=attributes", "model.attributes=[helpfulness, coherence, verbosity]")
    assert main(["train", *settings(folder, "b", *renamed)]) == 2
    assert (
        "a reward head of 3 outputs (helpfulness, verbosity, coherence), but model.attributes are"
        in capsys.readouterr().err
    )
    assert main(["train", *settings(folder, "b")]) == 2
    assert "a classifier with 3 labels, but a reward model has one" in capsys.readouterr().err


@pytest.mark.slow
def test_results_do_not_depend_on_micro_batches_sharing_and_ranks(qwen2_folder: Path, in_tmp: Path) -> None:
    same = (*SETTINGS, "optim.lr=1e-4")
    variants = {
        "whole": (1, "data.max_tokens_per_micro_batch=100000"), "small": (1, "data.max_tokens_per_micro_batch=130"),
        "apart": (1, "data.share_prompts=false"), "ddp": (2, "model.strategy=ddp"),
        "fsdp2": (2, "model.strategy=fsdp2"),
    }  # fmt: skip
    runs = [Run(settings(qwen2_folder, name, *same, each), ranks=ranks) for name, (ranks, each) in variants.items()]
    done = run_all(runs, in_tmp)
    assert all(set(each.status) == {0} for each in done), "\n".join(each.log for each in done)
    found = {name: [{key: value for key, value in row.items() if "/" in key} for row in rows(Path("runs") / name)]
             for name in variants}  # fmt: skip
    for name in variants:
        for row, expected in zip(found[name], found["whole"], strict=True):
            assert row == pytest.approx(expected, abs=1e-4, rel=1e-3), name
    assert torch.isfinite(torch.tensor(found["whole"][-1]["val/loss"]))
