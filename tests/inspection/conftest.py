"""Every test of show-data has an empty working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.inspection.data import Show


@pytest.fixture
def show(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    return Show(capsys)
