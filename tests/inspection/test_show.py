"""The command, as people call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.cli import main
from tests.small import chat_pairs, text_pairs, write_pairs


@pytest.fixture(autouse=True)
def files(in_tmp: Path) -> None:
    rows = chat_pairs(150)
    write_pairs(in_tmp / "train.parquet", [*rows[:120], {**rows[0], "chosen": None}])
    write_pairs(in_tmp / "val.parquet", rows[110:])


TRAIN = "data.train_files=train.parquet"
VAL = "data.val_files=val.parquet"


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["show-data", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_works_without_a_model_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-data", TRAIN]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "lengths in words" in printed
    assert "no model is named" in " ".join(printed.split())
    assert "left out: null chosen: 1 (0.8%)" in printed


def test_with_a_model_lengths_are_its_tokens(capsys: pytest.CaptureFixture[str], qwen2_folder: Path) -> None:
    facts = _json(capsys, TRAIN, VAL, f"model.partial_pretrain={qwen2_folder}", "data.max_length=100", "--samples=1")
    train, val = facts["sides"]
    assert facts["unit"] == "tokens"
    assert train["num_rows"] == 121
    dropped = {each["title"]: each["count"] for each in train["dropped"]}
    assert dropped == {"null chosen": 1, "longer than data.max_length=100": train["lengths"]["num_beyond"]}
    assert len(train["samples"]) == len(val["samples"]) == 1
    assert train["cost"]["micro_batches"] >= 1


def test_an_encoder_is_charged_for_padding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tests.small import make_model

    rows = text_pairs(20)
    write_pairs(Path("text.parquet"), rows)
    folder = make_model("bert", tmp_path / "bert")
    facts = _json(capsys, "data.train_files=text.parquet", f"model.partial_pretrain={folder}", "data.max_length=256")
    cost = facts["sides"][0]["cost"]
    assert cost["pads"]
    assert cost["separate"] <= cost["packed"] <= cost["padded_max"]


def test_a_folder_with_a_tokenizer_alone_is_enough(capsys: pytest.CaptureFixture[str], tokenizer_folder: Path) -> None:
    assert _json(capsys, TRAIN, f"model.partial_pretrain={tokenizer_folder}")["unit"] == "tokens"


def test_leaks_between_the_files_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    facts = _json(capsys, TRAIN, VAL)
    shared = {each["key"]: each["count"] for each in facts["overlap"]}
    assert shared["shared_prompts"] == shared["shared_pairs"] == 10
    assert any(each["level"] == "act" and "stand in training" in each["text"] for each in facts["verdicts"])


def test_the_html_file_is_written_again_but_never_over_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["show-data", TRAIN, "--html", "report.html"]) == 0
    assert Path("report.html").read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.endswith("\nreport: report.html\n")
    before = Path("val.parquet").read_bytes()
    assert main(["show-data", TRAIN, "--html", "val.parquet"]) == 2
    assert "is no report of this command" in capsys.readouterr().err
    assert Path("val.parquet").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == ["report.html", "train.parquet", "val.parquet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data.train_files is not set"),
        ([TRAIN, "--samples=-1"], "--samples=-1: must be at least 0"),
        ([TRAIN, "--html=no/report.html"], "--html=no/report.html: lies in a folder that does not exist"),
        ([TRAIN, "--html=."], "--html=.: is a folder"),
        ([TRAIN, "data.max_lenght=5"], "data.max_lenght: unknown key. Did you mean 'data.max_length'?"),
        ([TRAIN, "model.partial_pretrain=./none"], "model.partial_pretrain=./none: no such folder"),
        (["data.train_files=none.parquet"], "data.train_files=none.parquet: no such file"),
        ([TRAIN, "data.chosen_key=best"], "no column 'best'"),
    ],
)
def test_mistakes_end_with_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-data", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1


def test_what_only_training_needs_is_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.yaml").write_text("trainer:\n  logger: [nowhere]\n  log_freq: 0\ndata:\n  bad_rows: error\n")
    assert main(["show-data", "--config", "own.yaml", TRAIN]) == 0
    assert main(["train", "--config", "own.yaml", TRAIN]) == 2
    assert "trainer.logger=nowhere" in capsys.readouterr().err


def test_no_usable_row_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(Path("bad.parquet"), [{"chosen": "a", "rejected": "a"}, {"chosen": "", "rejected": "a"}])
    assert main(["show-data", "data.train_files=bad.parquet"]) == 2
    error = capsys.readouterr().err
    assert "none of 2 rows can be used: 1 chosen equal to rejected (first: bad.parquet:0), 1 empty chosen" in error


def test_one_row_and_no_samples_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(Path("one.parquet"), text_pairs(1))
    assert main(["show-data", "data.train_files=one.parquet", "--samples=0", "--html=one.html"]) == 0
    printed = capsys.readouterr().out
    assert "as the model sees them" not in printed
    assert "Too few pairs for baselines: 1, at least 100 are needed." in printed
