"""Reward models that the tests of trainers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scoring.models import make_checkpoint


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a decoder trained on chats."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("chat"), style="chat", seed=1)[0]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a decoder trained on raw text."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("text"))[0]


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an encoder trained on raw text."""
    return make_checkpoint("bert", tmp_path_factory.mktemp("encoder"))[0]
