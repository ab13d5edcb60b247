"""The specification's section "Using Trained Models": its three snippets as written, but for path and name."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.cli import main
from tests.small import text_pairs, write_pairs
from tests.spec.text import code_blocks

HEADINGS = ("1. Load as OpenAI-Compatible Model", "2. Use in Graders", "3. Batch Evaluation with GradingRunner")


def run(code: str, names: dict[str, Any]) -> None:
    """Run code that awaits at its top level, as a notebook does; its names stay in `names`."""
    waiting = eval(compile(code, "bradley_terry.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    if waiting is not None:
        asyncio.run(waiting)


def test_the_three_snippets_run_as_written(
    spec: str, in_tmp: Path, qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(in_tmp / "train.parquet", text_pairs(8))
    settings = {
        "model.partial_pretrain": qwen2_folder,
        "model.fsdp_config.model_dtype": "fp32",
        "data.train_files": "train.parquet",
        "data.max_length": 128,
        "data.train_batch_size": 8,
        "trainer.total_epochs": 1,
        "trainer.default_local_dir": "checkpoints/bt",
        "trainer.experiment_name": "tiny",
    }
    assert main(["train", *(f"{key}={value}" for key, value in settings.items())]) == 0

    snippets = [code_blocks(spec, heading, "python")[0] for heading in HEADINGS]
    assert snippets[0].count("qwen2.5-7b-bt/global_step_3000") == 1
    snippets[0] = snippets[0].replace("qwen2.5-7b-bt/global_step_3000", "tiny/global_step_1")
    samples = [{"query": row["chosen"][:11], "response": row["chosen"][11:]} for row in text_pairs(6, seed=1)]
    names: dict[str, Any] = {"your_dataset": samples}

    run(snippets[0], names)
    assert names["model"].is_reward_model
    capsys.readouterr()
    run(snippets[1], names)
    assert capsys.readouterr().out == f"Score: {names['result'].score}\n"
    assert names["result"].metadata["reward"] == names["result"].score
    run(snippets[2], names)
    assert list(names["results"]) == ["custom_reward"]
    expected = [names["grader"].evaluate(**sample).score for sample in samples]
    assert [result.score for result in names["results"]["custom_reward"]] == pytest.approx(expected, abs=1e-4)
