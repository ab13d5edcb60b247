"""The specification's section "Data Preparation", run as written."""

from __future__ import annotations

import gzip
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

from rm_gallery.cli import main
from rm_gallery.core.generator import export, export_data
from tests.core.generator.exported import read_back
from tests.data.sources.stand_in import Repository, StandIn
from tests.spec.text import tab_blocks


def scored_cases(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Evaluation cases as the specification has them; every fifth is a tie."""
    draw = random.Random(seed)
    return [
        {
            "response_a": f"Answer {n}: " + "good " * draw.randint(1, 5),
            "response_b": f"Answer {n}: " + "bad " * draw.randint(1, 5),
            "score_a": draw.choice([1, 5]) if n % 5 else 3,
            "score_b": 3,
        }
        for n in range(count)
    ]


def train(model: Path, train_file: str, val_file: str, run: str) -> Path:
    settings = {
        "model.partial_pretrain": model,
        "model.fsdp_config.model_dtype": "fp32",
        "data.train_files": train_file,
        "data.val_files": val_file,
        "data.max_length": 128,
        "data.train_batch_size": 8,
        "data.bad_rows": "error",
        "trainer.total_training_steps": 1,
        "trainer.default_local_dir": "checkpoints",
        "trainer.experiment_name": run,
        "trainer.logger": "[console]",
    }
    assert main(["train", *(f"{key}={value}" for key, value in settings.items())]) == 0
    return Path("checkpoints") / run / "global_step_1"


def test_option_2_runs_as_written_and_its_files_train(spec: str, in_tmp: Path, qwen2_folder: Path) -> None:
    [snippet] = tab_blocks(spec, "Option 2: Convert from RM-Gallery evaluation data", "python")
    (in_tmp / "data").mkdir()
    names: dict[str, Any] = {"train_data": scored_cases(40, seed=0), "val_data": scored_cases(10, seed=1)}
    exec(compile(snippet, "bradley_terry.md", "exec"), names)
    assert names["export_data"] is export_data
    assert len(read_back(Path("data/bt_train.parquet"))) == 32 and len(read_back(Path("data/bt_val.parquet"))) == 8
    assert (train(qwen2_folder, "data/bt_train.parquet", "data/bt_val.parquet", "spec") / "model.safetensors").is_file()


def test_export_data_makes_the_pairs_of_option_2(spec: str, in_tmp: Path, qwen2_folder: Path) -> None:
    """`export_data` does in one call what the snippet does by hand: the same pairs, with their margins."""
    [snippet] = tab_blocks(spec, "Option 2: Convert from RM-Gallery evaluation data", "python")
    (in_tmp / "data").mkdir()
    cases = scored_cases(40, seed=0)
    names: dict[str, Any] = {"train_data": cases, "val_data": cases[:10]}
    exec(compile(snippet, "bradley_terry.md", "exec"), names)
    summary = export_data(
        cases, output_dir="data", formats=["parquet", "jsonl"], split_ratio={"train": 0.8, "test": 0.2}
    )
    files = [Path(f"data/{side}.parquet") for side in ("train", "test")]
    exported = {(row["chosen"], row["rejected"]) for file in files for row in read_back(file)}
    assert exported == {(row["chosen"], row["rejected"]) for row in read_back(Path("data/bt_train.parquet"))}
    assert (summary.ties, summary.sides["train"].num_rows, summary.sides["test"].num_rows) == (8, 26, 6)
    assert (train(qwen2_folder, "data/train.parquet", "data/test.parquet", "ours") / "model.safetensors").is_file()


def test_export_data_takes_the_cases_under_the_name_of_the_overview(linked_pages: str, in_tmp: Path) -> None:
    [call] = re.findall(r"`(export_data\(eval_cases=\.\.\., .*?\))`", linked_pages)
    names = {"export_data": export_data, "cases": scored_cases(40, seed=0)}
    summary = eval(call.replace("eval_cases=...", "eval_cases=cases"), names)
    assert summary.files == (Path("training_data/train.parquet"), Path("training_data/test.parquet"))
    assert [len(read_back(file)) for file in summary.files] == [26, 6]


def test_the_command_of_the_overview_reads_helpsteer2_from_the_hub(linked_pages: str, site: StandIn) -> None:
    """With the files of nvidia/HelpSteer2 at the stand-in: both splits are read, the folders of other data are not."""
    [command] = re.findall(r"`python -m rm_gallery\.core\.generator\.export (.*?)`", linked_pages)
    rows = [
        {"prompt": f"Question {n // 2}", "response": f"Answer {n}", "helpfulness": n % 2 + 2, "verbosity": 4 - n % 2}
        for n in range(40)
    ]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    preference = b'{"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 1}\n'
    files = {"README.md": b"# HelpSteer2", "train.jsonl.gz": gzip.compress(b"".join(lines[:30])),
             "validation.jsonl.gz": gzip.compress(b"".join(lines[30:])),
             "preference/preference.jsonl.gz": gzip.compress(preference)}  # fmt: skip
    site.repositories["nvidia/HelpSteer2"] = Repository({"main": files})
    assert export.main(shlex.split(command)) == 0
    pairs = [row for side in ("train", "test") for row in read_back(Path(f"data/{side}.parquet"))]
    assert sorted((row["prompt"], row["chosen"], row["rejected"], row["margin"]) for row in pairs) == sorted(
        (f"Question {n}", f"Answer {2 * n + 1}", f"Answer {2 * n}", 1.0) for n in range(20)
    )
