"""Scoring on a GPU; the siblings on the CPU are in test_one_reward.py and test_batcher.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from tests.small import text_pairs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("auto", 0.2)])
def test_rewards_on_the_gpu_are_those_of_the_cpu(text_folder: Path, dtype: str, tolerance: float) -> None:
    groups = [PreferenceGroup("", [row["chosen"], row["rejected"]]) for row in text_pairs(50)]
    expected = RewardScorer.from_folder(text_folder, device="cpu").score(groups)
    with RewardScorer.from_folder(text_folder, dtype=dtype) as scorer:  # type: ignore[arg-type]
        assert scorer.engine.device.type == "cuda"

        async def ask() -> list[list[list[float]]]:
            return await asyncio.gather(*(scorer.ascore([group]) for group in groups))

        waited = [rewards for (rewards,) in asyncio.run(ask())]
        for found in (scorer.score(groups), waited):
            for each, wanted in zip(found, expected, strict=True):
                assert each == pytest.approx(wanted, abs=tolerance)
