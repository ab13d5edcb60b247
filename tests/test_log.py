"""Logging: lines go to the standard error of the call, and only once."""

from __future__ import annotations

import logging

import pytest

from rm_gallery.log import setup_logging, wait_for_local_main


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
