"""show-data through its command: every figure about made-up data whose answer is known."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.cli import main
from tests.small import write_pairs


def pair(prompt: str, chosen: str, rejected: str, **extra: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected, **extra}


def words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(count)) + "."


def plain_rows(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Pairs that have nothing in common."""
    draw = random.Random(seed)
    return [pair(words(draw, 4), words(draw, 12), words(draw, 12)) for _ in range(count)]


def show(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["show-data", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def counts(findings: list[dict[str, Any]]) -> dict[str, int]:
    return {each["key"]: each["count"] for each in findings}


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """Training data with one of each fault at a known row, and validation data that share rows with it."""
    rows = plain_rows(60, seed=0)
    first, second, third = rows[0], rows[1], rows[2]
    rows += [
        first,  # 60: repeats row 0
        {**second, "chosen": second["rejected"], "rejected": second["chosen"]},  # 61: contradicts row 1
        {**third, "chosen": third["chosen"] + " indeed."},  # 62: nearly repeats row 2
        pair("q1", "same", "same"),  # 63: dropped
        pair("q2", "", "b"),  # 64: dropped
        pair("q3", "yes of course it is true", "yes of course it is true so", margin=-1.0),  # 65
        pair("q4", "alpha beta gamma", "delta", p_chosen=0.25),  # 66
    ]
    write_pairs(in_tmp / "train.parquet", [{"margin": None, "p_chosen": None, **row} for row in rows])
    val = [
        rows[5],  # known
        {**rows[6], "chosen": rows[6]["rejected"], "rejected": rows[6]["chosen"]},  # known, flipped
        {**rows[7], "chosen": "an answer of its own"},  # the prompt is known
        *plain_rows(20, seed=1),
    ]
    write_pairs(in_tmp / "val.parquet", val)
    return in_tmp


def test_faults_are_found_where_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = show("data.train_files=train.parquet", "data.val_files=val.parquet", capsys=capsys)
    train = report["sides"][0]
    assert (train["num_rows"], train["num_groups"]) == (67, 65)
    assert {each["title"]: each["examples"] for each in train["dropped"]} == {
        "chosen equal to rejected": ["train.parquet:63"],
        "empty chosen": ["train.parquet:64"],
    }
    duplicates = {each["key"]: each for each in train["duplicates"]}
    assert duplicates["repeated_pairs"]["count"] == 1
    assert duplicates["repeated_pairs"]["examples"] == ["train.parquet:0 = train.parquet:60"]
    assert duplicates["contradictions"]["count"] == 2
    assert duplicates["contradictions"]["examples"] == ["train.parquet:1 = train.parquet:61"]
    assert duplicates["near_duplicates"]["examples"] == ["train.parquet:2 ~ train.parquet:62"]
    suspicious = {each["key"]: each for each in train["suspicious"]}
    assert suspicious["negative_margin"]["examples"] == ["train.parquet:65"]
    assert suspicious["p_below_half"]["examples"] == ["train.parquet:66"]
    assert suspicious["beginning"]["examples"] == ["train.parquet:65"]
    overlap = counts(report["overlap"])
    assert sorted(value for value in overlap.values() if value)[:2] == [1, 1], overlap
    assert {each["key"]: each["examples"] for each in report["overlap"] if each["count"] == 1}


def test_prompts_in_both_sides_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlap = show("data.train_files=train.parquet", "data.val_files=val.parquet", capsys=capsys)["overlap"]
    by_title = {each["title"]: each["count"] for each in overlap}
    assert next(count for title, count in by_title.items() if "prompt" in title) == 3
    assert [count for title, count in by_title.items() if "flipped" in title] == [1]
    separate = show("data.train_files=train.parquet", "data.val_fraction=0.3", capsys=capsys)
    assert next(each["count"] for each in separate["overlap"] if "prompt" in each["title"]) == 0
    assert sum(side["num_groups"] for side in separate["sides"]) == 65


def test_lengths_and_savings_are_those_of_training(
    folder: Path, qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rm_gallery.data.config import Side
    from rm_gallery.data.tokenization.tokenizer import load_tokenizer
    from rm_gallery.training.config import load_config
    from rm_gallery.training.data_setup import load_side

    words = [f"model.partial_pretrain={qwen2_folder}", "data.train_files=train.parquet", "data.max_length=130"]
    report = show(*words, capsys=capsys)
    side = report["sides"][0]
    config = load_config(None, words)
    data = load_side(Side("data.train_files"), config.data, load_tokenizer(str(qwen2_folder))).data
    assert report["unit"] == "tokens"
    assert side["num_groups"] == len(data)
    assert side["cost"]["packed"] == data.num_tokens
    assert side["cost"]["separate"] == int(data.num_tokens + data.prefix_lengths.sum())
    assert side["cost"]["padded_max"] == 2 * 130 * len(data)
    assert side["lengths"]["num_beyond"] == 67 - 2 - len(data) > 0


def test_a_length_only_rule_and_a_bag_of_words_find_what_is_there(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(3)
    write_pairs(in_tmp / "long.parquet", [pair(words(draw, 3), words(draw, 9), words(draw, 5)) for _ in range(120)])
    by_word = [pair(words(draw, 3), f"good {words(draw, 6)}", f"dull {words(draw, 6)}") for _ in range(120)]
    write_pairs(in_tmp / "words.parquet", by_word)
    long = show("data.train_files=long.parquet", capsys=capsys)
    assert long["sides"][0]["longer"][0]["longer_chosen"] == 120
    found = {each["key"]: each["accuracy"] for each in long["baselines"]["baselines"]}
    assert found[next(key for key in found if "length" in key)] == 1.0
    found = {
        each["key"]: each["accuracy"]
        for each in show("data.train_files=words.parquet", capsys=capsys)["baselines"]["baselines"]
    }
    assert found[next(key for key in found if "word" in key)] > 0.95
    assert abs(found[next(key for key in found if "length" in key)] - 0.5) < 0.1


def test_the_html_stands_alone_and_data_cannot_inject_markup(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    write_pairs(folder / "evil.parquet", [pair(evil, f"{evil} a", f"{evil} b")] * 3)
    assert main(["show-data", "data.train_files=evil.parquet", "--html", "report.html"]) == 0
    page = Path("report.html").read_text()
    assert "<script>alert(1)" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page), "no request leaves the page"
    assert "<svg" in page and "prefers-color-scheme" in page


def test_the_terminal_report_fits_and_has_no_colours_in_a_pipe(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["show-data", "data.train_files=train.parquet"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    for part in ("What to look at first", "train.parquet:63", "What a reward model has to beat"):
        assert part in printed


def test_control_characters_of_the_data_do_not_reach_the_terminal(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(in_tmp / "a.parquet", [pair("\x1b[2Jq\u202e", "a\x07 b", "\x1b]0;title\x07")] * 2)
    assert main(["show-data", "data.train_files=a.parquet"]) == 0
    printed = capsys.readouterr().out
    assert not set(printed) & {"\x1b", "\x07", "\u202e"}


def test_rankings_and_damaged_rows_are_shown_too(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"prompt": f"question {n}", "responses": ["a b", "c d", "e f"], "scores": [1, 2, 2]})
             for n in range(8)]  # fmt: skip
    Path("a.jsonl").write_text("\n".join([*lines, "{broken", json.dumps({"prompt": "q", "responses": ["a"]})]) + "\n")
    [side] = show("data.train_files=a.jsonl", capsys=capsys)["sides"]
    assert (side["num_groups"], side["num_pairs"]) == (8, 16)
    assert sum(each["count"] for each in side["dropped"]) == 2
    assert all(re.fullmatch(r"a\.jsonl:[89]", each["examples"][0]) for each in side["dropped"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data.train_files=nowhere.parquet"], "data.train_files=nowhere.parquet: no such file"),
        (["data.train_files=train.parquet", "--html", "nowhere/r.html"], "lies in a folder that does not exist"),
        (["data.train_files=train.parquet", "--html", "train.parquet"], "is no report of this command"),
        (["data.train_files=train.parquet", "--samples", "-1"], "--samples=-1: must be at least 0"),
        (["data.train_files=train.parquet", "data.val_fraction=2"], "data.val_fraction=2.0: must be at least 0"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show-data", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("rm-gallery: error:") == 1
