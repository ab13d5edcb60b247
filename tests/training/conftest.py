"""Training runs of these tests draw no curves, which takes as long as their six steps; `curves` marks one that does."""

from __future__ import annotations

import pytest

from rm_gallery.training import setup


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "curves" not in request.keywords:
        monkeypatch.setattr(setup, "draw_curves", lambda run_dir: None)
