"""What saving costs: the share of training time that checkpoints every few steps take, in background and foreground.

    python -m benchmarks.saving [--steps 40] [--save-freq 10] [--repeats 3] [--processes 1] [--threads 2]
                                [--output FILE.json]

A Qwen2 shape of 25 million parameters (hidden 512, 8 layers) is trained on made-up pairs on the CPU: without saves (but
the one at the end), with saves in the foreground, and in the background, in turns. Measured is the time from the first
step's log line to the last one's; the first save, which is rescored, lies before it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, tuple[str, ...]] = {
    "none": ("trainer.save_freq=-1",),
    "foreground": ("trainer.async_save=false",),
    "background": ("trainer.async_save=true",),
}


def make_inputs(folder: Path) -> None:
    from tests.small import make_model, text_pairs, write_pairs

    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}
    make_model("qwen2", folder / "model", layers=8, vocab_size=16000, initializer_range=0.02, **shape)
    write_pairs(folder / "train.parquet", text_pairs(400))


def measure(folder: Path, way: str, number: int, options: argparse.Namespace) -> float:
    """Seconds from the log line of step `save_freq` to that of the last step but those of the last save."""
    name = f"{way}-{number}"
    arguments = [
        f"model.partial_pretrain={folder / 'model'}", f"data.train_files={folder / 'train.parquet'}",
        "data.max_length=256", "data.train_batch_size=16", "optim.lr=1e-4", "trainer.device=cpu", "trainer.logger=[]",
        f"trainer.total_training_steps={options.steps + options.save_freq + 1}",
        f"trainer.save_freq={options.save_freq}", "trainer.max_ckpt_to_keep=1",
        f"trainer.default_local_dir={folder}", f"trainer.experiment_name={name}", *WAYS[way],
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    program = [*torchrun, "-m"] if options.processes > 1 else ["-m"]
    command = [sys.executable, *program, "rm_gallery.cli", "train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    times = {row["step"]: row["time"] for row in map(json.loads, lines) if "train/loss" in row}
    return float(times[options.save_freq + 1 + options.steps] - times[options.save_freq + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in {"steps": 40, "save-freq": 10, "repeats": 3, "processes": 1, "threads": 2}.items():
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        for number in range(options.repeats):
            for way in WAYS:
                seconds[way].append(measure(Path(name), way, number, options))
    saves = options.steps // options.save_freq
    print(f"{options.steps} steps with {saves} saves, {options.processes} processes of {options.threads} threads")
    print(f"{'saving':12}{'seconds (each repeat)':32}{'share of training time: median, range':>40}")
    shares: dict[str, Any] = {}
    for way, each in seconds.items():
        found = sorted(1 - plain / took for plain, took in zip(seconds["none"], each, strict=True))
        shares[way] = found
        spread = f"{statistics.median(found):9.1%}  {found[0]:.1%} to {found[-1]:.1%}" if way != "none" else ""
        print(f"{way:12}{', '.join(f'{value:.2f}' for value in each):32}{spread:>40}")
    if options.output:
        facts = {name: value for name, value in vars(options).items() if name != "output"}
        options.output.write_text(json.dumps({**facts, "seconds": seconds, "shares": shares}, indent=2) + "\n")


if __name__ == "__main__":
    main()
