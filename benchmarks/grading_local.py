"""GradingRunner with a local reward model against RewardScorer alone, on the same texts.

    python benchmarks/grading_local.py [--samples 700] [--repeats 5] [--model FOLDER] [--output FILE.json]

Without --model a small random Qwen2 reward model is made on the spot. Each repeat runs both, one right after the other;
prints samples per second of both and the ratio runner / scorer, median and range. The goal is at least 0.85.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; before torch is loaded

from benchmarks.scoring import WORDS, make_model
from rm_gallery.core.graders.common import RelevanceGrader
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.core.runner import GradingRunner


def make_samples(count: int) -> list[dict[str, str]]:
    """Questions with answers of 4 to 60 words."""
    draw = random.Random(0)
    return [
        {
            "query": "What " + " ".join(draw.choices(WORDS, k=6)),
            "response": " ".join(draw.choices(WORDS, k=draw.randint(4, 60))),
        }
        for _ in range(count)
    ]


def rate(run: Callable[[], object], count: int) -> float:
    began = time.perf_counter()
    run()
    return count / (time.perf_counter() - began)


def measure(folder: Path, count: int, repeats: int) -> list[tuple[float, float]]:
    """(scorer, runner) in samples per second, by repeat; both are warm."""
    model = OpenAIChatModel(str(folder), is_local=True)
    scorer = model.reward_scorer
    samples = make_samples(count)
    groups = [scorer.build_group(sample["query"], [sample["response"]]) for sample in samples]
    runner = GradingRunner({"reward": RelevanceGrader(model=model)}, show_progress=False)
    expected = [rewards[0] for rewards in scorer.score(groups)]
    found = [result.score for result in runner.run(samples)["reward"]]
    worst = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    print(f"{count} samples; largest difference of a reward between the two: {worst:.1e}")
    return [
        (rate(lambda: scorer.score(groups), count), rate(lambda: runner.run(samples), count)) for _ in range(repeats)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=700)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.model or make_model(Path(name), hidden_size=128, layers=4)
        rows = measure(folder, arguments.samples, arguments.repeats)
    ratios = [runner / scorer for scorer, runner in rows]
    print(f"{'scorer/s':>10} {'runner/s':>10} {'ratio':>7}")
    for (scorer, runner), ratio in zip(rows, ratios, strict=True):
        print(f"{scorer:>10.1f} {runner:>10.1f} {ratio:>7.3f}")
    print(f"ratio runner / scorer: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"rows": rows, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
