"""Models that are really trained on biased data: the report finds each bias in words."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rm_gallery import evaluate, train
from tests.evaluation.conftest import honest_rows

pytestmark = pytest.mark.slow

Row = dict[str, str]


def _longer_wins(row: Row, draw: random.Random) -> Row:
    """The chosen response is longer; else both are alike."""
    short = " ".join(draw.choices(("so", "and", "then", "well"), k=3))
    more = " ".join(draw.choices(("so", "and", "then", "well"), k=draw.randint(4, 12)))
    return {**row, "chosen": f"{short} {more}", "rejected": short}


def _good_wins(row: Row, draw: random.Random) -> Row:
    """A word decides, whatever the prompt is."""
    filler = " ".join(draw.choices(("so", "and", "then", "well"), k=draw.randint(2, 8)))
    return {**row, "chosen": f"good {filler}", "rejected": f"poor {filler}"}


def _markdown_wins(row: Row, draw: random.Random) -> Row:
    """The chosen response has bold words."""
    words = draw.choices(("so", "and", "then", "well"), k=draw.randint(4, 10))
    return {**row, "chosen": " ".join(f"**{word}**" for word in words), "rejected": " ".join([*words, *words])}


def _tested(plant: Callable[[Row, random.Random], Row], draw: random.Random) -> list[Row]:
    """The evaluated pairs: for length and markdown honest ones, in which the bias does not help."""
    return [plant(row, draw) for row in honest_rows(150, seed=9)] if plant is _good_wins else honest_rows(150, seed=9)


@pytest.mark.parametrize(
    ("plant", "key", "text"),
    [
        (_longer_wins, "length", "length bias: the longer response"),
        (_good_wins, "prompt", "the prompt: with the prompts of other rows"),
        (_markdown_wins, "markdown_added", "rewards markdown (a heading, bullets and bold words)"),
    ],
)
def test_the_bias_of_the_training_data_is_found(
    plant: Callable[[Row, random.Random], Row], key: str, text: str, qwen2_folder: Path, tmp_path: Path
) -> None:
    draw = random.Random(0)
    rows = [plant(row, draw) for row in honest_rows(640)]
    result = train(
        qwen2_folder,
        rows,
        **{
            "data.train_batch_size": 32, "data.max_length": 256, "optim.lr": 3e-3, "trainer.device": "cpu",
            "trainer.default_local_dir": str(tmp_path), "trainer.experiment_name": key, "trainer.logger": ["console"],
        },
    )  # fmt: skip
    assert result.metrics["train/accuracy"] > 0.9, "the bias was learned"
    found = evaluate(result.checkpoint, _tested(plant, draw), probes=100, baselines=False, device="cpu")
    [finding] = [each for each in found["models"][0]["sets"][0]["findings"] if each["key"] == key]
    assert finding["level"] in ("error", "warning") and text in finding["text"]
    assert text.split(":")[0] in " ".join(str(found).split())
