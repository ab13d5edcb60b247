"""Scoring many responses to one prompt: RewardScorer against the library's text-classification pipeline.

    python -m benchmarks.best_of [--data FILE.parquet] [--prompts 200] [--responses 16] [--dtype bf16|fp32]
                                 [--batch-sizes 8 16 32] [--size 25m] [--output FILE.json]

Each prompt of the file (chats; made up without one) gets responses drawn with a seed from other rows. Both systems
load the same random Qwen2 classifier, and score the same chats, 25 prompts at a time and in turns; texts are rendered
before for the pipeline, and tokenized by each. The pipeline has the fastest of some batch sizes, and gets its texts
sorted by length, so that it pads little. Ratios are those of the chunks of prompts; rewards are compared as well.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK = 25  # prompts

Chats = list[list[list[dict[str, str]]]]
"""Prompts x responses x messages."""


def read_chats(path: Path, num_prompts: int, num_responses: int) -> Chats:
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["prompt", "chosen", "rejected"]).to_pylist()
    draw = random.Random(0)
    chats: Chats = []
    for row in draw.sample(rows, num_prompts):
        own = [row["chosen"], row["rejected"]]
        others = [other[side] for other in draw.sample(rows, num_responses) for side in ("chosen",)]
        responses = list(dict.fromkeys(own + others))[:num_responses]
        chats.append([[*row["prompt"], {"role": "assistant", "content": response}] for response in responses])
    return chats


def make_pipeline(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    return pipeline(
        "text-classification", str(folder), device="cpu", dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    )


def by_pipeline(judge: Any, chats: Chats, batch_size: int) -> list[list[float]]:
    texts = [judge.tokenizer.apply_chat_template(chat, tokenize=False) for group in chats for chat in group]
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    found = judge([texts[place] for place in order], batch_size=batch_size, function_to_apply="none")
    flat = [0.0] * len(texts)
    for place, each in zip(order, found, strict=True):
        flat[place] = each["score"]
    ends = iter(flat)
    return [[next(ends) for _ in group] for group in chats]


def by_scorer(scorer: Any, chats: Chats) -> list[list[float]]:
    groups = [scorer.build_group(group[0][:-1], [chat[-1]["content"] for chat in group]) for group in chats]
    rewards: list[list[float]] = scorer.score(groups)
    return rewards


def timed(act: Callable[[], list[list[float]]]) -> tuple[float, list[list[float]]]:
    start = time.perf_counter()
    found = act()
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--size", default="25m", choices=["tiny", "25m"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    from benchmarks.throughput_inputs import write_inputs
    from rm_gallery.scoring import RewardScorer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = options.data or folder / "pairs.parquet"
        write_inputs(folder, options.data and options.data.parent, source.stem, 2 * options.prompts, options.size)
        chats = read_chats(source, options.prompts, options.responses)
        judge = make_pipeline(folder / "model", options.dtype)
        scorer = RewardScorer.from_folder(folder / "model", dtype=options.dtype, device="cpu")
        warm = chats[:4]
        by_scorer(scorer, warm)
        trials = {size: timed(lambda size=size: by_pipeline(judge, warm, size))[0] for size in options.batch_sizes}
        batch_size = min(trials, key=lambda size: trials[size])
        seconds: dict[str, list[float]] = {"pipeline": [], "scorer": []}
        difference = 0.0
        for start in range(0, len(chats), CHUNK):
            chunk = chats[start : start + CHUNK]
            took, theirs = timed(lambda chunk=chunk: by_pipeline(judge, chunk, batch_size))  # type: ignore[misc]
            seconds["pipeline"].append(took)
            took, ours = timed(lambda chunk=chunk: by_scorer(scorer, chunk))  # type: ignore[misc]
            seconds["scorer"].append(took)
            pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
            difference = max(difference, *(abs(a - b) for a, b in pairs))
    ratios = [a / b for a, b in zip(seconds["pipeline"], seconds["scorer"], strict=True)]
    count = sum(len(group) for group in chats)
    print(f"{count} responses to {len(chats)} prompts, {options.dtype}; pipeline at batch size {batch_size}")
    for system, each in seconds.items():
        print(f"{system:10}{count / sum(each):8.2f} responses/s")
    print(f"scorer over pipeline: {sum(seconds['pipeline']) / sum(seconds['scorer']):.2f} in all, "
          f"chunks {min(ratios):.2f} to {max(ratios):.2f}")  # fmt: skip
    print(f"largest difference of rewards: {difference:.1e}")
    if options.output:
        facts = {"seconds": seconds, "ratios": ratios, "difference": difference, "batch_size": batch_size}
        options.output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
