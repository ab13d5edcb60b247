"""Supervised fine-tuning: our loss curve and speed against TRL's SFTTrainer, on the same model, data and order.

    python benchmarks/sft.py --peer-python PATH_TO_PYTHON_WITH_TRL [--peer-path FOLDER] [--output FILE.json]

TRL lives in an environment of its own, or unpacked in a folder (`--peer-path`). Both train a small Qwen2 in float32 on
made-up conversations with the loss on assistant tokens, 8 steps of 16 conversations at 1e-3 (cosine, AdamW, clipping).
Prints both curves, their largest difference, and tokens per second of each repeat: tokens of the data over the seconds
of all steps but the first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

STEPS, BATCH, MICRO, RATE, MAX_LENGTH = 8, 16, 8, 1e-3, 1024
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of one to four exchanges; questions and answers of mixed lengths."""
    draw = random.Random(0)
    words = ["river", "stone", "apple", "quiet", "morning", "garden", "letter", "window", "winter", "music"]
    rows = []
    for number in range(count):
        turns: list[dict[str, str]] = []
        for _ in range(draw.randint(1, 4)):
            question = f"Question {number}: " + " ".join(draw.choices(words, k=draw.randint(3, 25))) + "?"
            answer = " ".join(draw.choices(words, k=draw.randint(2, 60)))
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns})
    return rows


def write_inputs(folder: Path) -> int:
    """The data and the model folder that both trainers start from; returns the tokens of the data."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    rows = make_rows(STEPS * BATCH)
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([turn["content"] for row in rows for turn in row["messages"]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8_000, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, max_position_embeddings=MAX_LENGTH,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    return sum(len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in rows)


def train_ours(folder: Path, run: str) -> tuple[list[float], list[float]]:
    """Loss and seconds of each step, by the ordinary trainer in a process of its own."""
    command = [
        sys.executable, "-m", "rm_gallery.cli", "train", "objective.name=sft",
        f"model.partial_pretrain={folder / 'model'}", f"data.train_files={folder / 'train.jsonl'}",
        f"data.max_length={MAX_LENGTH}", f"data.train_batch_size={BATCH}", "data.shuffle=false",
        "data.max_tokens_per_micro_batch=4096", "model.fsdp_config.model_dtype=fp32", f"optim.lr={RATE}",
        "optim.clip_grad=1.0", f"trainer.total_training_steps={STEPS}", "trainer.log_freq=1",
        f"trainer.default_local_dir={folder / run}", "trainer.experiment_name=sft",
    ]  # fmt: skip
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / run / "sft/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["train/loss"] for line in lines], [line["perf/step_seconds"] for line in lines]


def train_peer(folder: Path) -> tuple[list[float], list[float]]:
    """The same by TRL; losses are read where they are computed, since the library rounds what it logs."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    losses: list[float] = []
    ends: list[float] = []

    class Recording(SFTTrainer):
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            result = super().compute_loss(*arguments, **options)
            losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
            return result

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    trainer = Recording(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder / "peer"), per_device_train_batch_size=MICRO, max_steps=STEPS,
            gradient_accumulation_steps=BATCH // MICRO, max_length=MAX_LENGTH, learning_rate=RATE,
            lr_scheduler_type="cosine", adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.0,
            max_grad_norm=1.0, train_sampling_strategy="sequential", report_to=[], save_strategy="no", use_cpu=True,
            bf16=False, gradient_checkpointing=False, disable_tqdm=True, assistant_only_loss=True, packing=False,
        ),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    parts = BATCH // MICRO  # each is divided by the tokens of the whole step
    return [sum(losses[at : at + parts]) for at in range(0, len(losses), parts)], [
        end - start for start, end in pairwise(ends)
    ]


def run_peer(arguments: argparse.Namespace, folder: Path) -> tuple[list[float], list[float]]:
    """`train_peer` in the other environment."""
    paths = [str(arguments.peer_path)] if arguments.peer_path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    command = [arguments.peer_python, __file__, "--peer", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    losses, seconds = json.loads(done.stdout.splitlines()[-1])
    return losses, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="python of an environment with TRL")
    parser.add_argument("--peer-path", type=Path, help="folder with TRL, for PYTHONPATH")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(train_peer(arguments.peer)))
        return
    if not arguments.peer_python:
        parser.error("--peer-python is needed")
    speeds: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_inputs(folder) * (STEPS - 1) / STEPS
        for repeat in range(arguments.repeats):
            ours, our_seconds = train_ours(folder, f"ours{repeat}")
            theirs, their_seconds = run_peer(arguments, folder)
            speeds.append((tokens / sum(our_seconds[1:]), tokens / sum(their_seconds[-(STEPS - 1) :])))
    print(f"{'step':>4}  {'ours':>10}  {'TRL':>10}  {'difference':>10}")
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"{step:>4}  {a:>10.7f}  {b:>10.7f}  {a - b:>10.1e}")
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference over {len(ours)} steps: {worst:.1e}")
    ratios = [a / b for a, b in speeds]
    for a, b in speeds:
        print(f"tokens per second: ours {a:.0f}, TRL {b:.0f}, ratio {a / b:.2f}")
    print(f"ratio {statistics.mean(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    if arguments.output:
        found = {"ours": ours, "trl": theirs, "largest_difference": worst, "tokens_per_second": speeds}
        arguments.output.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
