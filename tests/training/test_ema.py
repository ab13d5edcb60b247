"""`trainer.ema_decay`: the average of the weights is exact, saved, resumed, validated, exported, and changes no run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rm_gallery import RewardScorer
from rm_gallery.cli import main
from rm_gallery.files import check_manifest
from rm_gallery.modeling.export import read_statistics
from rm_gallery.modeling.parallel.ema import AveragedWeights
from rm_gallery.modeling.parallel.master_weights import MasterWeights
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.planning.config import load_estimate_config
from rm_gallery.planning.estimate import estimate
from rm_gallery.training.metric_names import as_average, of_average
from tests.small import text_pairs
from tests.training.rank_runs import Act, Run, run_all
from tests.training.short_runs import Lost, assert_same_run, lose, rows, settings, train, when_logged, write_data

DECAY = 0.8
EMA = (f"trainer.ema_decay={DECAY}",)
LAST = "global_step_6"


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def recursion(first: Mapping[str, Tensor], later: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The average after these steps, by its definition, in float64."""
    average = {name: each.double() for name, each in first.items()}
    for count, state in enumerate(later):
        decay = min(DECAY, (1 + count) / (10 + count))
        average = {name: decay * each + (1 - decay) * state[name].double() for name, each in average.items()}
    return average


def metrics_of(run: Path, start: str) -> list[dict[str, float]]:
    """Of each step, without the average's or with them alone."""
    found = [{name: row[name] for name in row if name.startswith(start)} for row in rows(run)]
    return [each for each in found if each]


@pytest.mark.parametrize(
    ("dtype", "has_masters"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
)
def test_the_average_follows_its_definition_and_gives_the_weights_back(
    qwen2_folder: Path, dtype: torch.dtype, has_masters: bool
) -> None:
    model = load_reward_model(str(qwen2_folder)).model
    trained = MasterWeights(model, dtype, has_masters=has_masters)
    trained.copy_to_model()
    ema = AveragedWeights(trained, DECAY)
    first = {name: each.detach().clone() for name, each in trained.named_parameters()}
    later = []
    for step in range(3):
        with torch.no_grad():
            for _, each in trained.named_parameters():
                each.add_(0.01 * torch.randn(each.shape, generator=torch.Generator().manual_seed(step)))
        trained.copy_to_model()
        ema.update(step)
        later.append({name: each.detach().clone() for name, each in trained.named_parameters()})
    expected = recursion(first, later)
    average = {name: each.clone() for name, each in ema.tensors.items()}
    for name, found in average.items():
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected[name], rtol=0, atol=1e-6)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with ema.applied():
        for name, each in model.named_parameters():
            assert torch.equal(each, average[name].to(each.dtype))
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(torch.equal(each, average[name]) for name, each in ema.tensors.items())


