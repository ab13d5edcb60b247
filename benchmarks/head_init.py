"""Starts of a new reward head (`model.head_init`) on the quick start's data: validation after a few steps.

    python -m benchmarks.head_init [--model quickstart/model] [--data quickstart/data] [--steps 150] [--seeds 0,1,2]
        [--words Y,N] [KEY=VALUE ...]

Prints mean and spread over seeds of accuracy and loss on the validation pairs. OMP_NUM_THREADS=1: half a minute a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

STARTS = ("normal", "zero", "lm_head_difference")


def curve(arguments: argparse.Namespace, start: str, seed: int, folder: Path) -> dict[int, tuple[float, float]]:
    """Step -> (accuracy, loss) on the validation pairs."""
    from rm_gallery.cli import main

    name = f"{start}-{seed}"
    status = main([
        "train", f"model.partial_pretrain={arguments.model}", "model.fsdp_config.model_dtype=fp32",
        f"model.head_init={start}", f"model.head_init_words=[{arguments.words}]",
        f"data.train_files={arguments.data}/train.parquet", f"data.val_files={arguments.data}/val.parquet",
        "data.train_batch_size=16", "data.max_tokens_per_micro_batch=4096", "data.max_length=512", "optim.lr=1e-3",
        f"trainer.total_training_steps={arguments.steps}", f"trainer.test_freq={arguments.steps // 3}",
        f"trainer.default_local_dir={folder}", f"trainer.experiment_name={name}", f"trainer.seed={seed}",
        "trainer.logger=[]", "trainer.device=cpu", *arguments.settings,
    ])  # fmt: skip
    assert status == 0
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["val/accuracy"], row["val/loss"]) for row in rows if "val/accuracy" in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--data", default="quickstart/data")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--words", default="Y,N")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for start in STARTS:
            curves = [curve(arguments, start, int(seed), Path(folder)) for seed in arguments.seeds.split(",")]
            for step in curves[0]:
                for what, values in zip(("accuracy", "loss"), zip(*(each[step] for each in curves), strict=True),
                                        strict=True):  # fmt: skip
                    spread = f"{min(values):.3f} to {max(values):.3f}"
                    print(f"{start:20} step {step:4} {what:8} {statistics.mean(values):.3f} ({spread})", flush=True)


if __name__ == "__main__":
    main()
