"""`python -m benchmarks.hostile`: a few quick attempts, the table, and the exit status."""

from __future__ import annotations

import pytest

from benchmarks.hostile.__main__ import main
from benchmarks.hostile.box import ATTEMPTS, Attempt, Box, check


def test_quick_attempts_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "shp", "thinking_tags", "results_file_is_another"]) == 0
    printed = capsys.readouterr().out
    assert "| texts.thinking_tags_flagged_special | same ids as apply_chat_template | same ids as apply" in printed
    assert "6 of 6 attempts held" in printed


def test_an_attempt_that_does_not_hold_gives_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(box: Box) -> str:
        check(False, "a \x1b[31mtraceback")
        return ""

    def raises(box: Box) -> str:
        return str(1 / 0)

    attempts = [Attempt("texts", "fails", "refused", fails), Attempt("texts", "raises", "refused", raises)]
    monkeypatch.setattr("benchmarks.hostile.__main__.ATTEMPTS", attempts)
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert "| texts.fails | refused | a \\x1b[31mtraceback | NO |" in printed
    assert "ZeroDivisionError" in printed and "0 of 2 attempts held" in printed
    assert main(["--only", "no-such-name"]) == 2 and ATTEMPTS
