"""Objectives on planted utilities: rankings of four with ties, and graded responses as in HelpSteer2.

    OMP_NUM_THREADS=1 python -m benchmarks.planted_scores [--tasks rankings,grades] [--seeds 0,1,2]

A response is six of eight letters, and its utility the sum of their hidden weights. Annotators see it with noise.

rankings: 60 rankings of four responses, whose noisy utilities (Gumbel noise, so the order is Plackett-Luce's) are
rounded to steps of 2, so that close ones tie. grades: 60 prompts with two responses and 60 with one, each with a
grade of 0 to 4: the rounded noisy utility (Gaussian noise), in the columns of HelpSteer2.

The accuracy is that of the rewards on the order of the utilities without noise, of 150 other prompts. Every objective
has the same model (a Qwen2 shape of two layers), rows, learning rate and number of epochs. Prints
mean and range over seeds.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

LETTERS = "abcdefgh"
RATES = ("2e-3",)
OBJECTIVES: dict[str, dict[str, tuple[str, ...]]] = {
    "rankings": {
        "bradley_terry, all pairs": (),
        "davidson, all pairs": ("objective.name=davidson",),
        "plackett_luce": ("objective.name=plackett_luce",),
        "plackett_luce, efron": ("objective.name=plackett_luce", "objective.ties=efron"),
    },
    "grades": {
        "bradley_terry": (),
        "scaled": ("objective.name=scaled",),
        "regression": ("objective.name=regression",),
        "regression, 5 bins": ("objective.name=regression", "objective.bins=5"),
        "regression_then_bt": ("objective.name=regression_then_bt",),
    },
}  # fmt: skip


def make_rows(task: str, count: int, seed: int, *, noisy: bool) -> list[dict[str, Any]]:
    """Rows of a task; without noise the labels are the utilities themselves."""
    of_letters, draw = random.Random(7), random.Random(seed)
    weights = {letter: of_letters.gauss(0, 1) for letter in LETTERS}
    rows: list[dict[str, Any]] = []
    for number in range(count):
        size = 4 if task == "rankings" else 2 if number % 2 or not noisy else 1
        texts = ["".join(draw.choices(LETTERS, k=6)) for _ in range(size)]
        utilities = [sum(weights[letter] for letter in text) for text in texts]
        if task == "rankings":
            noise = [-math.log(draw.expovariate(1)) for _ in texts]  # Gumbel's distribution
            scores = [2.0 * round((u + n) / 2) if noisy else u for u, n in zip(utilities, noise, strict=True)]
            rows.append({"prompt": f"Q{number}", "responses": texts, "scores": scores})
        else:
            grades = [min(4, max(0, round(2 + u / 2 + draw.gauss(0, 0.7)))) if noisy else u for u in utilities]
            rows += [
                {"prompt": f"Q{number}", "response": t, "helpfulness": g} for t, g in zip(texts, grades, strict=True)
            ]
    return rows


def accuracy(task: str, settings: tuple[str, ...], rate: str, seed: int, folder: Path) -> float:
    """On the order of the utilities, after the last step."""
    from rm_gallery import train

    values: dict[str, Any] = dict(each.split("=", 1) for each in settings)
    values = {key: int(value) if value.isdecimal() else value for key, value in values.items()}
    if "regression" in str(values.get("objective.name")):
        values["objective.score_column"] = "helpfulness"
    result = train(
        folder / "model", make_rows(task, 60 if task == "rankings" else 120, seed, noisy=True),
        make_rows(task, 150, 1000 + seed, noisy=False),
        **{
            "model.fsdp_config.model_dtype": "fp32", "data.max_length": 64, "data.train_batch_size": 32,
            "data.max_tokens_per_micro_batch": 4096, "optim.lr": float(rate), "optim.weight_decay": 0.01,
            "optim.warmup_steps_ratio": 0.1, "trainer.total_epochs": 10, "trainer.seed": seed, "trainer.logger": [],
            "trainer.device": "cpu", "trainer.default_local_dir": str(folder / "runs"),
            "trainer.experiment_name": f"{task}-{len(list((folder / 'runs').glob('*')))}", **values,
        },
    )  # fmt: skip
    return result.metrics["val/accuracy"]


def main() -> None:
    from tests.small import make_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(OBJECTIVES))
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model("qwen2", folder / "model", initializer_range=0.05)
        for task in arguments.tasks.split(","):
            for objective, settings in OBJECTIVES[task].items():
                for rate in RATES:
                    found = [accuracy(task, settings, rate, int(seed), folder) for seed in arguments.seeds.split(",")]
                    spread = f"{min(found):.3f} to {max(found):.3f}"
                    print(f"{task} {rate} {objective:26} {statistics.mean(found):.3f} ({spread})", flush=True)


if __name__ == "__main__":
    main()
