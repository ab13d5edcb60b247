"""`rm-gallery find-lr`: the suggestion follows its rule, every optimizer is tested, and nothing is left behind."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from rm_gallery.cli import main
from rm_gallery.training.find_lr import RangeTest, as_text, find_lr
from tests.training.short_runs import settings, train, write_data


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


def curve(steps: int = 80, *, low: float | None = 1e-3, noise: float = 0.005) -> RangeTest:
    """Losses from 1e-6 to 1 that are lowest at a rate, or flat."""
    draw = random.Random(0)
    rates = [10 ** (-6 + 6 * step / (steps - 1)) for step in range(steps)]
    losses = [0.69 if low is None else 0.49 + 0.05 * (math.log10(rate / low)) ** 2 for rate in rates]
    return RangeTest(rates, [min(each, 0.75) + draw.gauss(0, noise) for each in losses], diverged=False)


def test_the_suggestion_is_a_tenth_of_the_rate_at_the_lowest_loss() -> None:
    rate, reason = curve().suggestion()
    assert rate == pytest.approx(1e-4, rel=0.5) and "a tenth of the learning rate at the lowest smoothed loss" in reason
    text = as_text(curve())
    assert max(map(len, text.splitlines())) <= 80 and text.isascii()
    assert f"optim.lr={rate:.1e}" in text and all(mark in text for mark in (".", "#", "|", "1e-6", "1e-3", "1e0"))


def test_a_curve_that_shows_no_rate_gives_none_and_says_why() -> None:
    for test, message in (
        (curve(low=None), "less than it varies from step to step"),
        (curve(low=10), "the loss still falls at the highest learning rate: raise --to"),
        (curve(steps=10), "only 10 steps until the loss diverged: lower --from"),
    ):
        rate, reason = test.suggestion()
        assert rate is None and message in reason
        assert "no suggestion" in as_text(test)


@pytest.mark.slow
def test_the_command_plots_and_leaves_nothing_behind(qwen2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    command = ["find-lr", "--steps", "30", "--from", "1e-5", "--to", "10", *settings(qwen2_folder, "run")]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "loss (. each step, # smoothed, | suggestion) over the learning rate" in shown.out
    assert "optim.lr=" in shown.out or "no suggestion" in shown.out
    assert "no validation data" not in shown.err
    assert sorted(Path().rglob("*")) == before
    assert main(["find-lr", "--steps", "3", *settings(qwen2_folder, "run")]) == 2
    assert "needs 0 < from < to, and 20 steps" in capsys.readouterr().err


@pytest.mark.slow
def test_its_steps_are_those_of_training(qwen2_folder: Path) -> None:
    """With the rate of a constant schedule; the first loss is that of training at any rate."""
    from rm_gallery.training.config import load_config
    from tests.training.short_runs import rows

    lr = 1e-4
    run = train(qwen2_folder, "run", "optim.lr_scheduler=constant", f"optim.lr={lr}", "trainer.total_training_steps=20")
    config = load_config(None, settings(qwen2_folder, "other"))
    test = find_lr(config, low=lr, high=lr * (1 + 1e-9), steps=20)
    expected = [row["train/loss"] for row in rows(run) if "train/loss" in row]
    assert test.losses == pytest.approx(expected, abs=1e-6) and test.rates == pytest.approx([lr] * 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("optim.name=adamw_8bit", "objective.name=hinge"),
        ("optim.name=muon",),
        ("optim.name=adafactor", "model.lora.rank=4", "model.fsdp_config.model_dtype=bf16"),
    ],
)
def test_every_optimizer_is_tested_until_it_diverges(qwen2_folder: Path, options: tuple[str, ...]) -> None:
    from rm_gallery.training.config import load_config

    test = find_lr(load_config(None, settings(qwen2_folder, "run", *options)), low=1e-6, high=1e3, steps=40)
    assert test.rates[0] == pytest.approx(1e-6) and len(test.rates) == len(test.losses) <= 40
    assert test.rates[1] / test.rates[0] == pytest.approx(10 ** (9 / 39))
    assert test.diverged == (len(test.losses) < 40)
    assert as_text(test)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_the_picture_is_written(qwen2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["find-lr", "--steps", "20", "--png", "lr.png", *settings(qwen2_folder, "run")]) == 0
    assert Path("lr.png").read_bytes().startswith(b"\x89PNG") and "picture: lr.png" in capsys.readouterr().out
    assert main(["find-lr", "--steps", "20", "--png", "none/lr.png", *settings(qwen2_folder, "run")]) == 2
    assert "no such folder; give another --png" in capsys.readouterr().err
