"""Last step of the quickstart: score held-out answers with the trained model, and print the next commands.

python -m tutorials.cookbooks.training_reward_model.quickstart.show FOLDER
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pyarrow.parquet as pq

from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from rm_gallery.training.checkpoint import list_checkpoints

SIDES = ("chosen", "rejected")
SKILLS = ("topic", "change_of_mind")
"""One validation prompt of each is shown; no validation prompt occurs in training."""


def main() -> None:
    """Score the answers with the newest checkpoint and print the next commands."""
    parser = argparse.ArgumentParser(description="Show what the quickstart's model has learned.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    checkpoints = list_checkpoints(folder / "run")
    if not checkpoints:
        parser.error(f"{folder / 'run'} holds no checkpoint; train first (make quickstart)")
    scorer = RewardScorer.from_folder(checkpoints[-1])
    rows = pq.read_table(folder / "data/val.parquet").to_pylist()
    shown = [next(row for row in rows if row["skill"] == skill) for skill in SKILLS]
    groups = [
        PreferenceGroup(row["prompt"], [[{"role": "assistant", "content": row[side]}] for side in SIDES], style="chat")
        for row in shown
    ]
    print("\nRewards of answers to held-out prompts:")
    for row, (first, second) in zip(shown, scorer.score(groups), strict=True):
        print()
        for message in row["prompt"]:
            print(f"  {message['role']:<15} {message['content']}")
        print(f"  reward {first:+8.3f} {row['chosen']}\n  reward {second:+8.3f} {row['rejected']}")
        print(f"  P(first is better) = {1 / (1 + math.exp(second - first)):.3f}")
    print(
        f"""
Curves: {folder / "run/curves.png"}    every step: {folder / "run/metrics.jsonl"}    model: {checkpoints[-1]}

Next, train on your own pairs (parquet with columns chosen and rejected, and optionally prompt):

  .venv/bin/rm-gallery train model.partial_pretrain={folder / "model"} \\
      data.train_files=YOUR_TRAIN.parquet data.val_files=YOUR_VAL.parquet \\
      data.max_length=512 data.train_batch_size=32 optim.lr=5e-4 trainer.experiment_name=mine

or start from a pretrained model: set model.partial_pretrain to its folder (see README.md)."""
    )


if __name__ == "__main__":
    main()
