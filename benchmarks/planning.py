"""How long planning takes, and how good the plans are: every step of an epoch of made-up pairs, without any tokens.

    python -m benchmarks.planning [--pairs 10000000] [--ranks 8 64 1024] [--per-rank 16] [--budget 8192]
                                  [--hidden-size 4096] [--output FILE.json]

A pair is a prompt and two responses of log-normal lengths (medians of 200 tokens, spreads of 0.8 and 0.7, cut at
2,048), so 783 tokens on average and at most 6,144. A step has `--per-rank` pairs for each rank. Prints for each number
of ranks the CPU seconds of planning every step of the epoch (order, steps, micro-batches), the peak memory of the
process, the micro-batches of a rank against their lower bound (tokens of the step over the budget, rounded up), and the
estimated cost of the slowest rank over the mean, as mean and worst over all steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer, attention_length
from rm_gallery.data.batching.plan import PackingConfig, Plan
from rm_gallery.data.token_cache.arrays import GroupSizes


@dataclass(frozen=True)
class Result:
    """One epoch on `ranks` ranks."""

    ranks: int
    pairs: int
    steps: int
    seconds: float
    """CPU time of planning."""
    peak_gib: float
    micro_batches: int
    """Of one rank, over all steps."""
    lower_bound: int
    imbalance_mean: float
    imbalance_worst: float


def make_sizes(count: int, seed: int = 0) -> GroupSizes:
    """Pairs as chats have them."""
    draw = np.random.default_rng(seed)
    prompt, first, second = (
        np.exp(draw.normal(np.log(200), spread, count)).clip(1, 2048).astype(np.int32) for spread in (0.8, 0.7, 0.7)
    )
    twos = np.full(count, 2, np.int32)
    return GroupSizes(prompt + first + second, prompt + np.maximum(first, second), twos, twos // 2)


def plan_epoch(sizes: GroupSizes, packer: Packer, per_rank: int) -> Result:
    """Plan every step of one epoch; what is only measured is not counted as planning."""
    ranks = packer.world_size
    plan = Plan(sizes, PackingConfig(train_batch_size=ranks * per_rank, drop_last=True), packer, seed=0)
    start = time.process_time()
    steps = plan.epoch_steps(0)
    seconds = time.process_time() - start
    micro_batches = least = 0
    imbalance = []
    for groups in steps:
        start = time.process_time()
        of_step = sizes.of(groups)
        packs = packer.pack(of_step)
        seconds += time.process_time() - start
        costs = packer.pack_costs([pack for rank in packs for pack in rank], of_step).reshape(ranks, -1).sum(axis=1)
        imbalance.append(float(costs.max() / costs.mean()))
        micro_batches += len(packs[0])
        least += -(-int(of_step.tokens.sum()) // (packer.token_budget * ranks))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    mean, worst = float(np.mean(imbalance)), max(imbalance)
    return Result(ranks, len(sizes), len(steps), seconds, peak, micro_batches, least, mean, worst)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1024, 64, 8])
    parser.add_argument("--per-rank", type=int, default=16)
    parser.add_argument("--budget", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sizes = make_sizes(options.pairs)
    print(f"{options.pairs:,} pairs, {sizes.tokens.mean():.0f} tokens on average, at most {sizes.tokens.max():,}")
    print(f"{options.per_rank} pairs a rank and step, micro-batches of at most {options.budget:,} tokens")
    print("| ranks | steps | seconds | peak memory | micro-batches | lower bound | slowest rank, mean | worst |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for ranks in options.ranks:
        packer = Packer(options.budget, ranks, attention_length=attention_length(options.hidden_size))
        result = plan_epoch(sizes, packer, options.per_rank)
        results.append(asdict(result))
        print(
            f"| {ranks:,} | {result.steps:,} | {result.seconds:.1f} | {result.peak_gib:.2f} GiB | "
            f"{result.micro_batches:,} | {result.lower_bound:,} | {result.imbalance_mean:.4f} | "
            f"{result.imbalance_worst:.4f} |",
            flush=True,
        )
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
