"""Checks on one pair alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from rm_gallery.inspection.suspicious import flags_of, suspicious_findings
from rm_gallery.inspection.views import view_of
from tests.inspection.made import pair, pairs, table_of, words


def _found(chosen: str, rejected: str) -> set[str]:
    return {each.key for each in suspicious_findings(table_of(pairs(("p", chosen, rejected)))) if each.count}


LONG = words(60, seed=1)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("A good and complete answer.", "Another answer, also fine.", set()),
        ("It is so, is it?", "it is so is it", {"same_words"}),
        ("...", "It is like that.", {"no_words"}),
        ("It is like that.", "\n ?", {"no_words"}),
        ("Well, yes.", "It depends on many things.", {"short_chosen"}),
        ("It depends on many things.", "No.", set()),
        ("This is the answer, in full.", "This is the answer, in full. And more of it.", {"beginning"}),
        ("So: This is the answer, in full. Done.", "This is the answer, in full.", {"inside"}),
        ("Yes.", "Yes. It really is so.", {"short_chosen"}),
        (f"{LONG}.", LONG + " and then the", {"rejected_cut"}),
        (f"{LONG} and,", f"Other: {LONG}!", {"chosen_cut"}),
        (f"{LONG})", f"Other: {LONG}\u3002", set()),
    ],
)
def test_each_check_finds_its_own(chosen: str, rejected: str, expected: set[str]) -> None:
    assert _found(chosen, rejected) - {"beginning" if LONG in chosen else ""} == expected


@dataclass(frozen=True)
class _Labelled:
    better: int = 0
    worse: int = 1
    p_better: float | None = None
    margin: float | None = None


@pytest.mark.parametrize(
    ("labels", "suspicious"),
    [
        ({"p_better": 0.49}, True), ({"p_better": 0.5}, False), ({"p_better": float("nan")}, False),
        ({"margin": -0.1}, True), ({"margin": 0.0}, False), ({}, False),
    ],
)  # fmt: skip
def test_labels_against_the_pair(labels: dict[str, float], suspicious: bool) -> None:
    view = view_of(pair("p", "A good answer.", "A bad one, really."))
    assert bool(flags_of(view, _Labelled(**labels))) is suspicious  # type: ignore[arg-type]


def test_findings_name_rows_and_count_all() -> None:
    texts = [("p", "...", "It is like that.")] * 5 + [("p", "It is fine.", "It is not.")]
    found = {each.key: each for each in suspicious_findings(table_of(pairs(*texts)))}
    assert (found["no_words"].count, found["no_words"].total) == (5, 6)
    assert found["no_words"].examples == ("f.parquet:0", "f.parquet:1", "f.parquet:2")
