"""Small training runs without what takes longest in them: curves and reports are not drawn, and Hydra is not used.

A run of six steps takes 0.2 s. The marker `curves` is for a run that draws them; test_config.py reads with Hydra.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rm_gallery import config
from rm_gallery.training import setup
from tests.training.short_runs import compose_plainly, train, write_data


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "curves" not in request.keywords:
        monkeypatch.setattr(setup, "draw_curves", lambda run_dir: None)
        monkeypatch.setattr(setup.ReportWriter, "write", lambda self: None)


@pytest.fixture(autouse=True)
def without_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "compose", compose_plainly)


@pytest.fixture(scope="session")
def trained(qwen2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Call it as `train` for a run of the Qwen2 model on the data of `write_data` that nothing happens to.

    It trains each run once a session, and copies it into the working directory.
    """
    runs: dict[tuple[str, ...], Path] = {}

    def copy(name: str, *overrides: str) -> Path:
        if (name, *overrides) not in runs:
            folder = tmp_path_factory.mktemp("trained")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                write_data()
                runs[name, *overrides] = folder / train(qwen2_folder, name, *overrides)
        return Path(shutil.copytree(runs[name, *overrides], Path("runs") / name))

    return copy
