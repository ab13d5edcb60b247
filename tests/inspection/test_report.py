"""Verdicts, sections, terminal and HTML."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from rm_gallery.data.packing import PackingConfig
from rm_gallery.data.tokenize import TokenizeConfig
from rm_gallery.inspection.encoders import Encoder, TokenEncoder, WordEncoder
from rm_gallery.inspection.html import html_of
from rm_gallery.inspection.report import Report, ReportOptions, build_report
from rm_gallery.inspection.safe_text import visible
from rm_gallery.inspection.sections import page_of
from rm_gallery.inspection.terminal import Printer, print_page
from rm_gallery.inspection.verdicts import percent, verdicts
from rm_gallery.schema import Comparison, PreferenceGroup
from tests.inspection.made import pair, pairs, survey_of, words

HOSTILE = "<script>alert(1)</script> & \x1b[31mred\x1b[0m \u202etxt \ud800 [bold]x[/bold] </style>"


@pytest.fixture(autouse=True)
def no_forced_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def _report(*sides: list[PreferenceGroup], encoder: Encoder | None = None) -> Report:
    encoder = encoder or WordEncoder()
    names = ("training", "validation")
    surveys = [survey_of(groups, encoder, name=name) for groups, name in zip(sides, names, strict=False)]
    options = ReportOptions(
        packing=PackingConfig(), token_budget=None, seed=0, pads=False, tokenizer="", long_texts="left out"
    )
    return build_report(surveys, encoder, options)


def _printed(report: Report, **options: Any) -> str:
    stream = io.StringIO()
    Printer(Console(file=stream, highlight=False, markup=False, emoji=False, width=80, **options)).page(page_of(report))
    return stream.getvalue()


def _good(count: int, *, seed: int = 0) -> list[PreferenceGroup]:
    texts = [
        tuple(words(12, seed=seed * 10_000 + 3 * number + place) + "." for place in range(3)) for number in range(count)
    ]
    return pairs(*texts)  # type: ignore[arg-type]


def test_clean_data_have_nothing_to_mend() -> None:
    found = verdicts(_report(_good(120), _good(30, seed=1)))
    assert [each for each in found if each.level == "act"] == []
    assert found[-1].text == "Nothing here has to be mended before training."


def test_the_worst_stands_first() -> None:
    train = [*_good(100), pair("p", "a b c d.", "e f g h.", row=100), pair("p", "e f g h.", "a b c d.", row=101)]
    val = [*_good(20, seed=1), pair("p", "e f g h.", "a b c d.", row=20)]
    found = verdicts(_report(train, val))
    text = "\n".join(f"{each.level}: {each.text}" for each in found)
    assert [each.level for each in found] == sorted((each.level for each in found), key=["act", "know", "good"].index)
    assert "act: Contradictory labels: 2 pairs (2.0%) of training (first: f.parquet:100 = f.parquet:101)." in text
    assert "act: 4.8% of the validation pairs stand in training with the labels flipped (first: f.parquet:20)." in text


def test_mixed_styles_are_said_since_training_refuses_them() -> None:
    texts = [PreferenceGroup("p", ["a", "b"], (Comparison(0, 1),), where="g:0")]
    assert any("mix chats with bare texts" in each.text for each in verdicts(_report([*_good(2), *texts])))
    assert any("different kinds" in each.text for each in verdicts(_report(_good(2), texts)))


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0%"),
        (1.0, "100%"),
        (0.00001, "<0.1%"),
        (0.99999, ">99.9%"),
        (0.0449, "4.5%"),
        (0.5, "50%"),
        (0.995, "99.5%"),
    ],
)
def test_percentages_never_hide_the_first_or_the_last(share: float, text: str) -> None:
    assert percent(share) == text


def test_piped_output_has_no_colours_fits_80_columns_and_marks_the_prefix(tokenizer: Any) -> None:
    report = _report(_good(120), _good(30, seed=1), encoder=TokenEncoder(tokenizer, TokenizeConfig()))
    printed = _printed(report)
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert not any(line.endswith(" ") for line in printed.splitlines())
    sample = printed[printed.index("as the model sees them") :]
    assert sample.index("both begin with") < sample.index("\n  chosen (") < sample.index("\n  rejected (")
    assert "[[<|im_end|>]]" in sample
    assert "|u|s|e|r|\\n" in sample


def test_a_terminal_gets_colours(tokenizer: Any) -> None:
    report = _report(_good(3), encoder=TokenEncoder(tokenizer, TokenizeConfig()))
    printed = _printed(report, force_terminal=True, color_system="standard")
    assert "\x1b[" in printed
    assert "[[" not in printed


def test_data_cannot_steer_the_terminal() -> None:
    printed = _printed(_report([pair(HOSTILE, HOSTILE + "a.", HOSTILE + "b.", source=HOSTILE)] * 2))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", printed)
    assert "\\x1b[31mred" in printed
    assert "[bold]x[/bold]" in printed


def test_a_stream_that_only_takes_ascii_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_page(page_of(_report([pair("\u6211", "\u00e9t\u00e9 a", "b c")])), stream)
    stream.flush()
    assert b"\\xe9t\\xe9" in raw.getvalue()


def test_harmful_characters_become_visible_and_the_rest_stays() -> None:
    assert visible("a\n\tb\u00e9\U0001f60a") == "a\n\tb\u00e9\U0001f60a"
    assert visible("\x00\x1b\x9b\u202e\ud800\u2028\r") == "\\x00\\x1b\\x9b\\u202e\\ud800\\u2028\\x0d"


class _Tags(HTMLParser):
    """Tags, attributes and text of a page."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("with_tokens", [True, False])
