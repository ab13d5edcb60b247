"""The command: mistakes are one sentence, and only its own reports are overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from rm_gallery.cli import main
from tests.inspection.data import Show, files, pair, plain_rows


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data.train_files=nowhere.parquet"], "data.train_files=nowhere.parquet: no such file"),
        (["--html", "nowhere/r.html"], "is in a folder that does not exist"),
        (["--html", "."], "is a folder"),
        (["--html", "train.parquet"], "is not a report of this command"),
        (["--samples", "-1"], "--samples=-1: must be at least 0"),
        (["data.val_fraction=2"], "data.val_fraction=2.0: must be at least 0"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str, show: Show) -> None:
    assert sentence in show.error(*files(plain_rows(3, seed=0)), *arguments)


def test_a_report_replaces_a_report_and_nothing_else(show: Show) -> None:
    arguments = [*files(plain_rows(3, seed=0)), "--html", "report.html"]
    Path("report.html").write_text("<html>my own page</html>")
    show.error(*arguments)
    assert Path("report.html").read_text() == "<html>my own page</html>"
    Path("report.html").unlink()
    show.text(*arguments)
    first = Path("report.html").read_text()
    show.text(*arguments, "--samples", "0")
    assert len(Path("report.html").read_text()) < len(first)
    assert sorted(path.name for path in Path().iterdir()) == ["report.html", "train.parquet"]


def test_lengths_are_those_of_training(show: Show, qwen2_folder: Path) -> None:
    from rm_gallery.data.config import Side
    from rm_gallery.data.tokenization.tokenizer import load_tokenizer
    from rm_gallery.training.config import load_config
    from rm_gallery.training.data_setup import load_side

    rows = [pair("q" * number, "a" * 40, "b" * 30) for number in range(1, 61)]
    words = [f"model.partial_pretrain={qwen2_folder}", *files(rows), "data.max_length=130"]
    report = show(*words)
    config = load_config(None, words)
    data = load_side(Side("data.train_files"), config.data, load_tokenizer(str(qwen2_folder))).data
    assert report.values["unit"] == "tokens"
    assert report.train["num_groups"] == len(data)
    cost = report.train["cost"]
    assert cost["packed"] == data.num_tokens
    assert cost["separate"] == int(data.num_tokens + data.prefix_lengths.sum())
    assert cost["padded_max"] == 2 * 130 * len(data)
    assert report.train["lengths"]["num_beyond"] == 60 - len(data) > 0


def test_an_unknown_option_is_refused(show: Show) -> None:
    with pytest.raises(SystemExit):
        main(["show-data", "--pdf", "x"])
