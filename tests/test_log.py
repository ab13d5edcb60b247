"""Logging: lines go to the standard error of the call, and only once."""

from __future__ import annotations

import logging

import pytest

from rm_gallery.log import setup_logging


def test_calling_again_follows_standard_error_and_writes_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging()
    logging.getLogger("rm_gallery.somewhere").info("one line")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("one line") == 1
