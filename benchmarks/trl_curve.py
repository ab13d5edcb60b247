"""Loss curve of ours against TRL's RewardTrainer: same model, data order and hyper-parameters.

    python benchmarks/trl_curve.py --peer-python PATH_TO_PYTHON_WITH_TRL [--objective margin] [--data PAIRS.parquet]
        [--output FILE.json]

TRL lives in an environment of its own (torch, transformers, trl, datasets, pyarrow); this script starts itself there
with `--peer`. Both train a small Qwen2 reward model in float32 for 20 steps of 32 pairs at 1e-4 (cosine, AdamW,
clipping), read as chats. The parquet file has `prompt` (messages), `chosen`, `rejected`; without one, pairs are made
up. `--objective margin` gives both a margin of 0 to 3 of each pair, `center` a centering coefficient of 0.01, `both`
both.
Prints the two curves and their largest difference.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
from pathlib import Path
from typing import Any

STEPS, BATCH, RATE, MAX_LENGTH = 20, 32, 1e-4, 512
OBJECTIVES = {"plain": (), "margin": ("margin",), "center": ("center",), "both": ("margin", "center")}
CENTER = 0.01
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Made-up chats with answers of mixed lengths."""
    draw = random.Random(seed)
    words = ["river", "stone", "apple", "quiet", "morning", "garden", "letter", "window", "winter", "music"]
    rows = []
    for number in range(count):
        question = f"Question {number}: " + " ".join(draw.choices(words, k=draw.randint(3, 30))) + "?"
        answers = [" ".join(draw.choices(words, k=draw.randint(2, 40))) for _ in range(2)]
        rows.append({"prompt": [{"role": "user", "content": question}], "chosen": answers[0], "rejected": answers[1]})
    return rows


def write_inputs(folder: Path, data: Path | None, parts: tuple[str, ...]) -> None:
    """The parquet file and the model folder that both trainers start from, the reward head included."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

    if data:
        table = pq.read_table(data, columns=["prompt", "chosen", "rejected"])
        whole = [row for row in table.to_pylist() if sum(len(str(value)) for value in row.values()) < 2 * MAX_LENGTH]
        rows = whole[: STEPS * BATCH]
    else:
        rows = make_rows(STEPS * BATCH)
    if "margin" in parts:
        rows = [{**row, "margin": float(number % 4)} for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([str(row["prompt"][-1]["content"]) + row["chosen"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 1, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(folder / "model")


def train_ours(folder: Path, parts: tuple[str, ...]) -> list[float]:
    """Loss of each step, by the ordinary trainer."""
    from rm_gallery.cli import main

    status = main(
        [
            "train",
            f"model.partial_pretrain={folder / 'model'}",
            f"data.train_files={folder / 'pairs.parquet'}",
            f"data.max_length={MAX_LENGTH}",
            f"data.train_batch_size={BATCH}",
            "data.shuffle=false",
            "data.max_tokens_per_micro_batch=4096",
            "model.fsdp_config.model_dtype=fp32",
            f"optim.lr={RATE}",
            "optim.clip_grad=1.0",
            "optim.weight_decay=0.1",
            f"trainer.total_training_steps={STEPS}",
            f"trainer.default_local_dir={folder / 'ours'}",
            "trainer.experiment_name=bt",
            *(["objective.name=margin"] if "margin" in parts else []),
            *([f"objective.center_coefficient={CENTER}"] if "center" in parts else []),
        ]
    )
    if status:
        raise SystemExit(status)
    lines = (folder / "ours/bt/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def train_peer(folder: Path, parts: tuple[str, ...]) -> list[float]:
    """Loss of each step, by TRL; read where it is computed, since the library rounds what it logs."""
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": row[side]}]
    losses: list[float] = []

    class Recording(RewardTrainer):
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            result = super().compute_loss(*arguments, **options)
            losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
            return result

    micro = 8
    trainer = Recording(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32, num_labels=1),
        args=RewardConfig(
            output_dir=str(folder / "peer"), per_device_train_batch_size=micro, max_steps=STEPS,
            gradient_accumulation_steps=BATCH // micro, max_length=MAX_LENGTH, learning_rate=RATE,
            lr_scheduler_type="cosine", adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.1,
            max_grad_norm=1.0, train_sampling_strategy="sequential", report_to=[], save_strategy="no", use_cpu=True,
            bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            center_rewards_coefficient=CENTER if "center" in parts else None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    trainer.train()
    per_step = BATCH // micro
    return [sum(losses[at : at + per_step]) / per_step for at in range(0, len(losses), per_step)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="python of an environment with TRL")
    parser.add_argument("--data", type=Path, help="parquet file of preference pairs with messages as prompt")
    parser.add_argument("--objective", choices=[*OBJECTIVES], default="plain", help="what is added to the loss")
    parser.add_argument("--output", type=Path, help="write the curves as JSON")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(train_peer(arguments.peer, OBJECTIVES[arguments.objective])))
        return
    if not arguments.peer_python:
        parser.error("--peer-python is needed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, arguments.data, OBJECTIVES[arguments.objective])
        ours = train_ours(folder, OBJECTIVES[arguments.objective])
        peer = subprocess.run(
            [arguments.peer_python, __file__, "--peer", name, "--objective", arguments.objective],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        theirs = json.loads(peer.stdout.splitlines()[-1])
    print(f"{'step':>4}  {'ours':>10}  {'TRL':>10}  {'difference':>10}")
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"{step:>4}  {a:>10.7f}  {b:>10.7f}  {a - b:>10.1e}")
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference over {len(ours)} steps: {worst:.1e}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"ours": ours, "trl": theirs, "largest_difference": worst}, indent=2))


if __name__ == "__main__":
    main()
