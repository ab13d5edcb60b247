"""Supervised fine-tuning before Bradley-Terry, against Bradley-Terry alone, from random weights.

    OMP_NUM_THREADS=1 python -m benchmarks.sft_then_bt --output RUNS.jsonl [--tasks quickstart,hh] [--data FOLDER]
        [--seeds 0,1,2]

quickstart: the pairs of `make quickstart`, 480 held out; all 10,000 or the first 1,000 of them. hh: hh_harmless_test of
FOLDER, split by the first user turn (`benchmarks/hh.py`); a public test split, so not a benchmark result.

Fine-tuning is on the chosen responses of the training pairs, "all chosen" on those of all 10,000. Bradley-Terry then
has the same steps as without it; "more epochs" has the additional epochs of fine-tuning as epochs of Bradley-Terry.
Nothing is selected: the held-out pairs are scored once per run, after the last step. Runs that are in RUNS.jsonl are
not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.run_file import complete

SFT_EPOCHS = 2
SETTINGS = {
    "quickstart": (  # as in its recipe
        "data.max_length=512", "data.train_batch_size=16", "data.max_tokens_per_micro_batch=4096", "data.shuffle=false",
        "optim.lr=1e-3", "optim.betas=[0.9,0.95]", "optim.weight_decay=0.01", "optim.lr_scheduler=cosine",
    ),
    "hh": (
        "data.max_length=1024", "data.train_batch_size=16", "data.max_tokens_per_micro_batch=4096", "optim.lr=1e-3",
        "optim.weight_decay=0.1",
    ),
}  # fmt: skip
COMMON = (
    "model.fsdp_config.model_dtype=fp32", "optim.warmup_steps_ratio=0.05", "trainer.device=cpu", "trainer.logger=[]",
    "trainer.save_freq=-1", "trainer.test_freq=-1",
)  # fmt: skip
VARIANTS = {
    # name: (task, training pairs or all, pairs whose chosen responses are fine-tuned on, epochs of Bradley-Terry)
    "10,000 pairs": ("quickstart", None, 0, 1),
    "10,000 pairs, SFT first": ("quickstart", None, None, 1),
    "1,000 pairs": ("quickstart", 1000, 0, 1),
    "1,000 pairs, more epochs": ("quickstart", 1000, 0, 1 + SFT_EPOCHS),
    "1,000 pairs, SFT first": ("quickstart", 1000, 1000, 1),
    "1,000 pairs, SFT on all chosen first": ("quickstart", 1000, None, 1),
    "HH": ("hh", None, 0, 1),
    "HH, more epochs": ("hh", None, 0, 1 + SFT_EPOCHS),
    "HH, SFT first": ("hh", None, None, 1),
}


def make_inputs(task: str, data: Path | None, folder: Path, seed: int) -> tuple[Path, Path, Path]:
    """(model, training pairs, held-out pairs), with weights of this seed."""
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from benchmarks import hh

    model = folder / "model"
    if task == "quickstart":
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("quickstart/model")).save_pretrained(model)
        AutoTokenizer.from_pretrained("quickstart/model").save_pretrained(model)
        return model, Path("quickstart/data/train.parquet"), Path("quickstart/data/val.parquet")
    assert data is not None
    training, held_out = hh.split_by_prompt(pq.read_table(data / "hh_harmless_test.parquet"))
    pq.write_table(training, folder / "hh_train.parquet")
    pq.write_table(held_out, folder / "hh_val.parquet")
    hh.write_model(model, training, "mini", seed)
    return model, folder / "hh_train.parquet", folder / "hh_val.parquet"


def train(task: str, name: str, model: Path, files: tuple[Path, Path], folder: Path, *settings: str) -> Any:
    from rm_gallery.training.config import load_config
    from rm_gallery.training.setup import run_training

    return run_training(
        load_config(
            None,
            [
                f"model.partial_pretrain={model}", f"data.train_files={files[0]}", f"data.val_files={files[1]}",
                f"trainer.default_local_dir={folder / 'runs'}", f"trainer.experiment_name={name}",
                *COMMON, *SETTINGS[task], *settings,
            ],
        )
    )  # fmt: skip


def first_rows(file: Path, number: int | None, folder: Path) -> Path:
    import pyarrow.parquet as pq

    if number is None:
        return file
    pq.write_table(pq.read_table(file).slice(0, number), folder / f"first_{number}.parquet")
    return folder / f"first_{number}.parquet"


def run(data: Path | None, variant: str, seed: int) -> dict[str, Any]:
    task, num_pairs, num_fine_tuned, epochs = VARIANTS[variant]
    began, perplexity = time.process_time(), None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, training, held_out = make_inputs(task, data, folder, seed)
        if num_fine_tuned != 0:
            files = first_rows(training, num_fine_tuned, folder), held_out
            settings = "objective.name=sft", "data.format=chosen", f"trainer.total_epochs={SFT_EPOCHS}"
            fine_tuned = train(task, "sft", model, files, folder, *settings, f"trainer.seed={seed}")
            model, perplexity = fine_tuned.checkpoint, fine_tuned.val_metrics["val/perplexity"]
        files = first_rows(training, num_pairs, folder), held_out
        found = train(task, "bt", model, files, folder, f"trainer.total_epochs={epochs}", f"trainer.seed={seed}")
    return {
        "accuracy": found.val_metrics["val/accuracy"],
        "loss": found.val_metrics["val/loss"], "perplexity": perplexity,
        "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and range over seeds, as Markdown."""
    lines = ["| variant | seeds | held-out accuracy | held-out loss |", "|---|---|---|---|"]
    for variant in VARIANTS:
        rows = [each for each in runs if each["variant"] == variant]
        cells = []
        for key, factor, digits in (("accuracy", 100, 1), ("loss", 1, 3)):
            values = [factor * row[key] for row in rows]
            if values:
                low, mean, high = min(values), statistics.fmean(values), max(values)
                cells.append(f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
        if rows:
            lines.append(f"| {variant} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="RUNS.jsonl")
    parser.add_argument("--tasks", default="quickstart,hh")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="holds hh_harmless_test.parquet")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    arguments = parser.parse_args()
    if "hh" in arguments.tasks and arguments.data is None:
        parser.error("hh needs --data FOLDER")

    cells = [
        {"variant": variant, "seed": seed}
        for seed in map(int, arguments.seeds.split(","))
        for variant, (task, *_) in VARIANTS.items()
        if task in arguments.tasks.split(",")
    ]
    runs = complete(arguments.output, cells, partial(run, arguments.data))
    print(table(runs))


if __name__ == "__main__":
    main()
