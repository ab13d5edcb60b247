"""Findings: how many rows or pairs have a property, with examples; the checks that look at one pair alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from rm_gallery.errors import Dropped
from rm_gallery.inspection.texts import ExampleText, GroupTexts, words_of
from rm_gallery.schema import Comparison

MAX_EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """`count` of `total` rows or pairs have the property in `title`."""

    key: str
    """Stable name, for programs."""
    title: str
    count: int
    total: int
    why: str
    """Consequence for training."""
    examples: tuple[str, ...] = ()
    """`file:row` of the first ones, or two of them for a pair of rows."""
    thing: str = "pair"
    """What is counted: `pair` or `row`."""
    texts: tuple[ExampleText, ...] = ()
    """Of the examples."""

    @property
    def share(self) -> float:
        """From 0 to 1; 0 if `total` is 0."""
        return self.count / self.total if self.total else 0.0


def dropped_findings(dropped: Dropped, num_kept: int, texts: Mapping[str, ExampleText]) -> list[Finding]:
    """One finding per reason, the most frequent first. texts: of the first row of each reason."""
    total = num_kept + dropped.total
    ordered = sorted(dropped.counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        Finding(
            "dropped",
            reason,
            count,
            total,
            "",
            (dropped.examples[reason],),
            "row",
            (texts[reason],) if reason in texts else (),
        )
        for reason, count in ordered
    ]


def find(findings: Iterable[Finding], key: str) -> Finding | None:
    """The finding with this key; None if it was not checked."""
    return next((each for each in findings if each.key == key), None)


MIN_TRUNCATED_CHARS = 200
"""Minimum characters of a response to be flagged as truncated; short answers often have no full stop."""
MIN_CONTAINED_CHARS = 20
SHORT_WORDS = 2


@dataclass(frozen=True)
class Check:
    """A heuristic on one pair."""

    key: str
    title: str
    why: str


CHECKS = (
    Check("same_words", "responses equal except for case, spaces and punctuation", "the label depends on formatting"),
    Check("no_words", "response without words", "only punctuation, symbols or white space"),
    Check("beginning", "one response is a prefix of the other", "it may be a truncated copy"),
    Check("inside", "one response contains the other", "quoted, wrapped or pasted twice"),
    Check("chosen_cut", "chosen ends mid-sentence", "it may be truncated; code and lists match too"),
    Check("rejected_cut", "rejected ends mid-sentence", "if one side is truncated more often, truncation predicts it"),
    Check("short_chosen", f"chosen has at most {SHORT_WORDS} words", "expected for short answers, unusual for chats"),
    Check("p_below_half", "p_chosen below 0.5", "most annotators preferred the rejected response"),
    Check("negative_margin", "negative margin", "the scores contradict the label"),
)
_BIT = {check.key: 1 << place for place, check in enumerate(CHECKS)}


def flags_of(texts: GroupTexts, comparison: Comparison) -> int:
    """Bit mask of the checks that match the pair."""
    better, worse = texts.responses[comparison.better], texts.responses[comparison.worse]
    found = []
    short, long = sorted((better.strip(), worse.strip()), key=len)
    if len(short) >= MIN_CONTAINED_CHARS and short in long:
        found.append("beginning" if long.startswith(short) else "inside")
    if len(long) < 2 * len(short) + 8 and _letters(short) == _letters(long):
        found.append("same_words")
    if not any(map(str.isalnum, short)) or not any(map(str.isalnum, long)):
        found.append("no_words")
    elif len(better) < 400 and len(words_of(better)) <= SHORT_WORDS:
        found.append("short_chosen")
    found += [key for key, text in (("chosen_cut", better), ("rejected_cut", worse)) if _looks_truncated(text)]
    if _is_below(comparison.p_better, 0.5):
        found.append("p_below_half")
    if _is_below(comparison.margin, 0.0):
        found.append("negative_margin")
    return sum(_BIT[key] for key in found)


def _letters(text: str) -> str:
    return "".join(words_of(text)) or "".join(text.split())


def _looks_truncated(text: str) -> bool:
    """Long, and the last character is a letter, a digit, a comma or an opening mark."""
    end = text.rstrip()[-1:]
    return len(text) >= MIN_TRUNCATED_CHARS and bool(end) and (end.isalnum() or end in ",;:(-\u2013\u2014")


def _is_below(value: float | None, limit: float) -> bool:
    return value is not None and not math.isnan(value) and value < limit


def suspicious_findings(flags: np.ndarray, text: Callable[[int], ExampleText]) -> list[Finding]:
    """One finding per check, those without a match included.

    flags: [C] int64, as of `flags_of`. text: of a pair.
    """
    findings = []
    for check in CHECKS:
        matches = np.flatnonzero(flags & _BIT[check.key])
        texts = tuple(text(int(pair)) for pair in matches[:MAX_EXAMPLES])
        examples = tuple(each.where for each in texts)
        findings.append(Finding(check.key, check.title, len(matches), len(flags), check.why, examples, texts=texts))
    return findings
