"""Small training runs without what takes longest in them: curves are not drawn, and Hydra does not read overrides.

A run of six steps takes 0.2 s. The marker `curves` is for a run that draws them; test_config.py reads with Hydra.
"""

from __future__ import annotations

import pytest

from rm_gallery import config
from rm_gallery.training import setup
from tests.training.short_runs import compose_plainly


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "curves" not in request.keywords:
        monkeypatch.setattr(setup, "draw_curves", lambda run_dir: None)


@pytest.fixture(autouse=True)
def without_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "compose", compose_plainly)
