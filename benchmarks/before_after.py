"""Training speed of the nine types with layers of their own, beside that of another commit.

    git worktree add ../before a20bc05
    OMP_NUM_THREADS=1 python -m benchmarks.before_after ../before [--rounds 9] [--passes 8]

Each tree runs in a process of its own with the same random models (4 layers of width 128) and the same batch: 16
prompts of 48 tokens with two responses of 16 and 20. The processes take turns, so that other work on the machine slows
both. Prints the processor time of a forward and backward pass, the ratio of each round, and the difference of the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TYPES = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "bert", "roberta", "deberta-v2", "modernbert")


def work() -> None:
    """Answer lines `type passes` with [seconds of a pass, loss]. Uses only what both trees have."""
    import numpy as np
    import torch

    from rm_gallery.data.batching.packed_batch import collate
    from rm_gallery.data.tokenization.token_group import TokenGroup
    from rm_gallery.modeling.reward_model import load_reward_model
    from rm_gallery.schema import Comparison
    from tests.small import make_model

    torch.set_num_threads(1)
    draw = np.random.default_rng(0)

    def tokens(count: int) -> Any:
        return draw.integers(8, 264, count).astype(np.int32)

    batch = collate([TokenGroup(tokens(48), [tokens(16), tokens(20)], [Comparison(0, 1)]) for _ in range(16)])

    def load(kind: str, folder: Path) -> Any:
        extra: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352, "layers": 4}
        if kind in TYPES[:5]:
            extra["head_dim"] = 32
        if kind == "deberta-v2":
            extra["pooler_hidden_size"] = 128
        if kind == "mistral":
            extra["sliding_window"] = 32
        if kind == "gemma3_text":
            extra |= {"sliding_window": 32, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
        return load_reward_model(str(make_model(kind, folder, **extra))).model.train()

    def run(model: Any) -> float:
        rewards = model(batch).flatten()
        loss = -torch.nn.functional.logsigmoid(rewards[batch.better] - rewards[batch.worse]).sum()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for line in sys.stdin:
            kind, passes = line.split()
            if kind not in models:
                models[kind] = load(kind, Path(name) / kind)
            loss = run(models[kind])
            start = time.process_time()
            for _ in range(int(passes)):
                run(models[kind])
            print(json.dumps([(time.process_time() - start) / int(passes), loss]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the other commit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--passes", type=int, default=8, help="forward and backward passes in a round")
    arguments = parser.parse_args()
    trees = {"before": arguments.before.resolve(), "now": Path(__file__).resolve().parent.parent}
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--work"], env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for name, tree in trees.items()
    }  # fmt: skip

    def ask(name: str, kind: str) -> tuple[float, float]:
        process = processes[name]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{kind} {arguments.passes}\n")
        process.stdin.flush()
        seconds, loss = json.loads(process.stdout.readline())
        return seconds, loss

    print("| type | before, ms | now, ms | now / before, median (lowest to highest) | difference of the loss |")
    print("|---|---|---|---|---|")
    for kind in TYPES:
        seconds: dict[str, list[float]] = {name: [] for name in trees}
        loss = {name: ask(name, kind)[1] for name in trees}  # the first pass of a model is slower
        for number in range(arguments.rounds):
            for name in sorted(trees, reverse=bool(number % 2)):
                seconds[name].append(ask(name, kind)[0])
        ratios = [now / before for now, before in zip(seconds["now"], seconds["before"], strict=True)]
        times = [f"{1e3 * statistics.median(seconds[name]):.1f}" for name in ("before", "now")]
        print(
            f"| {kind} | {times[0]} | {times[1]} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {abs(loss['now'] - loss['before']):.1e} |", flush=True,
        )  # fmt: skip
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--work"] else main()
