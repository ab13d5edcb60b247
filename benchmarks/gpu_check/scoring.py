"""scoring: the same rewards packed and one by one, on the CPU and the GPU, and from many threads at once."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.small_model import ON_CPU, SMALL, TINY, make_folder
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.scorer import RewardScorer

BOUNDS = {"fp32": 1e-4, "bf16": 0.1}
"""Largest difference of rewards, relative to the largest reward: bfloat16 has 8 bits, and layers add up."""
_THREADS = 16


def make_groups(count: int, longest: int, num_responses: int = 4) -> list[PreferenceGroup]:
    """Random texts of all lengths, with responses that share their beginning."""
    draw = np.random.default_rng(0)

    def text(length: int) -> str:
        return "".join(draw.choice(list("abcdefgh .,")) for _ in range(length))

    groups = []
    for _ in range(count):
        prompt = text(int(draw.integers(0, longest)))
        responses = [
            prompt + text(int(draw.integers(1, longest))) for _ in range(int(draw.integers(1, num_responses + 1)))
        ]
        groups.append(PreferenceGroup("", responses))
    return groups


def difference(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Largest difference of rewards, relative to the largest of `expected`."""
    assert [len(each) for each in found] == [len(each) for each in expected]
    mine, theirs = (np.concatenate([np.array(each) for each in rewards]) for rewards in (found, expected))
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def compare(folder: Path, groups: Sequence[PreferenceGroup], device: str, dtype: str) -> dict[str, float]:
    """name of a comparison -> largest relative difference; each is relative to float32 or the packed rewards."""
    exact = RewardScorer.from_folder(folder, device="cpu", dtype="fp32").score(groups)
    with RewardScorer.from_folder(folder, device=device, dtype=dtype) as scorer:
        assert scorer.engine.device.type == torch.device(device).type
        packed = scorer.score(groups)
        single = [scorer.score([PreferenceGroup("", [text])])[0][0] for group in groups for text in group.responses]
        with ThreadPoolExecutor(_THREADS) as pool:
            threads = list(pool.map(lambda group: scorer.score([group])[0], groups))

        async def ask() -> list[list[list[float]]]:
            return await asyncio.gather(*(scorer.ascore([group]) for group in groups))

        before = scorer.engine.num_packs
        batched = [rewards for (rewards,) in asyncio.run(ask())]
        assert scorer.engine.num_packs - before < len(groups), "concurrent calls shared no forward pass"
    flat = [[reward] for rewards in packed for reward in rewards]
    return {
        "device = CPU fp32": difference(packed, exact),
        "packed = one by one": difference([[each] for each in single], flat),
        f"{_THREADS} threads": difference(threads, packed),
        "concurrent calls": difference(batched, packed),
    }


def run(report: Report) -> None:
    size = TINY if report.tiny else ON_CPU if report.device.type == "cpu" else SMALL
    groups = make_groups(6 if report.tiny else 60, size.longest * (1 if report.device.type == "cpu" else 3))
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name) / "model", size)
        for dtype, bound in BOUNDS.items():
            with report.check(f"rewards {dtype}"):
                found = compare(folder, groups, str(report.device), dtype)
                name, value = max(found.items(), key=lambda each: each[1])
                figure = f"{len(found)} ways, {value:.2g}" + (f" ({name})" if value > bound else "")
                report.add(f"rewards {dtype}", value <= bound, figure, f"{bound:g}", **found)
