"""Checkpoints and rows that the evaluation tests share."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.scoring.models import make_checkpoint


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a decoder trained on chats."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("chat"), style="chat", seed=1)[0]


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one of the same shape."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("other"), style="chat", seed=2)[0]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


_WORDS = ("river", "stone", "cloud", "bread", "letter", "engine", "garden", "window", "music", "winter", "paper")


def honest_rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Pairs whose better response repeats a word of the prompt; lengths and markdown do not depend on the label."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        asked, other = draw.sample(_WORDS, 2)
        filler = [" ".join(draw.choices(("so", "and", "then", "well"), k=draw.randint(2, 12))) for _ in range(2)]
        rows.append(
            {
                "prompt": f"Question {number}: what about the {asked}?",
                "chosen": f"It is the {asked}. {filler[0]}.",
                "rejected": f"It is the {other}. {filler[1]}.",
            }
        )
    return rows


def honest(conversations: list[list[dict[str, Any]]]) -> list[float]:
    """Rewards words of the prompt, and little else."""
    rewards = []
    for *before, last in conversations:
        asked = set(str(before[-1]["content"] if before else "").strip("?").split()) & set(_WORDS)
        said = str(last["content"])
        rewards.append(2.0 * any(word in said for word in asked) + 0.001 * (len(said) % 7))
    return rewards
