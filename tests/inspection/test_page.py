"""The page: severity of the summary, HTML, terminal and JSON."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from rm_gallery import __version__
from rm_gallery.inspection.lengths import Histogram
from rm_gallery.inspection.page import Chart
from tests.inspection.data import Show, files, flipped, pair, plain_rows
from tests.small import write_pairs

pytestmark = pytest.mark.slow

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_clean_data_are_ok(show: Show) -> None:
    levels = [level for level, _ in show.of(plain_rows(60, seed=0), plain_rows(20, seed=1)).summary]
    assert set(levels) == {"ok"}


def test_errors_come_first_and_then_warnings(show: Show) -> None:
    rows = plain_rows(120, seed=0)
    report = show.of([*rows, flipped(rows[0]), pair("q", "same", "same")])
    levels = [level for level, _ in report.summary]
    assert levels == sorted(levels, key=["error", "warning", "ok"].index)
    assert report.level("ontradictory labels") == "error"
    assert report.level("chosen equal to rejected") == "warning", "1 row of 122"


@pytest.mark.parametrize(("copies", "severity"), [(1, "warning"), (3, "error")])
def test_duplicates_of_more_than_a_percent_are_an_error(copies: int, severity: str, show: Show) -> None:
    rows = plain_rows(120, seed=0)
    report = show.of([*rows, *rows[:copies]])
    assert report.level("train.parquet:0 = train.parquet:120") == severity


def test_leaked_pairs_are_an_error(show: Show) -> None:
    rows = plain_rows(60, seed=0)
    report = show.of(rows, [rows[3], *plain_rows(20, seed=1)])
    assert report.level("val.parquet:0") == "error"


def test_files_that_mix_chats_with_bare_texts_are_an_error(show: Show) -> None:
    write_pairs(Path("chat.parquet"), plain_rows(3, seed=0))
    write_pairs(Path("text.parquet"), [{"chosen": "a b c", "rejected": "d e f"}])
    report = show("data.train_files=[chat.parquet,text.parquet]")
    assert report.level("mix chat messages with plain text") == "error"
    assert report.train["styles"] == {"chat": 3, "text": 1}


def test_hostile_text_is_escaped_wherever_it_stands(show: Show) -> None:
    rows = [
        pair(f"{EVIL} {number}", f"{EVIL} a", f"{EVIL} b {number}", source=f"{EVIL} {number}") for number in range(3)
    ]
    write_pairs(Path("a<b>&c.parquet"), rows)
    show.text("data.train_files=a<b>&c.parquet", "--html", "report.html")
    page = Path("report.html").read_text()
    assert "<script" not in page and "<img" not in page and "<b>&c" not in page
    assert "&lt;script&gt;alert(1)" in page and "a&lt;b&gt;&amp;c.parquet" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page), "no request leaves the page"
    assert "default-src 'none'" in page, "and none could"


def test_the_html_page_has_every_section_of_the_terminal(show: Show) -> None:
    rows = plain_rows(120, seed=0)
    arguments = files([*rows, rows[0]], plain_rows(20, seed=1))
    printed = show.text(*arguments)
    show.text(*arguments, "--html", "report.html")
    page = Path("report.html").read_text()
    titles = [title for title, line in zip(printed.splitlines(), printed.splitlines()[1:], strict=False)
              if line and set(line) == {"-"}]  # fmt: skip
    assert len(titles) >= 10
    missing = [title for title in titles if f">{title}<" not in page]
    assert not missing
    links = re.findall(r'<a href="#(section-\d+)">(.*?)</a>', page)
    assert [title for _, title in links] == titles[1:], "the table of contents names every section but the summary"
    assert all(f'<section id="{name}"><h2>{title}</h2>' in page for name, title in links)
    assert "train.parquet:0 = train.parquet:120" in page and "prefers-color-scheme" in page


def test_with_an_html_page_the_terminal_has_the_summary_and_the_path(show: Show) -> None:
    rows = plain_rows(60, seed=0)
    arguments = files([*rows, rows[0]])
    printed = show.text(*arguments)
    summary = printed[: printed.index("\n\nTraining rows\n")]
    assert show.text(*arguments, "--html", "report.html") == f"{summary}\n\nreport: report.html\n"


def test_the_html_page_says_when_and_how_it_was_made(show: Show) -> None:
    show.text(*files(plain_rows(3, seed=0)), "--html", "my report.html", "--samples", "0")
    page = Path("my report.html").read_text()
    command = "rm-gallery show-data --html 'my report.html' --samples 0 data.train_files=train.parquet"
    assert f"<code>{command}</code>" in unescape(page)
    assert re.search(rf"<dd>20\d\d-\d\d-\d\d \d\d:\d\d \S+, by rm-gallery {re.escape(__version__)}</dd>", page)


def test_flagged_rows_are_shown_with_their_text(show: Show) -> None:
    """Of each finding, also of dropped rows; a long text is shortened, and what it holds is only text."""
    rows = plain_rows(60, seed=0)
    odd = [
        pair("is it equal?", "same answer", "same answer"),
        pair("is it loud?", "Yes, it is.", "YES IT IS"),
        pair("is it long?", "short", f"short begin <b> {'x' * 900} end"),
    ]
    report = show.of([*rows, rows[7], flipped(rows[8]), *odd], [rows[9], *plain_rows(20, seed=1)])
    texts = {
        finding["key"] + each["where"]: dict(each["parts"])
        for group in (
            *(report.train[name] for name in ("dropped", "duplicates", "suspicious")),
            report.leakage.values(),
        )
        for finding in group
        for each in finding["texts"]
    }
    assert texts["droppedtrain.parquet:62"]["chosen"] == "same answer"
    assert "is it equal?" in texts["droppedtrain.parquet:62"]["prompt"]
    assert texts["same_wordstrain.parquet:63"] == {
        "prompt": "is it loud?", "chosen": "Yes, it is.", "rejected": "YES IT IS"
    }  # fmt: skip
    known = [(each["prompt"][0]["content"], each["chosen"]) for each in rows]
    for name, number in (
        ("repeated_pairstrain.parquet:7 = train.parquet:60", 7),
        ("contradictionstrain.parquet:8 = train.parquet:61", 8),
        ("shared_pairsval.parquet:0", 9),
    ):
        assert (texts[name]["prompt"], texts[name]["chosen"]) == known[number]
    show.text("data.train_files=train.parquet", "data.val_files=val.parquet", "--html", "report.html")
    page = Path("report.html").read_text()
    assert "<summary>train.parquet:63</summary>" in page and "YES IT IS" in page
    assert "short begin &lt;b&gt; xxx" in page and "characters hidden ... xxx" in page and "x end</pre>" in page


def test_charts_of_chosen_and_rejected_have_the_same_axes(show: Show) -> None:
    rows = [pair("q", "word " * number, f"w{number} " * (number // 3 + 1)) for number in range(1, 101)]
    page = page_of_json(show.of(rows).values)
    chosen, rejected = (page[key] for key in ("chosen", "rejected"))
    assert chosen["edges"] == rejected["edges"] and sum(chosen["counts"]) == sum(rejected["counts"]) == 100
    show.text("data.train_files=train.parquet", "--html", "report.html")
    html = Path("report.html").read_text()
    charts = dict(re.findall(r'<figcaption>(chosen|rejected),.*?<div class="y">(.*?)</div>', html, re.DOTALL))
    assert charts["chosen"] == charts["rejected"] != ""
    assert re.findall(r"<span>([\d,]+)</span>", charts["chosen"])[-1] == "0"
    most = max(*chosen["counts"], *rejected["counts"])
    assert int(re.findall(r"<span>([\d,]+)</span>", charts["chosen"])[0].replace(",", "")) >= most


def page_of_json(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Histogram by length of the training data."""
    return {each["key"]: each["histogram"] for each in values["splits"][0]["lengths"]["distributions"]}


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        (1, (0, 1)),
        (3, (0, 1, 2, 3)),
        (7, (0, 2, 4, 6, 8)),
        (1317, (0, 500, 1000, 1500)),
        (2000, (0, 500, 1000, 1500, 2000)),
    ],
)
def test_the_y_axis_has_round_ticks(most: int, ticks: tuple[int, ...]) -> None:
    histogram = Histogram((0, 10, 20), (most, 0, 1))
    chart = Chart("", histogram, "words", "rows", most)
    assert chart.y_ticks() == ticks
    assert chart.x_ticks() == ((0.0, "0"), (1 / 3, "10"), (2 / 3, "20+"))


