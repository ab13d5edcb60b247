"""Checkpoints that the scoring tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rm_gallery.scoring import RewardScorer
from tests.scoring.models import make_checkpoint


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a decoder trained on raw text."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("text"))[0]


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a decoder trained on chats."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("chat"), style="chat", seed=1)[0]


@pytest.fixture
def text_scorer(text_folder: Path) -> Iterator[RewardScorer]:
    with RewardScorer.from_folder(text_folder, device="cpu") as scorer:
        yield scorer


@pytest.fixture
def chat_scorer(chat_folder: Path) -> Iterator[RewardScorer]:
    with RewardScorer.from_folder(chat_folder, device="cpu") as scorer:
        yield scorer
