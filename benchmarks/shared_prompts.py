"""What computing pairs of one prompt together saves: tokens of an epoch with `data.share_prompts` on and off.

    python -m benchmarks.shared_prompts PAIRS.parquet [MORE.parquet ...] [--batches 64 256] [--ranks 1 8]
                                        [--budget 8192] [--hidden-size 896] [--train]

Each file has `prompt` (messages), `chosen`, `rejected`. A byte-pair tokenizer of 4,000 tokens is trained on it, rows go
through the ordinary data path, and every step of an epoch is planned. Prints tokens without and with the switch, the
estimated time that the slowest rank is spared, the slowest rank over the mean, the most responses of a unit, and the
CPU milliseconds of planning a step. `--train` measures training as well: CPU seconds of forward and backward passes of
a small Qwen2 shape (8 layers of 512, float32) over the first step of an epoch, on and off interleaved, three times.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rm_gallery.data.batching.bin_packing import Packer, attention_length
from rm_gallery.data.batching.plan import PackingConfig, Plan
from rm_gallery.data.batching.prompt_sharing import sizes_of
from rm_gallery.data.config import DataConfig
from rm_gallery.data.sources import entries_of, resolve_files
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.token_cache.prepare import prepare

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
VOCABULARY = 4000
ORDERS: dict[str, dict[str, Any]] = {
    "pairs shuffled": {},
    "prompts shuffled": {"keep_prompts_together": True},
    "as in the file": {"shuffle": False},
}


def make_tokenizer(file: Path) -> Any:
    """A byte-pair tokenizer of what the file says."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    rows = pq.read_table(file, columns=["prompt", "chosen"]).to_pylist()
    backend.train_from_iterator([row["prompt"][-1]["content"] + row["chosen"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokenized(file: Path, cache: str) -> TokenData:
    config = DataConfig(train_files=str(file), cache_dir=cache)
    key = "data.train_files"
    tokenizer = make_tokenizer(file)
    return prepare(resolve_files(config, key=key), entries_of(config, key), config, tokenizer, key=key).data


def make_plan(data: TokenData, packer: Packer, **options: Any) -> Plan:
    return Plan(data.sizes, PackingConfig(**options), packer, seed=0, prompts=data.prompt_hashes)


def measure(data: TokenData, packer: Packer, *, share: bool, **options: Any) -> dict[str, float]:
    """One epoch's plan: tokens, cost of the slowest rank and mean over ranks, most responses, seconds of a step."""
    plan = make_plan(data, packer, share_prompts=share, **options)
    found = {"tokens": 0.0, "slowest": 0.0, "mean": 0.0, "most": 0.0}
    steps = plan.epoch_steps(0)
    start = time.process_time()
    for groups in steps:
        step = plan.step(data, groups)
        sizes = sizes_of(step.units)
        costs = np.array([packer.pack_costs(rank, sizes).sum() for rank in step.packs])
        found["tokens"] += packer.pack_tokens([pack for rank in step.packs for pack in rank], sizes).sum()
        found["slowest"] += costs.max()
        found["mean"] += costs.mean()
        found["most"] = max(found["most"], sizes.num_responses.max())
    return {**found, "milliseconds": 1000 * (time.process_time() - start) / len(steps)}


def train_seconds(data: TokenData, packer: Packer, *, num_steps: int, **options: Any) -> dict[bool, list[float]]:
    """CPU seconds of the first steps' passes, on and off interleaved."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    from rm_gallery.data.batching.packed_batch import collate
    from rm_gallery.modeling.reward_model import load_reward_model
    from rm_gallery.objectives import bradley_terry

    with tempfile.TemporaryDirectory() as folder:
        config = Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, num_labels=1, pad_token_id=2,
        )  # fmt: skip
        Qwen2ForSequenceClassification(config).save_pretrained(folder)
        model = load_reward_model(folder).model.train()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(3):
        for share, times in seconds.items():
            plan = make_plan(data, packer, share_prompts=share, **options)
            start = time.process_time()
            for groups in plan.epoch_steps(0)[:num_steps]:
                step = plan.step(data, groups)
                for pack in step.packs[0]:
                    batch = collate(step.load(data, pack))
                    bradley_terry(model(batch), batch)[0].backward()
            times.append(time.process_time() - start)
            model.zero_grad(set_to_none=True)
            torch.manual_seed(0)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--budget", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()
    print(
        "| data | order | batch | ranks | tokens | shared | saved | time saved | slowest rank | most responses | ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for file in options.files:
            data = tokenized(file, cache)
            for name, order in ORDERS.items():
                for batch in options.batches:
                    for ranks in options.ranks:
                        packer = Packer(options.budget, ranks, attention_length=attention_length(options.hidden_size))
                        off, on = (
                            measure(data, packer, share=share, train_batch_size=batch, **order)
                            for share in (False, True)
                        )
                        print(
                            f"| {file.stem} | {name} | {batch} | {ranks} | "
                            f"{off['tokens']:,.0f} | {on['tokens']:,.0f} | {1 - on['tokens'] / off['tokens']:.1%} | "
                            f"{1 - on['slowest'] / off['slowest']:.1%} | {off['slowest'] / off['mean']:.3f}, "
                            f"{on['slowest'] / on['mean']:.3f} | {on['most']:.0f} | {on['milliseconds']:.1f} |",
                            flush=True,
                        )
                if options.train:
                    packer = Packer(4096, attention_length=attention_length(512))
                    found = train_seconds(data, packer, num_steps=1, train_batch_size=options.batches[0], **order)
                    print({("on" if share else "off"): times for share, times in found.items()}, flush=True)


if __name__ == "__main__":
    main()
