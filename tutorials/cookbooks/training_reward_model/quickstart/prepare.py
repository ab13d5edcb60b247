"""First step of the quickstart: preference data of our own making, a tokenizer and an untrained model.

    python -m tutorials.cookbooks.training_reward_model.quickstart.prepare FOLDER

A run of an earlier quickstart in the same folder is removed.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pyarrow.parquet as pq
from transformers.utils import logging as transformers_logging

from tutorials.cookbooks.training_reward_model.quickstart.make_data import write_data
from tutorials.cookbooks.training_reward_model.quickstart.make_model import write_model


def main() -> None:
    """Write everything and show one pair."""
    parser = argparse.ArgumentParser(description="Prepare the quickstart: data, tokenizer, untrained model.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    shutil.rmtree(folder / "run", ignore_errors=True)
    transformers_logging.disable_progress_bar()

    paths = write_data(folder / "data")
    sizes = {part: pq.read_metadata(path).num_rows for part, path in paths.items()}
    print(f"data   {folder / 'data'}: {sizes['train']} pairs for training, {sizes['val']} for validation, none shared")
    write_model(folder / "model", paths["train"])
    print(f"model  {folder / 'model'}: a small untrained Qwen2 decoder and its tokenizer")
    print("\nOne of the pairs:")
    row = pq.read_table(paths["train"]).slice(0, 1).to_pylist()[0]
    for message in row["prompt"]:
        print(f"  {message['role']:<9} {message['content']}")
    print(f"  chosen    {row['chosen']}\n  rejected  {row['rejected']}\n")


if __name__ == "__main__":
    main()