def test_data_cannot_inject_markup(tokenizer: Any, with_tokens: bool) -> None:
    hostile = HOSTILE.replace("\ud800", "")
    texts = [hostile + end for end in ("a.", "b.")]
    groups = [
        PreferenceGroup("", texts, (Comparison(0, 1),), "text", f"{hostile}:3", f"{hostile}{number % 2}")
        for number in range(4)
    ]
    encoder = TokenEncoder(tokenizer, TokenizeConfig()) if with_tokens else WordEncoder()
    page = html_of(page_of(_report(groups, groups, encoder=encoder)))
    page.encode()
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.tags
    assert tags.tags.count("style") == 1
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in tags.attributes)
    assert "\x1b" not in page
    assert "script" in page


def test_the_page_asks_for_nothing() -> None:
    page = html_of(page_of(_report(_good(120), _good(30, seed=1))))
    assert not re.search(r"https?:|url\(|@import|<link|<img|<script|<iframe", page)
    assert "prefers-color-scheme: dark" in page


def test_every_figure_has_its_line_in_both(tokenizer: Any) -> None:
    report = _report(_good(120), _good(30, seed=1), encoder=TokenEncoder(tokenizer, TokenizeConfig()))
    printed, page = " ".join(_printed(report).split()), html_of(page_of(report))
    for title in (
        "Lengths of training",
        "Cost of one epoch",
        "Is the longer one chosen?",
        "What a reward model has to beat",
        "Training against validation",
        "Duplicates in training",
        "Suspicious pairs in validation",
    ):
        assert title in printed
        assert title in page
    for figure in ("different prompts", "longest whole text of a row", "packed here", "bag of words, validation"):
        assert figure in printed
        assert figure in page


def test_json_holds_every_figure() -> None:
    facts = json.loads(json.dumps(_report(_good(120), _good(30, seed=1)).as_dict()))
    assert [side["num_pairs"] for side in facts["sides"]] == [120, 30]
    assert {each["key"] for each in facts["overlap"]} >= {"shared_prompts", "flipped_pairs"}
    assert len(facts["baselines"]["baselines"]) == 4


def test_long_texts_are_shown_by_their_ends(tokenizer: Any) -> None:
    group = pair("q", "x" * 500 + "end", "y")
    report = _report([group], encoder=TokenEncoder(tokenizer, TokenizeConfig()))
    chosen = report.sides[0].samples[0].responses[0]
    assert (chosen.length, len(chosen.head) + len(chosen.tail) + chosen.num_hidden) == (chosen.length, chosen.length)
    assert "".join(piece.text for piece in chosen.tail).endswith("end<|im_end|>\n")
    assert f"... {chosen.num_hidden:,} tokens more ..." in " ".join(_printed(report).split())


def test_rankings_name_wins_and_losses() -> None:
    ranking = PreferenceGroup("p ", ["a", "b", "c"], [Comparison(0, 1), Comparison(0, 2)], where="g:0")
    labels = [each.label for each in _report([ranking]).sides[0].samples[0].responses]
    assert labels == ["response 1, +2 -0", "response 2, +0 -1", "response 3, +0 -1"]
    assert "response 1, +2 -0" in _printed(_report([ranking]))


def test_a_pair_whose_second_response_is_better_is_labelled_so() -> None:
    group = PreferenceGroup("p ", ["a", "b"], [Comparison(1, 0)], where="g:0")
    assert [each.label for each in _report([group]).sides[0].samples[0].responses] == ["rejected", "chosen"]


def test_groups_without_pairs_do_no_harm() -> None:
    report = _report([PreferenceGroup("p ", ["a"], (), where="g:0")])
    assert report.sides[0].num_pairs == 0
    assert "What the model will see" in _printed(report)
    assert html_of(page_of(report))
