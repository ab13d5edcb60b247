"""The progress bar: on a terminal only, and gone at the end."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from rm_gallery import progress_bar
from rm_gallery.core.runner import GradingRunner
from tests.core.graders_for_runs import LengthGrader, RaisingGrader, texts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_for(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error as a terminal. Called in the test: pytest puts its own stream there after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stream


def test_a_terminal_sees_how_far_it_is_and_how_many_errors_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    GradingRunner({"r": RaisingGrader(), "s": RaisingGrader()}).run([{}, {"error": OSError()}])
    assert "4/4" in terminal.getvalue() and "2 errors" in terminal.getvalue()


def test_a_dataset_of_unknown_length_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    GradingRunner({"a": LengthGrader()}).run(iter(texts(7)))
    assert "7/?" in terminal.getvalue()


def test_nothing_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    GradingRunner({"a": LengthGrader()}, show_progress=False).run(texts(3))
    assert terminal.getvalue() == ""


def test_nothing_is_shown_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    GradingRunner({"a": LengthGrader()}).run(texts(3))
    assert capfd.readouterr() == ("", "")


def test_a_log_handler_on_the_terminal_gets_its_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("rm_gallery")
    logger.addHandler(handler)
    try:
        GradingRunner({"r": RaisingGrader()}).run([{"error": OSError("gone")}])
    finally:
        logger.removeHandler(handler)
    assert handler.stream is terminal
    assert "1 of 1 samples failed" in terminal.getvalue()


def test_without_a_terminal_progress_is_logged_periodically(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress_bar, "_LOG_INTERVAL_S", -1.0)
    monkeypatch.setattr(progress_bar.log, "info", lambda text, *values: lines.append(text % values))
    with progress_bar.ProgressBar("a.parquet", 9, 2, log_unit="rows") as bar:
        bar.advance(3)
    assert [line.split(",")[0] for line in lines] == ["a.parquet 5/9 rows"]
    assert bar.rate > 0
