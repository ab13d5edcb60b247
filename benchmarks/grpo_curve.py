"""A GRPO run of TRL on a small policy made on the spot, whose reward by a reward model of ours rises; with a curve.

    python -m benchmarks.grpo_curve --steps 60 --output docs/grpo-reward.svg

Needs TRL and the outputs of `make quickstart`: its data and its reward model. The policy has the quick start's
tokenizer and shape. It first learns the assistant's answers of the data, right and wrong ones alike, and answers by
chance; GRPO then makes it give the answers that the reward model prefers. Prints a row per ten steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.trl_grpo import make_trainer


def make_policy(folder: Path, rows: list[dict[str, Any]], *, steps: int = 300, batch: int = 16, seed: int = 0) -> Any:
    """(policy, tokenizer): the quick start's model as a language model of chosen and rejected answers."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        texts, starts = [], []
        for index in torch.randint(2 * len(rows), (batch,), generator=draw).tolist():
            row, answer = rows[index // 2], ("chosen", "rejected")[index % 2]
            before = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            texts.append(f"{before}{row[answer]}<|im_end|>")
            starts.append(len(tokenizer(before)["input_ids"]))
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        places = torch.arange(inputs["input_ids"].shape[1])
        is_answer = (places >= torch.tensor(starts)[:, None]) & inputs["attention_mask"].bool()
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(~is_answer, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"policy: loss {loss.item():.3f} after {steps} steps", flush=True)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|im_end|>"
    return model, tokenizer


def run(folder: Path, *, steps: int, seed: int = 0) -> list[dict[str, float]]:
    """The log of a run: mean reward, and its standard deviation over the completions of a prompt, of each step."""
    from datasets import Dataset

    rows = pq.read_table(folder / "data/train.parquet").to_pylist()
    policy, tokenizer = make_policy(folder / "model", rows, seed=seed)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(
            policy, str(folder / "run"), Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
            tokenizer=tokenizer, output_dir=output, max_steps=steps, per_device_train_batch_size=64,
            num_generations=8, max_completion_length=24, learning_rate=1e-3, lr_scheduler_type="constant", beta=0.0,
            use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
            report_to="none", seed=seed, disable_tqdm=True,
        )  # fmt: skip
        trainer.train()
    return [
        {"step": each["step"], "reward": float(each["reward"]), "std": float(each["reward_std"])}
        for each in trainer.state.log_history
        if "reward" in each
    ]


def plot(log: list[dict[str, float]], path: Path) -> None:
    """The reward by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2))
    axes.plot([each["step"] for each in log], [each["reward"] for each in log], linewidth=1.5)
    axes.set(xlabel="step", ylabel="mean reward", title="GRPO with the quick start's reward model")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    log = run(arguments.quickstart, steps=arguments.steps, seed=arguments.seed)
    for index in range(0, len(log), 10):
        part = log[index : index + 10]
        means = {name: sum(each[name] for each in part) / len(part) for name in ("reward", "std")}
        print(f"steps {index + 1}-{index + len(part)}: " + json.dumps({k: round(v, 3) for k, v in means.items()}))
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.output is not None:
        plot(log, arguments.output)


if __name__ == "__main__":
    main()
