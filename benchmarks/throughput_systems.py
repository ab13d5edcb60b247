"""The systems that benchmarks/throughput.py compares; each runs in a process of its own and prints one JSON record.

    python throughput_systems.py ours|trl|padded '{"folder": ..., "dtype": "bf16", ...}'

Needs nothing but itself for `trl`, which runs in another environment.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

BATCH, RATE, CLIP = 32, 1e-4, 1.0
PAD_TO = 4096


def resident_mib() -> float:
    """The highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_chats(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(folder / "pairs.parquet").to_pylist()
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": row[side]}]
    return rows


def trl(folder: Path, dtype: str, micro_batch: int) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    rows, before = read_chats(folder), resident_mib()
    shapes: list[int] = []

    class Counting(RewardTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            shapes.append(inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *arguments, **options)

    trainer = Counting(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32, num_labels=1),
        args=RewardConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=micro_batch, num_train_epochs=1,
            gradient_accumulation_steps=BATCH // micro_batch, max_length=1024, learning_rate=RATE, max_grad_norm=CLIP,
            report_to=[], save_strategy="no", use_cpu=True, bf16=dtype == "bf16", gradient_checkpointing=False,
            disable_tqdm=True, logging_steps=10**6,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    pairs = len(trainer.train_dataset)
    return {
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": sum(shapes) / seconds,
        "micro_batch_tokens": sum(shapes) / len(shapes),
        "peak_mib": resident_mib() - before,
        "micro_batch": micro_batch,
    }


def ours(folder: Path, dtype: str, token_budget: int) -> dict[str, float]:
    """The ordinary trainer over all pairs once."""
    import tempfile

    from benchmarks.matrix_rate import matrix_rate, operations
    from rm_gallery.training.config import load_config
    from rm_gallery.training.setup import run_training
    from rm_gallery.training.trainer import Trainer

    done: list[tuple[Any, ...]] = []
    original = Trainer.train_step

    def train_step(self: Any, batches: Any, *rest: Any) -> Any:
        done.extend((self.model.network.config, batch.group_lengths, batch.tail_lengths) for batch in batches.batches)
        return original(self, batches, *rest)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    rate_before, before = matrix_rate(dtype), resident_mib()
    with tempfile.TemporaryDirectory() as run:
        settings = [
            f"model.partial_pretrain={folder / 'model'}", f"model.fsdp_config.model_dtype={dtype}",
            f"data.train_files={folder / 'pairs.parquet'}", f"data.train_batch_size={BATCH}", "data.max_length=1024",
            f"data.max_tokens_per_micro_batch={token_budget}", f"optim.lr={RATE}", f"optim.clip_grad={CLIP}",
            f"trainer.default_local_dir={run}", "trainer.logger=[]", "trainer.device=cpu",
            "data.keep_prompts_together=true",
        ]  # fmt: skip
        result = run_training(load_config(None, settings))
        rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(row["perf/step_seconds"] for row in rows)
    pairs = sum(row["perf/pairs_per_second"] * row["perf/step_seconds"] for row in rows)
    tokens = sum(row["perf/tokens_per_second"] * row["perf/step_seconds"] for row in rows)
    work = sum(operations(*each) for each in done)
    rate = (rate_before + matrix_rate(dtype)) / 2
    return {
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": tokens / seconds,
        "matrix_share": work / seconds / rate,
        "matrix_gflops": rate / 1e9,
        "peak_mib": resident_mib() - before,
        "token_budget": token_budget,
    }


def padded(folder: Path, dtype: str, pairs: int) -> dict[str, float]:
    """Every text padded to 4,096 tokens, one pair a micro-batch: the trainer that the specification describes."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows, before = read_chats(folder)[:pairs], resident_mib()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32, num_labels=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    start = time.perf_counter()
    for row in rows:
        texts = [tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False)
                 for side in ("chosen", "rejected")]  # fmt: skip
        batch = tokenizer(texts, padding="max_length", max_length=PAD_TO, return_tensors="pt", add_special_tokens=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            chosen, rejected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        (-F.logsigmoid((chosen - rejected).float()) / BATCH).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    seconds = time.perf_counter() - start
    return {
        "pairs_per_second": len(rows) / seconds,
        "tokens_per_second": 2 * PAD_TO * len(rows) / seconds,
        "peak_mib": resident_mib() - before,
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    folder_of_run = Path(arguments.pop("folder"))
    record = {"ours": ours, "trl": trl, "padded": padded}[sys.argv[1]](folder_of_run, **arguments)
    print(json.dumps(record))
