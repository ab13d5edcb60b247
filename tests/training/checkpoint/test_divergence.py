"""A run that diverges: no checkpoint of weights that are not finite, and the error names one from before."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.errors import UserError
from rm_gallery.modeling import export
from rm_gallery.training import setup
from rm_gallery.training.checkpoint import Progress, state
from rm_gallery.training.checkpoint.folders import last_good
from rm_gallery.training.checkpoint.save import WeightsFolder
from rm_gallery.training.trainer import Trainer
from tests.small import text_pairs, write_pairs
from tests.training.short_runs import train, write_data

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, harm: Callable[[Trainer], Any]) -> None:
    """Damage the run right after this optimizer step."""
    original = Trainer.train_step

    def train_step(self: Trainer, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if self.progress.step + 1 == step:
            harm(self)
            self.weights.copy_to_model()
        return result

    monkeypatch.setattr(Trainer, "train_step", train_step)


def fill_weight(value: float) -> Callable[[Trainer], Any]:
    return lambda trainer: trainer.parameters[1].data.view(-1)[-1:].fill_(value)


def fill_state(trainer: Trainer) -> None:
    trainer.optimizer.state[trainer.parameters[1]]["exp_avg_sq"].view(-1)[0] = math.inf


def scale_weights(trainer: Trainer) -> None:
    for parameter in trainer.parameters:
        parameter.data.mul_(1e30)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.rpartition("_")[2]) for path in run.glob("*global_step_*"))


@pytest.mark.parametrize(
    ("step", "harm", "what"),
    [
        (4, fill_weight(math.nan), "not finite: network.model."),
        (6, fill_weight(-math.inf), "not finite: network.model."),
        (4, fill_state, "not finite: exp_avg_sq of network.model."),
        (6, scale_weights, "exploded: network.model."),
        (4, fill_weight(7e4), "exploded: network.model."),
    ],
)
def test_weights_that_are_not_finite_are_not_saved(
    step: int, harm: Callable[[Trainer], Any], what: str, qwen2_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Also the last step's, though its loss was finite."""
    after_step(monkeypatch, step, harm)
    run = train(qwen2_folder, "run", "trainer.save_freq=2", "trainer.max_ckpt_to_keep=1", status=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"step {step}: {what}" in error and f"global_step_{step} is not written" in error
    assert error.endswith(f"the last checkpoint from before is {run}/global_step_{step - 2}. Lower optim.lr")
    assert steps(run) == [step - 2]


def test_rewards_that_are_not_finite_are_not_saved(qwen2_folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(state, "MAX_WEIGHT", math.inf)
    after_step(monkeypatch, 6, scale_weights)
    train(qwen2_folder, "run", status=2)
    assert "step 6: not finite: the rewards of the shortest training texts; " in capsys.readouterr().err


def test_skipped_steps_delete_no_earlier_checkpoint_and_the_error_names_it(
    qwen2_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The weights of step 3 are finite, and so are the rewards of short texts, but every later loss is not."""
    monkeypatch.setattr(state, "MAX_WEIGHT", math.inf)
    after_step(monkeypatch, 3, fill_weight(1e38))
    monkeypatch.setattr(WeightsFolder, "expected", lambda self: [0.0] * 8)
    monkeypatch.setattr(WeightsFolder, "check", lambda *arguments: None)
    settings = ("trainer.save_freq=1", "trainer.max_ckpt_to_keep=2", "trainer.max_bad_steps=3")
    run = train(qwen2_folder, "run", *settings, status=2)
    error = capsys.readouterr().err
    assert "step 6: 3 consecutive steps were not finite" in error
    assert f"the last checkpoint from before is {run}/global_step_2. " in error
    assert steps(run) == [2, 3, 4, 5]


def test_a_run_whose_weights_overflow_every_loss_ends_with_status_2(qwen2_folder: Path, capsys: Any) -> None:
    write_pairs(Path("train.parquet"), [{**pair, "weight": 1e38} for pair in text_pairs(24)])
    run = train(qwen2_folder, "run", "data.val_files=null", status=2)
    error = capsys.readouterr().err
    assert "step 6: all 6 steps were skipped: not finite (" in error and "no checkpoint was written" in error
    assert steps(run) == []


def test_a_complete_run_of_skipped_steps_is_no_success(qwen2_folder: Path, monkeypatch: Any, capsys: Any) -> None:
    """Earlier versions saved it."""
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "as_dict", lambda self: {"step": 6, "bad_steps": 6})
        train(qwen2_folder, "run")
    train(qwen2_folder, "run", status=2)
    assert "global_step_6: all 6 steps were skipped: nothing was trained" in capsys.readouterr().err


def checkpoint(step: int, **progress: Any) -> Path:
    state = Path(f"run/global_step_{step}/training_state")
    state.mkdir(parents=True)
    (state / "state.json").write_text(json.dumps({"progress": progress}))
    return state.parent


@pytest.mark.parametrize(
    ("losses", "before", "good"),
    [
        ([(0.7, None), (0.6, None), (0.5, None)], 9, 3),
        ([(0.7, None), (0.6, None), (0.5, None)], 3, 2),  # the update of step 3 is the one that failed
        ([(0.7, None), (5.0, None)], 9, 2),  # a batch of a few hard pairs
        ([(0.7, None), (5e8, None), (0.6, None)], 9, 3),
        ([(0.7, 0.7), (0.6, 0.6), (0.5, 1e8)], 9, 2),
        ([(0.7, 0.7), (0.6, math.nan), (math.inf, 0.6)], 9, 1),
        ([(3e5, None), (2e5, None), (9e9, None)], 9, 2),  # with large weights every loss is large
        ([(0.5, None)], 1, 1),  # better than none
        ([(math.nan, None)], 9, None),
        ([("x", []), (None, "y")], 9, 2),  # of earlier versions, or edited: no losses to judge by
        ([], 9, None),
    ],
)
def test_the_newest_checkpoint_from_before_the_losses_grew_is_named(
    losses: list[tuple[Any, Any]], before: int, good: int | None
) -> None:
    found = [
        checkpoint(step, last_loss=loss, last_val={"val/loss": val} if val is not None else {})
        for step, (loss, val) in enumerate(losses, start=1)
    ]
    assert last_good(found, before) == (None if good is None else Path(f"run/global_step_{good}"))


def test_a_validation_that_is_not_finite_is_never_the_best_and_is_reported(
    qwen2_folder: Path, monkeypatch: Any, caplog: Any
) -> None:
    progress = Progress(step=1)
    metrics = {"val/loss": math.nan, "val/accuracy": 0.9}
    assert not progress.note_best(metrics)
    monkeypatch.setattr(setup, "validate", lambda *_, **__: dict(metrics))
    with caplog.at_level(logging.WARNING):
        run = train(qwen2_folder, "run", "trainer.save_best=true", "trainer.test_freq=2")
    assert "step 2: val/loss is nan: some validation text has no finite reward" in caplog.text
    assert steps(run) == [6] and not (run / "best.json").exists()


def test_the_best_checkpoint_is_named_again_after_a_kill(qwen2_folder: Path) -> None:
    settings = ("trainer.save_best=true", "trainer.test_freq=2")
    run = train(qwen2_folder, "run", *settings)
    named = (run / "best.json").read_text()
    (run / "best.json").unlink()
    train(qwen2_folder, "run", *settings)
    assert (run / "best.json").read_text() == named


@pytest.mark.parametrize(("found", "differs"), [(1.0, False), (1.1, True), (math.nan, True), (math.inf, True)])
def test_rewards_that_are_not_finite_differ(found: float, differs: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(export, "_float32_bytes", lambda folder: 0)
    monkeypatch.setattr(export, "rescore", lambda folder, texts: [found])
    if not differs:
        export.check_rewards(Path("folder"), [[1]], [1.0], exact=True)
        return
    with pytest.raises(UserError, match="the reloaded model gives text 0 the reward"):
        export.check_rewards(Path("folder"), [[1]], [1.0], exact=True)
