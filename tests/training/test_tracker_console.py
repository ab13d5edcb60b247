"""The console tracker: lines to search, a bar on a terminal, the closing table."""

from __future__ import annotations

import io
import logging
import math
import re
import sys
from pathlib import Path

import pytest

from rm_gallery.training.trackers.console import ConsoleTracker, closing_table
from tests.training.tracker_runs import FakeTerminal, make_run


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_console(tmp_path: Path, total_steps: int) -> tuple[ConsoleTracker, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return ConsoleTracker(make_run(tmp_path, total_steps=total_steps), stream=stream, clock=clock), stream, clock


def test_console_lines_are_plain_and_carry_the_time_left(tmp_path: Path) -> None:
    console, stream, clock = plain_console(tmp_path, total_steps=300)
    metrics = {"perf/pairs_per_second": 45.12, "train/grad_norm": 1.234, "train/epoch": 0.1, "train/loss": 0.69314}
    for step in (1, 2, 3):
        clock.now += 40 if step == 1 else 4
        console.log(metrics, step)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/300  loss 0.6931  45 pairs/s  eta 3:19:20"
    # The first step, which compiles, no longer counts in the rate.
    assert lines[2] == "step 3/300  loss 0.6931  45 pairs/s  eta 0:19:48"


def test_console_thins_lines_of_fast_runs_but_keeps_validation_and_the_last_step(tmp_path: Path) -> None:
    console, stream, clock = plain_console(tmp_path, total_steps=1000)
    for step in range(1, 1001):
        clock.now += 0.01
        console.log({"train/loss": 0.5, "train/bad_steps": float(step == 1000)}, step)
        if step == 50:
            console.log({"val/accuracy": 0.79, "val/loss": 0.512}, step)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/1000")
    assert lines[1].startswith("step 50/1000  val/accuracy 0.7900  val/loss 0.5120  eta ")
    assert lines[-1] == "step 1000/1000  loss 0.5000  bad_steps 1  eta 0:00:00"
    assert len(lines) == 7  # steps 1 and 50, one line per two seconds after that, the last step


def test_console_on_resume_closes_with_the_table_of_the_whole_run(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "train/loss": 0.5}\n{"step": 1, "val/accuracy": 0.75, "val/loss": null}\n')
    stream = io.StringIO()
    console = ConsoleTracker(make_run(tmp_path, start_step=1), stream=stream)
    console.log({"train/loss": 0.25}, 2)
    console.log({"val/accuracy": 0.5, "val/loss": 0.5}, 2)
    console.close()
    text = stream.getvalue()
    assert "best val/accuracy 0.7500 at step 1" in text
    assert len([line for line in text.splitlines() if line.split()[:2] in (["1", "0.5000"], ["2", "0.2500"])]) == 2


def test_console_closes_with_a_table_the_best_step_and_the_time(tmp_path: Path) -> None:
    console, stream, clock = plain_console(tmp_path, total_steps=3)
    for step, accuracy in ((1, 0.5), (2, 0.75), (3, math.nan)):
        clock.now += 30
        console.log({"train/loss": 1 / step, "train/accuracy": 0.5}, step)
        console.log({"val/accuracy": accuracy}, step)
    stream.seek(0)
    stream.truncate()
    console.close()
    console.close()
    assert stream.getvalue().splitlines() == [
        "step  train/loss  train/accuracy  val/loss  val/accuracy",
        "   1      1.0000          0.5000         -        0.5000",
        "   2      0.5000          0.5000         -        0.7500",
        "   3      0.3333          0.5000         -           nan",
        "best val/accuracy 0.7500 at step 2",
        "finished at step 3/3 after 0:01:30",
    ]


def test_console_of_a_run_that_stopped_at_once_says_so(tmp_path: Path) -> None:
    console, stream, _ = plain_console(tmp_path, total_steps=3)
    console.close(failed=True)
    assert stream.getvalue() == "stopped at step 0/3 after 0:00:00\n"


def test_the_table_shows_means_since_the_validation_before(tmp_path: Path) -> None:
    console, stream, _ = plain_console(tmp_path, total_steps=4)
    for step, loss in enumerate((1.0, 0.5, 0.3, 0.1), start=1):
        console.log({"train/loss": loss}, step)
        if step in (2, 4):
            console.log({"val/loss": loss}, step)
    console.close()
    rows = [line.split() for line in stream.getvalue().splitlines() if line.startswith("   ")]
    assert rows[-2:] == [["2", "0.7500", "-", "0.5000", "-"], ["4", "0.2000", "-", "0.1000", "-"]]


def test_no_line_is_wider_than_a_terminal_and_no_number_is_broken(tmp_path: Path) -> None:
    console, stream, _ = plain_console(tmp_path, total_steps=123456)
    train = {"train/loss": 0.69314, "train/accuracy": 0.5, "train/lr": 1e-6, "perf/pairs_per_second": 12345.6}
    val = {f"val/{name}": -12.3456 for name in ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected")}
    console.log(train, 123455)
    console.log(val, 123455)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    fields = "step 123455/123456  val/loss -12.3456  val/accuracy -12.3456  val/margin -12.3456"
    assert fields.rpartition("  ")[0] in text and "    val/margin -12.3456  val/reward_chosen -12.3456" in text


def test_closing_table_thins_to_twelve_rows_with_both_ends() -> None:
    _, *rows = closing_table([{"step": float(step)} for step in range(10, 1010, 10)])
    assert len(rows) == 12
    assert (rows[0][0], rows[-1][0]) == ("10", "1000")


def test_terminal_gets_a_bar_and_log_messages_go_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = FakeTerminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("rm_gallery")
    logger.addHandler(handler)
    try:
        console = ConsoleTracker(make_run(tmp_path, total_steps=4), stream=terminal)
        assert handler.stream is not terminal  # rich's stand-in, which writes above the bar
        console.log({"train/loss": 0.5, "train/accuracy": 0.75, "perf/pairs_per_second": 45.1}, 2)
        console.log({"val/loss": 0.6, "val/accuracy": 0.8}, 2)
        logging.getLogger("rm_gallery.test").warning("saved [bold]step 2[/bold]")
        console.close()
        assert handler.stream is terminal
        assert sys.stderr is terminal
    finally:
        logger.removeHandler(handler)
    text = terminal.getvalue()
    for part in ("step 2/4", "loss 0.5000  accuracy 0.750  45.1 pairs/s", " left", "val 0.800"):
        assert part in text
    assert "saved [bold]step 2[/bold]\n" in text
    assert "step 2/4  val/loss 0.6000  val/accuracy 0.8000\n" in text
    assert re.search(r"best val/accuracy 0\.8000 at step 2\nfinished at step 2/4 after 0:0\d:\d\d\n\Z", text)


def test_dumb_terminal_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = FakeTerminal()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = ConsoleTracker(make_run(tmp_path), stream=terminal)
    console.log({"train/loss": 0.5}, 1)
    console.close()
    assert "\x1b" not in terminal.getvalue()


def test_console_tells_how_far_a_long_step_is(tmp_path: Path) -> None:
    console, stream, clock = plain_console(tmp_path, total_steps=9)
    for number in range(2, 65):
        clock.now += 1
        console.tick(f"micro-batch {number}/64")
    console.log({"train/loss": 0.5}, 1)
    assert stream.getvalue().splitlines() == [
        "step 0/9 done  micro-batch 31/64",
        "step 0/9 done  micro-batch 61/64",
        "step 1/9  loss 0.5000  eta 0:08:24",
    ]


def test_the_bar_tells_it_of_steps_longer_than_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal, clock, shown = FakeTerminal(), Clock(), []
    console = ConsoleTracker(make_run(tmp_path, total_steps=9), stream=terminal, clock=clock)
    assert console._bar is not None
    monkeypatch.setattr(console._bar, "update", lambda done, text: shown.append((done, text)))
    for number in range(2, 9):
        clock.now += 0.5
        console.tick(f"micro-batch {number}/64")
    console.close()
    assert shown == [(0, f"micro-batch {number}/64") for number in range(5, 9)]
