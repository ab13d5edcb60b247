"""Suspicious pairs: what can be seen on one pair alone, as a bit for each check."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rm_gallery.inspection.findings import MAX_EXAMPLES, Finding
from rm_gallery.inspection.table import Table
from rm_gallery.inspection.views import GroupView, words_of
from rm_gallery.schema import Comparison

CUT_CHARS = 200
"""Only responses at least this long can look cut off; short answers often have no full stop."""
INSIDE_CHARS = 20
SHORT_WORDS = 2


@dataclass(frozen=True)
class Check:
    """One thing to look for."""

    key: str
    title: str
    why: str


CHECKS = (
    Check("same_words", "same letters and digits in both", "they differ only in case, spaces or punctuation"),
    Check("no_words", "a response without a single word", "only punctuation, symbols or spaces"),
    Check("beginning", "one response is the beginning of the other", "one may be a cut-off copy of the other"),
    Check("inside", "one response stands inside the other", "quoted, wrapped or pasted twice"),
    Check("chosen_cut", "chosen ends in mid-sentence", "the preferred text may have been cut off (code and lists too)"),
    Check("rejected_cut", "rejected ends in mid-sentence", "if only one side is cut, a model learns to spot cuts"),
    Check("short_chosen", f"chosen has at most {SHORT_WORDS} words", "fine for short answers, odd for chats"),
    Check("p_below_half", "p_chosen below 0.5", "most people preferred the one called rejected"),
    Check("negative_margin", "margin below 0", "the scores say that the rejected one is better"),
)
_BIT = {check.key: 1 << place for place, check in enumerate(CHECKS)}


def flags_of(view: GroupView, comparison: Comparison) -> int:
    """The bits of all checks that the pair fails."""
    better, worse = view.responses[comparison.better], view.responses[comparison.worse]
    found = []
    short, long = sorted((better.strip(), worse.strip()), key=len)
    if len(short) >= INSIDE_CHARS and short in long:
        found.append("beginning" if long.startswith(short) else "inside")
    if len(long) < 2 * len(short) + 8 and _letters(short) == _letters(long):
        found.append("same_words")
    if not any(map(str.isalnum, short)) or not any(map(str.isalnum, long)):
        found.append("no_words")
    elif len(better) < 400 and len(words_of(better)) <= SHORT_WORDS:
        found.append("short_chosen")
    found += [key for key, text in (("chosen_cut", better), ("rejected_cut", worse)) if _looks_cut(text)]
    if _below(getattr(comparison, "p_better", None), 0.5):
        found.append("p_below_half")
    if _below(getattr(comparison, "margin", None), 0.0):
        found.append("negative_margin")
    return sum(_BIT[key] for key in found)


def _letters(text: str) -> str:
    return "".join(words_of(text)) or "".join(text.split())


def _looks_cut(text: str) -> bool:
    """Long, and the last character is a letter, a digit, a comma or an opening mark."""
    end = text.rstrip()[-1:]
    return len(text) >= CUT_CHARS and bool(end) and (end.isalnum() or end in ",;:(-\u2013\u2014")


def _below(value: float | None, limit: float) -> bool:
    return value is not None and not math.isnan(value) and value < limit


def suspicious_findings(table: Table) -> list[Finding]:
    """One finding per check, those that nothing failed included."""
    findings = []
    for check in CHECKS:
        failed = np.flatnonzero(table.flags & _BIT[check.key])
        examples = tuple(table.where(int(table.group[index])) for index in failed[:MAX_EXAMPLES])
        findings.append(Finding(check.key, check.title, len(failed), table.num_pairs, check.why, examples))
    return findings
