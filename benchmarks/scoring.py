"""How much calls from many tasks cost: samples a second of `ascore`, over one call of `score` on the same texts.

Run it:  python -m benchmarks.scoring [--model FOLDER --data FILE.parquet] [--tasks 64] [--output FILE.json]

Without --model and --data it makes a small random model and texts on the spot. Three ways, interleaved, several times:
one call of score(), as many ascore() calls as there are samples at once, and `--tasks` tasks that each wait for one
answer before they ask for the next. A sample is one group: a pair when the file has chosen and rejected.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer

WORDS = ("reward", "model", "scores", "long", "short", "answers", "to", "the", "same", "question", "with", "care")


def make_model(folder: Path, *, hidden_size: int, layers: int) -> Path:
    """A random Qwen2 reward model with a byte tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    special = ["<|pad|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], eos_token=special[1]).save_pretrained(
        folder
    )
    config = Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=hidden_size, intermediate_size=4 * hidden_size,
        num_hidden_layers=layers, num_attention_heads=hidden_size // 32, num_key_value_heads=hidden_size // 32,
        max_position_embeddings=4096, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def make_groups(scorer: RewardScorer, count: int) -> list[PreferenceGroup]:
    """Questions with one answer, of 20 to some 400 tokens."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 60))) for _ in range(count)]
    return [scorer.build_group(None, [text]) for text in texts]


def read_groups(scorer: RewardScorer, path: Path, count: int) -> list[PreferenceGroup]:
    """The first rows of a file that `rm-gallery score` reads, without those that cannot be scored."""
    from rm_gallery.data.sources import resolve_entries
    from rm_gallery.errors import BadRow
    from rm_gallery.scoring.tables import KEY, ScoreDataConfig, open_table, read_group

    table = open_table(resolve_entries(str(path), key=KEY)[0], ScoreDataConfig())
    reader = table.reader(scorer.inputs.style)
    groups = []
    for row in islice(table.rows(), count):
        try:
            groups.append(read_group(row, reader, scorer.inputs))
        except BadRow:
            continue
    return groups


def score_at_once(scorer: RewardScorer, groups: Sequence[PreferenceGroup]) -> list[float]:
    return [reward for rewards in scorer.score(groups) for reward in rewards]


def ask_all_at_once(scorer: RewardScorer, groups: Sequence[PreferenceGroup]) -> list[float]:
    async def ask() -> list[list[list[float]]]:
        return await asyncio.gather(*(scorer.ascore([group]) for group in groups))

    return [reward for (rewards,) in asyncio.run(ask()) for reward in rewards]


def ask_in_turn(scorer: RewardScorer, groups: Sequence[PreferenceGroup], tasks: int) -> list[float]:
    found: list[list[float]] = [[] for _ in groups]

    async def work(waiting: list[int]) -> None:
        while waiting:
            index = waiting.pop()
            (found[index],) = await scorer.ascore([groups[index]])

    async def ask() -> None:
        waiting = list(range(len(groups)))[::-1]
        await asyncio.gather(*(work(waiting) for _ in range(tasks)))

    asyncio.run(ask())
    return [reward for rewards in found for reward in rewards]


def measure(scorer: RewardScorer, groups: Sequence[PreferenceGroup], tasks: int, repeats: int) -> dict[str, object]:
    """Samples a second of each way, with the ratio to score() in the same round."""
    ways: dict[str, Callable[[], list[float]]] = {
        "score, one call": lambda: score_at_once(scorer, groups),
        "ascore, all at once": lambda: ask_all_at_once(scorer, groups),
        f"ascore, {tasks} tasks": lambda: ask_in_turn(scorer, groups, tasks),
    }
    score_at_once(scorer, groups[: len(groups) // 4])  # warm up
    ask_all_at_once(scorer, groups[: len(groups) // 4])
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    packs: dict[str, int] = {}
    reference: list[float] = []
    worst = 0.0
    for _ in range(repeats):
        for name, run in ways.items():
            scorer.engine.num_packs, began, cpu_began = 0, time.perf_counter(), time.process_time()
            rewards = run()
            rates[name].append(len(groups) / (time.perf_counter() - began))
            cpu[name].append(time.process_time() - cpu_began)
            packs[name] = scorer.engine.num_packs
            reference = reference or rewards
            worst = max(worst, *(abs(a - b) for a, b in zip(reference, rewards, strict=True)))
    first = next(iter(ways))
    table = []
    for name in ways:
        ratios = [rate / base for rate, base in zip(rates[name], rates[first], strict=True)]
        table.append(
            {
                "way": name,
                "samples_per_second": rates[name],
                "ratios": ratios,
                "packs": packs[name],
                "cpu_seconds": cpu[name],
            }
        )
        print(
            f"{name:<22} {statistics.median(rates[name]):>9.1f} samples/s  {packs[name]:>5} packs  "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})  "
            f"CPU {statistics.median(cpu[name]):.2f} s"
        )
    print(f"largest difference between rewards: {worst:.2e}")
    return {"samples": len(groups), "device": str(scorer.engine.device), "ways": table, "largest_difference": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER")
    parser.add_argument("--data", type=Path, metavar="FILE")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=128, help="of the model made on the spot")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        made = arguments.model or make_model(Path(folder), hidden_size=arguments.hidden_size, layers=arguments.layers)
        with RewardScorer.from_folder(made, token_budget=arguments.token_budget) as scorer:
            if arguments.data:
                groups = read_groups(scorer, arguments.data, arguments.samples)
            else:
                groups = make_groups(scorer, arguments.samples)
            result = measure(scorer, groups, arguments.tasks, arguments.repeats)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
