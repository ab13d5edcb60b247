"""The command line: what it writes and prints, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.core.generator import export_data
from rm_gallery.core.generator.export import main
from rm_gallery.core.generator.write import known_dataset
from rm_gallery.core.runner.fingerprint import of_sample
from tests.core.generator.exported import both_sides, graded, read_back

ROOT = Path(__file__).parents[3]
NAME = "rm_gallery.core.generator.export"


@pytest.fixture
def cases(in_tmp: Path) -> list[dict[str, Any]]:
    """Cases that lie in cases.jsonl of the working directory, too."""
    made = graded(100, prompts=30)
    (in_tmp / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in made))
    return made


def test_it_writes_what_the_function_writes(cases: Any, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--input", "cases.jsonl", "--output-dir", "out"]) == 0
    summary = export_data(cases, "same")
    assert capsys.readouterr().out == str(summary).replace("same/", "out/") + "\n"
    assert both_sides(in_tmp / "out") == both_sides(in_tmp / "same")


def test_every_option_arrives(cases: Any, in_tmp: Path) -> None:
    moved = [{"q": {"text": case["prompt"]}, "a": case["response"], "s": case["score"]} for case in cases]
    (in_tmp / "moved.jsonl").write_text("".join(json.dumps(case) + "\n" for case in moved))
    arguments = (
        "--input moved.jsonl --output-dir out --format jsonl parquet --split train=0.7 val=0.2 test=0.1 --seed 5 "
        "--map prompt=q.text response=a score=s --pairs all --min-difference 2 --max-pairs-per-prompt 3 "
        "--contradictions drop --source mine"
    )
    assert main(arguments.split()) == 0
    assert main(arguments.split()) == 2 and main([*arguments.split(), "--overwrite"]) == 0
    export_data(
        cases, "same", formats=["jsonl", "parquet"], split_ratio={"train": 0.7, "val": 0.2, "test": 0.1}, seed=5,
        min_difference=2, max_pairs_per_prompt=3, contradictions="drop", source="mine",
    )  # fmt: skip
    for name in ("train.jsonl", "val.jsonl", "test.jsonl", "train.parquet"):
        assert read_back(in_tmp / "out" / name) == read_back(in_tmp / "same" / name)
    assert read_back(in_tmp / "out/val.jsonl")[0]["source"] == "mine"
    assert main(["--input", "cases.jsonl", "--output-dir", "groups", "--layout", "groups", "--format", "jsonl"]) == 0
    assert set(read_back(in_tmp / "groups/test.jsonl")[0]) == {"prompt", "responses", "scores"}


def run(arguments: str) -> int:
    """Exit status of the command line."""
    try:
        return main(arguments.split())
    except SystemExit as stop:  # from argparse
        return int(stop.code or 0)


WRONG: list[tuple[str, str]] = [
    ("", "the following arguments are required: --output-dir"),
    ("--output-dir out", "one of the arguments --input --dataset is required"),
    ("--input cases.jsonl --dataset helpsteer2 --output-dir out", "--dataset: not allowed with argument --input"),
    ("--dataset helpster2 --output-dir out", "such as org/name. Did you mean 'helpsteer2'? (--input reads files)"),
    ("--input cases.jsonl", "required: --output-dir"),
    ("--input cases.jsonl --output-dir out --sed 1", "unrecognized arguments: --sed 1"),
    ("--input cases.jsonl --output-dir out --seed x", "argument --seed: invalid int value"),
    ("--input cases.jsonl --output-dir out --seed 1.5", "argument --seed: invalid int value"),
    ("--input nowhere.jsonl --output-dir out", "cases=nowhere.jsonl"),
    ("--input cases.jsonl --output-dir cases.jsonl", "is not a folder"),
    ("--input cases.jsonl --output-dir out --format parqet", "must be 'parquet' or 'jsonl'. Did you mean 'parquet'"),
    ("--input cases.jsonl --output-dir out --split train", "--split train: expected SIDE=SHARE"),
    ("--input cases.jsonl --output-dir out --split train=0.8 train=0.2", "--split has train twice"),
    ("--input cases.jsonl --output-dir out --split train=most", "the share must be a number"),
    ("--input cases.jsonl --output-dir out --split train=0.8", "adds up to 0.8"),
    ("--input cases.jsonl --output-dir out --split train=nan test=0.2", "must be a finite number"),
    ("--input cases.jsonl --output-dir out --map prompt", "--map prompt: expected FIELD=PATH"),
    ("--input cases.jsonl --output-dir out --map promt=q", "Did you mean 'prompt'"),
    ("--input cases.jsonl --output-dir out --map prompt=question", "100 dropped: nothing at 'question'"),
    ("--input cases.jsonl --output-dir out --results nowhere.jsonl", "results nowhere.jsonl: cannot be read"),
    ("--input cases.jsonl --output-dir out --results cases.jsonl", "cases.jsonl:1: not a result"),
    ("--input cases.jsonl --output-dir out --grader a", "there are no results to choose from"),
    ("--input cases.jsonl --output-dir out --grader a b", "--grader takes one name"),
    ("--input cases.jsonl --output-dir out --layout rows", "layout='rows': must be 'pairs' or 'groups'"),
    ("--input cases.jsonl --output-dir out --layout groups --pairs best_worst", "layout='groups'"),
    ("--input cases.jsonl --output-dir out --pairs best", "must be 'all' or 'best_worst'"),
    ("--input cases.jsonl --output-dir out --contradictions no", "must be 'keep' or 'drop'"),
    ("--input cases.jsonl --output-dir out --min-difference -1", "min_difference=-1.0: must be greater than"),
    ("--input cases.jsonl --output-dir out --min-difference nan", "min_difference=nan: must be a finite number"),
    ("--input cases.jsonl --output-dir out --max-pairs-per-prompt 0", "max_pairs_per_prompt=0: must be greater"),
    ("--input cases.jsonl --output-dir out --min-difference 99", "100 cases give no pair: "),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "what"), WRONG)
def test_a_mistake_is_one_sentence_and_status_2(
    arguments: str, what: str, cases: Any, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    printed = capsys.readouterr()
    *usage, error = printed.err.splitlines()
    assert what in error and error.startswith(("rm-gallery: error: ", "rm-gallery export-data: error: "))
    assert printed.out == "" and "".join(usage).startswith("usage: " if usage else "")
    assert [path.name for path in in_tmp.iterdir()] == ["cases.jsonl"]


def test_graders_of_a_pair_are_named_on_the_command_line(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "cases.jsonl").write_text('{"response_a": "x", "response_b": "y"}\n')
    line = '{"index": 0, "grader": "%s", "sample": "%s", "kind": "score", "result": {"score": %d}}\n'
    seen = of_sample({"response_a": "x", "response_b": "y"}, 0)
    (in_tmp / "results.jsonl").write_text(line % ("one", seen, 1) + line % ("two", seen, 2))
    arguments = ["--input", "cases.jsonl", "--results", "results.jsonl", "--output-dir", "out", "--format", "jsonl"]
    assert main([*arguments, "--grader", "response_a=one", "response_b=two"]) == 0
    assert read_back(in_tmp / "out/train.jsonl") == [{"chosen": "y", "rejected": "x", "margin": 1.0}]
    assert "EMPTY" in capsys.readouterr().out
    assert main([*arguments, "--overwrite", "--grader", "response_a=one"]) == 2
    assert "one for response_a and one for response_b" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["helpsteer2", "HelpSteer2", "nvidia/HelpSteer2"])
def test_a_known_dataset_has_its_own_score(name: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = '{"prompt": "p", "response": "%s", "helpfulness": %d, "correctness": %d}\n'
    (in_tmp / "nvidia/HelpSteer2").mkdir(parents=True)  # a local folder comes before the hub
    (in_tmp / "nvidia/HelpSteer2/train.jsonl").write_text(row % ("x", 1, 4) + row % ("y", 2, 0))
    arguments = ["--dataset", name, "--output-dir", "out", "--format", "jsonl", "--overwrite"]
    assert main(arguments) == 0
    assert read_back(in_tmp / "out/train.jsonl") == [{"prompt": "p", "chosen": "y", "rejected": "x", "margin": 1.0}]
    assert "reading nvidia/HelpSteer2, score=helpfulness" in capsys.readouterr().err
    assert main([*arguments, "--map", "score=correctness"]) == 0
    assert read_back(in_tmp / "out/train.jsonl")[0]["chosen"] == "x"
    assert known_dataset("org/name") == ("org/name", {})


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.slow
def test_the_module_is_a_program(cases: Any, in_tmp: Path) -> None:
    arguments = ["--input", "cases.jsonl", "--output-dir", "out"]
    assert main(arguments) == 0
    ran = run_python("-m", NAME, *arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    told = "set overwrite=True (--overwrite), or choose another output_dir"
    assert ran.stderr == f"rm-gallery: error: out/train.parquet exists; {told}\n"
    ran = run_python("-m", "rm_gallery.cli", "export-data", *arguments, "--overwrite")
    assert ran.returncode == 0


def test_help_says_what_goes_in_and_what_comes_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for word in ("response_a, response_b, score_a, score_b", "chosen,\nrejected, margin", "--results", "examples:"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.slow
def test_neither_torch_nor_pandas_is_asked_for(cases: Any, in_tmp: Path) -> None:
    program = (
        "import sys\nimport rm_gallery.core.generator\n"
        "assert 'pyarrow' not in sys.modules\n"
        f"from {NAME} import main\n"
        "assert 'pandas' not in sys.modules\n"
        "main(['--input', 'cases.jsonl', '--output-dir', 'out', '--format', 'parquet', 'jsonl'])\n"
        "print(sorted({'torch', 'transformers', 'openai'} & set(sys.modules)))\n"
    )
    ran = run_python("-c", program)
    assert ran.stderr == "" and ran.stdout.splitlines()[-1] == "[]", ran.stderr
    assert ran.stdout.splitlines()[0].endswith(" pairs from 100 cases")