@pytest.mark.slow
def test_a_run_with_it_is_the_same_run_and_each_checkpoint_holds_the_average(qwen2_folder: Path) -> None:
    options = ("trainer.save_freq=1", "trainer.test_freq=3")
    plain, run = train(qwen2_folder, "plain", *options), train(qwen2_folder, "run", *options, *EMA)
    assert metrics_of(run, "train/") == metrics_of(plain, "train/")
    states = [weights(run / f"global_step_{step}") for step in range(1, 7)]
    assert all(torch.equal(each, weights(plain / LAST)[name]) for name, each in states[-1].items())
    for name, each in weights(run / LAST / "ema").items():
        if name in (first := weights(qwen2_folder)):  # not the head, which is new
            assert torch.allclose(each.double(), recursion({name: first[name]}, states)[name], rtol=0, atol=1e-6)
    found = metrics_of(run, "val/ema/")[-1]
    assert found.keys() == as_average(metrics_of(plain, "val/")[-1]).keys()
    assert of_average(metrics_of(run, "val/")[-1])["val/accuracy"] == found["val/ema/accuracy"]
    pairs = text_pairs(10, seed=1)
    with RewardScorer.from_folder(run / LAST / "ema", device="cpu") as scorer:
        scores = scorer.score_pairs([{"chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs])
    margins = [chosen - rejected for chosen, rejected in scores]
    assert found["val/ema/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert read_statistics(run / LAST / "ema") == (found["val/ema/reward_mean"], found["val/ema/reward_std"])
    assert check_manifest(run / LAST) is None and check_manifest(run / LAST / "ema") is None
    assert "exponential moving average over the steps, decay 0.8" in (run / LAST / "ema/README.md").read_text()
    assert "exponential" not in (run / LAST / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("trainer.async_save=true",), ("model.fsdp_config.model_dtype=bf16", "model.lora.rank=4")]
)
def test_a_killed_run_resumes_the_average_bit_for_bit(
    qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    more = ("trainer.save_freq=2", "trainer.test_freq=3", "trainer.save_best=true", *EMA, *options)
    more += ("trainer.save_best_metric=val/ema/loss",)
    whole = train(qwen2_folder, "whole", *more)
    with monkeypatch.context() as patch, pytest.raises(Lost):
        when_logged(patch, 5, lose)
        train(qwen2_folder, "parts", *more)
    parts = train(qwen2_folder, "parts", *more)
    assert_same_run(parts, whole)
    assert_same_run(parts, whole, f"{LAST}/ema")
    assert json.loads((parts / "best.json").read_text()).keys() == {"checkpoint", "step", "val/ema/loss"}


@pytest.mark.slow
def test_two_ranks_average_what_one_does(qwen2_folder: Path, in_tmp: Path) -> None:
    more = (*EMA, "optim.lr=1e-4", "trainer.test_freq=2", "trainer.save_freq=2")
    sharded = (*more, "model.strategy=fsdp2")
    done = run_all(
        [
            Run(settings(qwen2_folder, "one", *more), ranks=1),
            Run(settings(qwen2_folder, "ddp", *more, "model.strategy=ddp")),
            Run(settings(qwen2_folder, "fsdp2", *sharded)),
            Run(settings(qwen2_folder, "parts", *sharded), act=Act(rank=1, step=3, what="SIGTERM")),
            Run(settings(qwen2_folder, "parts", *sharded)),
        ],
        in_tmp,
    )
    assert [set(each.status) for each in done] == [{0}, {0}, {0}, {143}, {0}], "\n".join(each.log for each in done)
    one, ddp, fsdp2, parts = (Path("runs") / name for name in ("one", "ddp", "fsdp2", "parts"))
    expected = weights(one / LAST / "ema")
    for run in (ddp, fsdp2):
        for ours, theirs in zip(metrics_of(run, "val/"), metrics_of(one, "val/"), strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5)
        found = weights(run / LAST / "ema")
        assert all(torch.allclose(each, expected[name], rtol=0, atol=1e-5) for name, each in found.items())
    assert_same_run(parts, fsdp2, f"{LAST}/ema")
    assert_same_run(parts, fsdp2)


@pytest.mark.slow
def test_an_average_begins_at_the_checkpoint_that_has_none(
    qwen2_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(qwen2_folder, "first", "trainer.save_freq=5")
    run = train(qwen2_folder, "second", f"trainer.resume_mode={first}/global_step_5", *EMA)
    assert "has no average of weights: that of trainer.ema_decay starts at this step" in caplog.text
    start, end = weights(first / "global_step_5"), weights(run / LAST)
    decay = min(DECAY, 6 / 15)
    for name, each in weights(run / LAST / "ema").items():
        assert torch.allclose(each, decay * start[name] + (1 - decay) * end[name], rtol=0, atol=1e-6)
    back = train(qwen2_folder, "third", f"trainer.resume_mode={run}/{LAST}", "trainer.total_epochs=2")
    assert not (back / LAST / "ema").exists()


def test_names_of_sets_and_metrics_are_checked(qwen2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("trainer.eval_sets={ema: val.parquet}", *EMA), "ema names metrics of the average; rename the set"),
        (("trainer.save_best_metric=val/ema/accuracy",), "validation has no such metric"),
        (("trainer.ema_decay=1",), "trainer.ema_decay"),
    ):
        assert main(["validate-config", *settings(qwen2_folder, "run", *more)]) == 2
        assert message in capsys.readouterr().err
    sets = ("trainer.eval_sets={math: val.parquet}", "trainer.save_best_metric=val/math.ema/accuracy", *EMA)
    assert main(["validate-config", *settings(qwen2_folder, "run", *sets)]) == 0


@pytest.mark.slow
def test_estimate_counts_its_memory() -> None:
    plain, with_ema = (
        estimate(load_estimate_config(None, ["model=qwen2.5-0.5b", "n_gpus=1", *more])) for more in ((), EMA)
    )
    trained = plain.shape.trained_parameters
    assert with_ema.memory.average - plain.memory.average == pytest.approx(4 * trained)
