"""The HTML report: complete, self-contained, and safe whatever the texts are."""

from __future__ import annotations

import base64
import hashlib
import re
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rm_gallery import UserError, evaluate
from rm_gallery.cli import main
from rm_gallery.evaluation import charts
from rm_gallery.evaluation.html import MAX_SUBSETS, html_of
from rm_gallery.html_chart import ticks
from tests.evaluation.conftest import honest, honest_rows, write_rows

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e</details>"


def length(conversations: list[list[dict[str, Any]]]) -> list[float]:
    return [float(len(str(each[-1]["content"]))) for each in conversations]


def test_hostile_text_is_only_text_wherever_it_stands() -> None:
    rows = [{**row, "source": f"{EVIL}{number % 3}"} for number, row in enumerate(honest_rows(30))]
    for row in rows:
        row["prompt"], row["rejected"] = f"{EVIL} {row['prompt']}", f"{row['rejected']} {EVIL}"
    found = evaluate(
        {EVIL: length, "b": honest}, {EVIL: rows}, data={"source_key": "source"}, baselines=False, probes=20
    )
    page = html_of(found, command=EVIL)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and page.count("<script") == 1 and f"script-src 'sha256-{digest}'" in unescape(page)
    assert "default-src 'none'" in page and "<img" not in page and "\u202e" not in page and r"\u202e" in page
    assert page.count("<details") == page.count("</details>") > 30
    names = {name for tag in re.findall(r"<[a-z][^<>]*>", page) for name in re.findall(r'\s([\w-]+)="[^"]*"', tag)}
    assert not {name for name in names if name == "src" or name.startswith("on")}, "nothing is fetched or run"
    assert all(link.startswith("#") for link in re.findall(r'\shref="(.*?)"', page))
    ids = re.findall(r' id="(.*?)"', page)
    named = re.findall(r'aria-labelledby="(\S+) (\S+)"', page)
    assert len(ids) == len(set(ids)) and len(named) == 8 and {each for pair in named for each in pair} <= set(ids)
    assert set(re.findall(r'href="#(.*?)"', page)) <= set(ids), "every link of the page has a target"
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)
    text = unescape(page)
    assert found["models"][0]["sets"][0]["findings"][0]["text"] in text and "b is better than " in text


@pytest.mark.slow
def test_every_part_of_the_report_is_on_the_page() -> None:
    """Tables for lists of scores, subsets, benchmark parts, baselines and probes, and the texts of mistakes."""
    rows = [
        {"prompt": f"Question {n}?", "responses": ["a" * (n % 5 + 1), "b" * 3, "c" * (n % 4 + 1)], "scores": [3, 1, 2]}
        for n in range(40)
    ]
    found = evaluate({"one": length}, {"lists": rows, "pairs": honest_rows(60)}, probes=20)
    row = found["models"][0]["sets"][1]
    row["benchmark"] = {"title": "Bench", "name": "b", "score": 0.5, "parts": {"Chat": 0.25}, "notes": ["a note"]}
    row["subsets"] = [{**row, "name": f"topic {number}"} for number in range(MAX_SUBSETS + 1)]
    row["mistakes"][0] |= {"truncated": {"prompt": 12345}}
    text = unescape(html_of(found))
    parts = (
        "Bench score: 50.0%", "a note", "Chat", f"The lowest {MAX_SUBSETS} of {MAX_SUBSETS + 1}", "Calibration: Brier",
        "Strength of preference", "Best of 3 responses (40 prompts)", "Baselines", "this model", "Probes",
        "Not applied: markdown removed", "the answer to another prompt", "responses scored in", "of 12,345 characters",
        "rank correlation", row["mistakes"][0]["worse"], "python 3.",
    )  # fmt: skip
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize("reward", [1e-300, -1e17])
def test_a_constant_reward_of_any_size_has_a_report(reward: float) -> None:
    found = evaluate(lambda each: [reward] * len(each), honest_rows(3), baselines=False, probes=False)
    assert "every pair is a tie" in html_of(found)


def test_ticks_are_few_and_round() -> None:
    assert ticks(0, 137) == [0, 50, 100]
    assert ticks(-2.2, 5.9) == [-2, 0, 2, 4]
    assert [f"{each:g}" for each in ticks(0.5, 1)] == ["0.5", "0.6", "0.7", "0.8", "0.9", "1"]
    for high in (1e-9, 0.3, 1, 7, 1e12):
        assert 3 <= len(ticks(0, high)) <= 6


def test_a_margin_bin_that_holds_zero_has_both_colors() -> None:
    picture = charts.margins("m", {"edges": [-1.0, 3.0], "counts": {"margin": [4]}})
    wrong, right = re.findall(r'<rect class="(?:wrong|right)" x="(\S+)" y="\S+" width="(\S+)" height="1', str(picture))
    assert float(wrong[1]) * 3 == pytest.approx(float(right[1])) and float(wrong[0]) + float(wrong[1]) == float(
        right[0]
    )


@pytest.mark.slow
def test_the_command_writes_the_page_and_updates_a_model_card(
    in_tmp: Path, chat_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(in_tmp / "set.jsonl", honest_rows(12))
    card = "---\nlicense: mit\n---\n\n# my model\n\n## How to use\n\ntext\n"
    Path("README.md").write_text(card)
    arguments = ["evaluate", "--model", str(chat_folder), "set.jsonl", "--no-probes", "--no-baselines"]
    monkeypatch.setattr("sys.argv", ["rm-gallery", *arguments])
    for _ in range(2):
        assert main([*arguments, "--html", "out.html", "--markdown", "README.md"]) == 0
    assert "html: out.html" in capsys.readouterr().out
    page = unescape(Path("out.html").read_text())
    assert "<h2>set.jsonl</h2>" in page and "<code>rm-gallery evaluate --model" in page
    text = Path("README.md").read_text()
    assert text.count("## Evaluation") == 1 and text.startswith(
        "---\nlicense: mit\n---\n\n# my model\n\n<!-- rm-gallery"
    )
    assert text.endswith("## How to use\n\ntext\n") and text.index("## Evaluation") < text.index("## How to use")
    before = Path("out.html").read_text()
    Path("notes.html").write_text("mine")
    for name, message in (("notes.html", "is not a report of this command"), ("missing/a.html", "that does not exist")):
        assert main([*arguments, "--html", name]) == 2
        assert f"--html {name}: " in (error := capsys.readouterr().err) and message in error
    write_rows(in_tmp / "bad.jsonl", [{"prompt": "Why?", "chosen": "a", "rejected": "a"}])
    assert main(["evaluate", "--model", str(chat_folder), "bad.jsonl", "--html", "out.html"]) == 2
    assert Path("out.html").read_text() == before and Path("notes.html").read_text() == "mine"
    assert sorted(path.name for path in in_tmp.iterdir()) == [
        "README.md",
        "bad.jsonl",
        "notes.html",
        "out.html",
        "set.jsonl",
    ]


def test_a_result_is_saved_in_the_form_that_its_name_says(in_tmp: Path) -> None:
    found = evaluate(honest, honest_rows(3), baselines=False, probes=False)
    for name, start in (("a.html", "<!doctype html>"), ("a.md", "## Evaluation"), ("a.json", "{")):
        found.save(name)
        assert Path(name).read_text().lstrip().startswith(start)
    Path("b.html").write_text("mine")
    Path("c.md").write_bytes(b"---\n\xff")
    for name, message in (("b.html", "is not a report"), ("c.md", "it is not UTF-8"), ("/dev/null", "no regular file")):
        with pytest.raises(UserError, match=f"path {name}: .*{message}"):
            found.save(name)