def test_nothing_of_the_page_is_wider_than_a_phone(show: Show) -> None:
    """No box has a fixed width or scrolls sideways, tables become lists, and texts break anywhere."""
    show.text(*files(plain_rows(3, seed=0)), "--html", "report.html")
    style = Path("report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "overflow-wrap: anywhere" in style and "white-space: pre-wrap" in style and "overflow-x" not in style
    phone = style.partition("@media (max-width: 620px)")[2]
    assert ".grid thead { display: none; }" in phone and "content: attr(data-name)" in phone


def test_the_html_page_is_well_formed(show: Show) -> None:
    from html.parser import HTMLParser

    open_tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    show.text(*files(plain_rows(120, seed=0), plain_rows(20, seed=1)), "--html", "report.html")
    Parser().feed(Path("report.html").read_text())
    assert not open_tags


def test_the_terminal_report_fits_80_columns(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", "80")
    rows = [*plain_rows(120, seed=0), pair("\u8fd9\u662f\u4ec0\u4e48 " * 40, "\u597d" * 300, "word" * 200)]
    name = "a_file_whose_name_is_rather_long_" * 4 + ".parquet"
    rows = [{**row, "source": f"source {number % 2} {'long ' * 20}"} for number, row in enumerate(rows)]
    write_pairs(Path(name), rows)
    printed = show.text(f"data.train_files={name}", "data.val_fraction=0.2", "--samples", "130")
    assert "\x1b" not in printed, "no colours in a pipe"
    assert max(map(cell_len, printed.splitlines())) <= 80
    assert not [line for line in printed.splitlines() if line != line.rstrip()]


def test_control_characters_of_the_data_do_not_reach_the_terminal(show: Show) -> None:
    printed = show.text(*files([pair("\x1b[2Jq\u202e", "a\x07 b", "\x1b]0;title\x07")] * 2))
    assert not set(printed) & {"\x1b", "\x07", "\u202e"}
    assert "\\x1b[2Jq\\u202e" in printed


def test_json_has_the_figures_of_the_text(show: Show) -> None:
    rows = plain_rows(120, seed=0)
    report = show.of([*rows, rows[0]], plain_rows(20, seed=1), "--samples", "2")
    assert set(report.train) >= {
        "name", "files", "num_rows", "num_groups", "num_pairs", "num_prompts", "styles", "sources", "dropped",
        "duplicates", "suspicious", "lengths", "cost", "samples",
    }  # fmt: skip
    assert len(report.train["samples"]) == 2
    printed = re.sub(r"\s+", " ", show.text("data.train_files=train.parquet", "data.val_files=val.parquet"))
    for each in report.baselines.values():
        assert f"{each['accuracy']:.3f}" in printed
    for _, text in report.summary:
        assert text in printed
    json.dumps(report.values, allow_nan=False)


def test_samples_show_the_shared_prompt_once_and_mark_special_tokens(show: Show, qwen2_folder: Path) -> None:
    arguments = files([pair("Why?", "Because.", "No."), pair("How?", "So.", "Not so.")])
    printed = show.text(*arguments, f"model.partial_pretrain={qwen2_folder}", "--samples", "1")
    assert "[[<|im_end|>]]" in printed and "train.parquet:" in printed
    report = show(*arguments, f"model.partial_pretrain={qwen2_folder}", "--samples", "2")
    for sample, row in zip(report.train["samples"], (("Why?", "Because."), ("How?", "So.")), strict=True):
        prefix = "".join(piece["text"] for piece in sample["prefix"]["head"])
        assert prefix.startswith("<|im_start|>user\n") and row[0] in prefix
        chosen = "".join(piece["text"] for piece in sample["responses"][0]["head"])
        assert (prefix + chosen).endswith(f"{row[1]}<|im_end|>\n")


def test_long_samples_hide_their_middle(show: Show) -> None:
    rows = [pair("q", " ".join(f"w{number}" for number in range(500)), "short")]
    chosen = show.of(rows, None, "--samples", "1").train["samples"][0]["responses"][0]
    assert chosen["num_hidden"] == chosen["length"] - len(chosen["head"]) - len(chosen["tail"]) > 300


def test_two_files_of_one_name_keep_their_paths(show: Show) -> None:
    rows = plain_rows(3, seed=0)
    for folder in ("a", "b"):
        write_pairs(Path(folder) / "x.parquet", [*rows, rows[0]])
    report = show("data.train_files=a/x.parquet", "data.val_files=b/x.parquet")
    assert report.level("a/x.parquet:0 = a/x.parquet:3") == "error"


def test_a_custom_class_reads_and_renders(show: Show, qwen2_folder: Path) -> None:
    Path("mine.py").write_text(
        "from tutorials.cookbooks.training_reward_model.base import BaseTrainDataset\n\n"
        "class Mine(BaseTrainDataset):\n"
        "    def _build_messages(self, example):\n"
        "        return [{'role': 'user', 'content': 'Asked: ' + example['question']}]\n"
    )
    rows = [{"question": f"q{number}", "chosen": "good", "rejected": "bad"} for number in range(3)]
    arguments = [*files(rows), "data.custom_cls.path=mine.py", "data.custom_cls.name=Mine"]
    assert "set model.partial_pretrain" in show.error(*arguments)
    sample = show(*arguments, f"model.partial_pretrain={qwen2_folder}", "--samples", "1").train["samples"][0]
    assert "Asked: q" in "".join(piece["text"] for piece in sample["prefix"]["head"])
