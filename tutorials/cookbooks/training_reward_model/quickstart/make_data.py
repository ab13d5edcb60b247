"""The quickstart's preference set: writes `train.parquet` and `val.parquet` into a folder.

    python -m tutorials.cookbooks.training_reward_model.quickstart.make_data FOLDER

Columns: `prompt` (list of {role, content}, ending with the user), `chosen` and `rejected` (the assistant's answer
as text), `skill`. Needs numpy and pyarrow, no torch.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutorials.cookbooks.training_reward_model.quickstart.skills import SKILLS, Twin

TRAIN_PAIRS_PER_SKILL = 1250
VAL_PAIRS_PER_SKILL = 60
VAL_SHARE_OF_CELLS = 6
"""One cell (subject x phrasing) of this many is kept for validation."""

Row = dict[str, object]
SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "chosen": pa.string(),
        "rejected": pa.string(),
        "skill": pa.string(),
    }
)


def write_data(folder: Path, *, seed: int = 0) -> dict[str, Path]:
    """Write both parts and return their paths by name, "train" and "val". The same seed gives the same rows.

    No prompt occurs twice, in one part or across the two. The rows of a twin stand next to each other, twins in
    random order: read in this order, a batch holds every answer once as chosen and once as rejected, so its gradient
    is about prompts from the first step on. Shuffled rows teach the same, but only after a longer plateau.
    """
    folder.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    paths: dict[str, Path] = {}
    for part, pairs_per_skill in {"train": TRAIN_PAIRS_PER_SKILL, "val": VAL_PAIRS_PER_SKILL}.items():
        rng = np.random.default_rng([seed, len(paths)])
        twins = [twin for skill in SKILLS for twin in draw_twins(skill, part, pairs_per_skill // 2, used, rng)]
        rows = [row for i in rng.permutation(len(twins)) for row in twins[i]]
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        paths[part] = folder / f"{part}.parquet"
        pq.write_table(table, paths[part])
    return paths


def draw_twins(skill: str, part: str, num_twins: int, used: set[str], rng: np.random.Generator) -> list[list[Row]]:
    """The rows of `num_twins` twins of one skill, from the cells of one part.

    used: prompts drawn so far, as JSON text; the new ones are added. A twin with a prompt among them is drawn again.
    """
    twins: list[list[Row]] = []
    while len(twins) < num_twins:
        twin = SKILLS[skill](rng)
        keys = {json.dumps(asked.prompt) for asked in twin}
        if len(keys) < 2 or keys & used or any(part_of(asked.cell) != part for asked in twin):
            continue
        used |= keys
        twins.append(twin_rows(twin, skill))
    return twins


def twin_rows(twin: Twin, skill: str) -> list[Row]:
    """Two rows in which each answer is chosen once and rejected once."""
    first, second = twin
    return [
        {"prompt": asked.prompt, "chosen": asked.answer, "rejected": other.answer, "skill": skill}
        for asked, other in ((first, second), (second, first))
    ]


def part_of(cell: str) -> str:
    """The part a cell belongs to: fixed by its text alone, whatever the seed."""
    return "val" if zlib.crc32(cell.encode()) % VAL_SHARE_OF_CELLS == 0 else "train"


def main() -> None:
    """Command line: the folder to write to, and a seed."""
    parser = argparse.ArgumentParser(description="Write the quickstart's preference set.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for part, path in write_data(arguments.folder, seed=arguments.seed).items():
        print(f"{part}: {pq.read_metadata(path).num_rows} pairs in {path}")


if __name__ == "__main__":
    main()
