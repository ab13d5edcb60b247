"""The whole way: answers judged by a GradingRunner, exported, and a reward model trained on the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.cli import main as rm_gallery
from rm_gallery.core.generator import export_data
from rm_gallery.core.generator.export import main as export_command
from rm_gallery.core.graders.base_grader import BaseGrader, GraderError, GraderScore
from rm_gallery.core.runner import GradingRunner
from rm_gallery.scoring import RewardScorer
from tests.core.generator.exported import read_back


class GoodWords(BaseGrader):
    """One point for each `good`."""

    async def aevaluate(self, query: str, response: str) -> GraderScore | GraderError:
        if "broken" in response:
            raise ValueError("a broken answer")
        return GraderScore(name=self.name, score=response.count("good"))


def samples(count: int) -> list[dict[str, Any]]:
    """Three answers to each question; of the last question one cannot be judged."""
    made = [
        {"query": f"Question {n}?", "response": " ".join(["good"] * good + ["bad"] * (3 - good))}
        for n in range(count)
        for good in (n % 3, 3, 1)
    ]
    return [*made, {"query": f"Question {count - 1}?", "response": "broken"}]


def train(model: Path, files: Path, run: str, *overrides: str) -> Path:
    """The checkpoint of a short training on train.parquet and test.parquet."""
    settings = {
        "model.partial_pretrain": model, "model.fsdp_config.model_dtype": "fp32", "data.max_length": 128,
        "data.train_files": files / "train.parquet", "data.val_files": files / "test.parquet",
        "data.train_batch_size": 16, "optim.lr": "1e-3", "trainer.experiment_name": run,
        "trainer.default_local_dir": "checkpoints", "trainer.logger": "[console]",
    }  # fmt: skip
    assert rm_gallery(["train", *(f"{key}={value}" for key, value in settings.items()), *overrides]) == 0
    [checkpoint] = (Path("checkpoints") / run).glob("global_step_*")
    return checkpoint


@pytest.mark.slow
def test_from_judged_answers_to_a_reward_model(in_tmp: Path, qwen2_folder: Path) -> None:
    runner = GradingRunner({"words": GoodWords()}, show_progress=False, output_path="results.jsonl")
    results = runner.run(samples(20))
    summary = export_data(samples(20), "data", results=results, source="words")
    assert summary.failures == {"an error of the grader instead of a score": 1}
    assert {name: side.num_rows for name, side in summary.sides.items()} == {"train": 36, "test": 10}
    assert sum(side.num_prompts for side in summary.sides.values()) == 20

    checkpoint = train(qwen2_folder, Path("data"), "loop", "trainer.total_epochs=6")
    metrics = [json.loads(line) for line in Path("checkpoints/loop/metrics.jsonl").read_text().splitlines()]
    seen = [line["train/loss"] for line in metrics if "train/loss" in line]
    assert seen[-1] < seen[0], "it learns what the grader said"
    assert [line["val/accuracy"] for line in metrics if "val/accuracy" in line][-1] >= 0.8
    scorer = RewardScorer.from_folder(str(checkpoint))
    row = read_back(Path("data/test.parquet"))[0]
    better, worse = scorer.score([scorer.build_group(row["prompt"], [row["chosen"], row["rejected"]])])[0]
    assert better > worse


def test_the_command_exports_the_same_from_the_files_of_the_run(in_tmp: Path) -> None:
    with Path("samples.jsonl").open("w") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples(20))
    graders = {"words": GoodWords()}
    results = GradingRunner(graders, show_progress=False, output_path="results.jsonl").run(samples(20))
    export_data(samples(20), "data", results=results)
    arguments = "--input samples.jsonl --results results.jsonl --grader words --output-dir again"
    assert export_command(arguments.split()) == 0
    for side in ("train", "test"):
        assert read_back(Path(f"again/{side}.parquet")) == read_back(Path(f"data/{side}.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "mixed", "tools"])
def test_the_trainer_reads_every_kind_of_rows(kind: str, in_tmp: Path, qwen2_folder: Path) -> None:
    cases: list[dict[str, Any]] = []
    for n in range(20):
        prompt: Any = [{"role": "user", "content": f"Question {n}?"}]
        answer: Any = [{"role": "assistant", "content": f"good {n}"}]
        if kind == "tools":
            call = {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": {f"x{n}": n}}}],
                "content": "",
            }
            prompt = [*prompt, call, {"role": "tool", "content": "42"}]
        if kind == "text" or (kind == "mixed" and n % 2):
            prompt, answer = (None if kind == "text" else f"Question {n}?"), f"good {n}"
        cases.append(
            {"prompt": prompt, "response_a": answer, "response_b": f"bad {n}", "score_a": n % 7, "score_b": -1}
        )
    summary = export_data(cases, "data", source="here")
    assert (summary.num_rows, summary.num_failures) == (20, 0)
    train(qwen2_folder, Path("data"), kind, "trainer.total_epochs=1", "data.bad_rows=error")
