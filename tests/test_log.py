"""Logging: lines go to the standard error of the call, and only once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rm_gallery.log import _TerminalFormatter, log_copy, setup_logging, wait_for_local_main


def test_calling_again_follows_standard_error_and_writes_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging()
    logging.getLogger("rm_gallery.somewhere").info("one line")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("one line") == 1


def test_ranks_above_0_say_only_errors_and_who_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    logger = logging.getLogger("rm_gallery")
    handlers, logger.handlers = logger.handlers, []
    try:
        setup_logging()
        logging.getLogger("rm_gallery.somewhere").warning("known to all")
        logging.getLogger("rm_gallery.somewhere").error("known to one")
        err = capsys.readouterr().err
        assert "known to all" not in err
        assert err.startswith("[rank 3] E ") and err.endswith("known to one\n")
    finally:
        logger.handlers = handlers
        monkeypatch.setenv("RANK", "0")
        setup_logging()


def test_only_the_first_process_of_a_machine_speaks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("rm_gallery.log.time.sleep", waits.append)
    for rank, local, prefix in (("0", "0", ""), ("8", "0", "[rank 8] "), ("9", "1", "[rank 9] ")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert wait_for_local_main() == prefix
    assert waits == [2.0]


def test_a_copy_of_the_log_has_the_messages_from_before_its_path_was_known(tmp_path: Path) -> None:
    logger = logging.getLogger("rm_gallery")
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with log_copy() as start:
            logger.info("model loaded")
            start(tmp_path / "train.log")
            logger.warning("a \x1b[31mred\x1b[0m line\nand another")
            assert "red" in (tmp_path / "train.log").read_text(), "each message is written at once"
        logger.info("later")
    finally:
        logger.setLevel(level)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[0] for line in lines] == ["I", "W"] and lines[0].endswith(" model loaded")
    assert "\x1b" not in lines[1] and lines[1].endswith("and another")


def test_warnings_on_a_terminal_are_yellow_and_errors_red() -> None:
    formatter = _TerminalFormatter("%(levelname).1s %(message)s")
    texts = [
        formatter.format(logging.LogRecord("rm_gallery", level, "", 0, "text \x1b[5m", (), None))
        for level in (logging.INFO, logging.WARNING, logging.ERROR)
    ]
    assert [text.replace("\x1b", "ESC") for text in texts] == [
        "I text \\x1b[5m", "ESC[33mW text \\x1b[5mESC[0m", "ESC[31mE text \\x1b[5mESC[0m",
    ]  # fmt: skip


def test_a_line_on_a_terminal_is_wrapped_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    formatter = _TerminalFormatter("%(levelname).1s %(message)s")
    message = "data.train_files: 10,000 groups and 123,456 tokens"
    text = formatter.format(logging.LogRecord("rm_gallery", logging.INFO, "", 0, message, (), None))
    assert text == "I data.train_files: 10,000 groups and\n           123,456 tokens"
