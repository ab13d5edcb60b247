"""Speed and convergence on real conversations: a decoder from scratch on the HH-RLHF harmlessness pairs.

    python benchmarks/hh.py --data FOLDER [--size tiny|25m] [--epochs 2] [--quick] [--output FILE.json] [KEY=VALUE ...]

FOLDER holds hh_harmless_test.parquet. A tenth of its prompts is held out: a conversation goes by its first user turn,
so that no prompt is on both sides. Tokenizer and random weights are made on the spot, all in a temporary folder.
This is a public test split: the figures say that training converges and how fast it runs, and are never to be
reported as a benchmark result. KEY=VALUE are settings of `rm-gallery train`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HELD_OUT_SHARE = 0.1
NUM_QUICK = 200

# vocabulary, hidden, intermediate, layers, heads, key-value heads
SIZES = {"mini": (4000, 128, 384, 4, 4, 2), "tiny": (8000, 256, 768, 4, 4, 2), "25m": (16000, 512, 1536, 8, 8, 4)}

SETTINGS = [
    "data.max_length=1024",
    "data.max_tokens_per_micro_batch=4096",
    "data.train_batch_size=16",
    "optim.lr=5e-4",
    "optim.weight_decay=0.1",
    "optim.warmup_steps_ratio=0.05",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def is_held_out(first_turn: str) -> bool:
    """Whether conversations that open so are for validation; a function of the text alone."""
    number = int.from_bytes(hashlib.sha256(first_turn.encode()).digest()[:4])
    return number < HELD_OUT_SHARE * 2**32


def split_by_prompt(table: Any) -> tuple[Any, Any]:
    """(training, validation) rows of an arrow table."""
    import pyarrow as pa
    import pyarrow.compute as pc

    first_turns = [prompt[0]["content"] for prompt in table["prompt"].to_pylist()]
    mask = pa.array([is_held_out(text) for text in first_turns])
    return table.filter(pc.invert(mask)), table.filter(mask)


def texts_of(table: Any) -> Iterator[str]:
    for row in table.to_pylist():
        yield from (message["content"] for message in row["prompt"])
        yield from (row["chosen"], row["rejected"])


def write_model(folder: Path, table: Any, size: str, seed: int = 0) -> int:
    """A byte-level BPE tokenizer trained on the table's texts, and a random Qwen2 decoder; returns its parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocab_size, hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts_of(table), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def train(folder: Path, epochs: int, overrides: Sequence[str]) -> list[dict[str, float]]:
    """One run of the trainer; returns the lines of its metrics.jsonl."""
    from rm_gallery.training.config import load_config
    from rm_gallery.training.setup import run_training

    config = load_config(
        None,
        [
            f"model.partial_pretrain={folder / 'model'}",
            f"data.train_files={folder / 'train.parquet'}",
            f"data.val_files={folder / 'val.parquet'}",
            f"trainer.default_local_dir={folder / 'runs'}",
            f"trainer.total_epochs={epochs}",
            "trainer.val_before_train=true",
            *SETTINGS,
            *overrides,
        ],
    )
    result = run_training(config)
    lines = (result.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def summarize(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Training loss of the first and last tenth of the steps, validation before and after, and median rates.

    The rates leave out the first tenth, in which memory is first touched.
    """
    steps = [row for row in metrics if "train/loss" in row]
    validations = [row for row in metrics if "val/loss" in row]
    tenth = max(1, len(steps) // 10)
    settled = steps[tenth:] or steps

    def mean(rows: Sequence[dict[str, float]], name: str) -> float:
        return statistics.fmean(row[name] for row in rows)

    return {
        "steps": max(row["step"] for row in steps),
        "train_loss_first_tenth": mean(steps[:tenth], "train/loss"),
        "train_loss_last_tenth": mean(steps[-tenth:], "train/loss"),
        "train_accuracy_last_tenth": mean(steps[-tenth:], "train/accuracy"),
        "val_loss_before": validations[0]["val/loss"],
        "val_loss": validations[-1]["val/loss"],
        "val_accuracy": validations[-1]["val/accuracy"],
        "pairs_per_second": statistics.median(row["perf/pairs_per_second"] for row in settled),
        "tokens_per_second": statistics.median(row["perf/tokens_per_second"] for row in settled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of rm-gallery train")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few hundred pairs: does it run?")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_intermixed_args()

    import pyarrow.parquet as pq
    import torch
    from transformers.utils import logging as transformers_logging

    from rm_gallery.log import setup_logging

    setup_logging(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    table = pq.read_table(arguments.data / "hh_harmless_test.parquet")
    training, validation = split_by_prompt(table.slice(0, NUM_QUICK) if arguments.quick else table)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pq.write_table(training, folder / "train.parquet")
        pq.write_table(validation, folder / "val.parquet")
        parameters = write_model(folder / "model", training, arguments.size)
        metrics = train(folder, arguments.epochs, arguments.overrides)
        facts = json.loads((folder / "runs" / "bt" / "run.json").read_text(encoding="utf-8"))
    summary = summarize(metrics)
    print(
        f"\n{parameters / 1e6:.1f}M parameters, {training.num_rows} pairs to train on, {validation.num_rows} held out"
    )
    for key, value in summary.items():
        print(f"{key:<26} {value:10.4f}" if abs(value) < 10 else f"{key:<26} {value:10.1f}")
    print("A public test split: for speed and convergence only, not a benchmark result.")
    if arguments.output:
        where = {"device": facts["device"], "machine": platform.machine(), "threads": torch.get_num_threads()}
        what = {"size": arguments.size, "parameters": parameters, "settings": [*SETTINGS, *arguments.overrides]}
        record = {**what, **where, "commit": facts["commit"], "versions": facts["versions"], "summary": summary}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
