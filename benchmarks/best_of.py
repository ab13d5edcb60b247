"""Scoring many responses to one prompt: RewardScorer against the library's text-classification pipeline.

    python -m benchmarks.best_of [--data FILE.parquet] [--prompts 200] [--responses 16] [--dtype bf16|fp32]
                                 [--batch-sizes 1 8 16 32] [--size 25m] [--output FILE.json]

Each prompt of the file (chats; made up without one) gets responses drawn with a seed from other rows. Both systems
load the same random Qwen2 classifier, and score the same chats, 25 prompts at a time and in turns; texts are rendered
before for the pipeline, and tokenized by each. The pipeline runs twice, each time at the fastest of some batch sizes:
over the texts as they come, which is how it is used, and over texts that were sorted by length for it, so that it pads
next to nothing. Ratios are those of the chunks of prompts; rewards are compared as well.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
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


def by_pipeline(judge: Any, chats: Chats, batch_size: int, *, is_sorted: bool) -> list[list[float]]:
    texts = [judge.tokenizer.apply_chat_template(chat, tokenize=False) for group in chats for chat in group]
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place])) if is_sorted else range(len(texts))
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
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32])
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
        systems: dict[str, Callable[[Chats], list[list[float]]]] = {"scorer": partial(by_scorer, scorer)}
        systems["scorer"](warm)
        for name, is_sorted in (("pipeline", False), ("pipeline, sorted", True)):
            run = partial(by_pipeline, judge, is_sorted=is_sorted)
            trials = {size: timed(partial(run, warm, size))[0] for size in options.batch_sizes}
            batch_size = min(trials, key=lambda size: trials[size])
            systems[name] = partial(run, batch_size=batch_size)
            print(f"{name}: batch size {batch_size}")
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        difference = 0.0
        for start in range(0, len(chats), CHUNK):
            rewards = {}
            for name, score in systems.items():
                took, rewards[name] = timed(partial(score, chats[start : start + CHUNK]))
                seconds[name].append(took)
            ours, theirs = (list(chain.from_iterable(rewards[name])) for name in ("scorer", "pipeline"))
            difference = max(difference, *(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    count = sum(len(group) for group in chats)
    print(f"{count} responses to {len(chats)} prompts, {options.dtype}")
    ratios = {}
    for name, each in seconds.items():
        ratios[name] = [a / b for a, b in zip(each, seconds["scorer"], strict=True)]
        whole = sum(each) / sum(seconds["scorer"])
        print(f"{name:18}{count / sum(each):8.2f} responses/s, the scorer's over it {whole:.2f} "
              f"(chunks {min(ratios[name]):.2f} to {max(ratios[name]):.2f})")  # fmt: skip
    print(f"largest difference of rewards: {difference:.1e}")
    if options.output:
        facts = {"seconds": seconds, "ratios": ratios, "difference": difference}
        options.output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
