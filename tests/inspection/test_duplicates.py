"""Duplicates, contradictions, and what training and validation share."""

from __future__ import annotations

from rm_gallery.data.dropped import Dropped
from rm_gallery.inspection.duplicates import duplicate_findings, overlap_findings
from rm_gallery.inspection.findings import Finding, dropped_findings
from rm_gallery.schema import Comparison, PreferenceGroup
from tests.inspection.made import pairs, table_of, words


def _by_key(findings: list[Finding]) -> dict[str, Finding]:
    return {each.key: each for each in findings}


def test_copies_and_opposites_are_told_apart() -> None:
    found = _by_key(
        duplicate_findings(
            table_of(pairs(("p", "a", "b"), ("p", "a", "b"), ("q", "a", "b"), ("p", "b", "a"), ("p", "a", "c")))
        )
    )
    assert found["repeated_pairs"].count == 1
    assert found["repeated_pairs"].examples == ("f.parquet:0 = f.parquet:1",)
    assert found["contradictions"].count == 3  # both copies and their opposite
    assert found["contradictions"].examples == ("f.parquet:0 = f.parquet:3",)
    assert found["near_duplicates"].count == 0  # too short


def test_near_duplicates_leave_exact_copies_out() -> None:
    text = words(100, seed=1)
    rows = [("p", text, "no"), ("p", text, "no"), ("p", f"{text} indeed", "no"), ("p", words(100, seed=2), "no")]
    near = _by_key(duplicate_findings(table_of(pairs(*rows))))["near_duplicates"]
    assert (near.count, near.examples) == (1, ("f.parquet:0 ~ f.parquet:2",))


def test_a_ranking_is_compared_pair_by_pair() -> None:
    ranking = PreferenceGroup("p", ["a", "b", "c"], [Comparison(0, 1), Comparison(0, 2), Comparison(1, 2)])
    opposite = PreferenceGroup("p", ["c", "b"], [Comparison(0, 1)])
    found = _by_key(duplicate_findings(table_of([ranking, opposite])))
    assert (found["contradictions"].count, found["contradictions"].total) == (2, 4)


def test_overlap_counts_prompts_pairs_and_flipped_labels() -> None:
    long = words(100, seed=3)
    train = table_of(pairs(("p", "a", "b"), ("q", "c", "d"), ("r", long, "no"), ("s", "e", "f")))
    val = table_of(
        pairs(
            ("p", "a", "b"),
            ("q", "d", "c"),
            ("q", "x", "y"),
            ("t", "x", "c"),
            ("r", f"{long} so", "no"),
            ("u", "v", "w"),
        )
    )
    found = _by_key(overlap_findings(train, val))
    assert {key: each.count for key, each in found.items()} == {
        "shared_prompts": 4,
        "shared_responses": 4,
        "shared_pairs": 1,
        "flipped_pairs": 1,
        "near_shared": 1,
    }
    assert found["flipped_pairs"].examples == ("f.parquet:1",)
    assert found["near_shared"].examples == ("f.parquet:4",)


def test_a_prompt_that_all_rows_have_is_no_overlap() -> None:
    train, val = table_of(pairs(("p", "a", "b"), ("p", "c", "d"))), table_of(pairs(("p", "x", "y")))
    found = _by_key(overlap_findings(train, val))
    assert "shared_prompts" not in found
    assert found["shared_responses"].count == 0


def test_empty_sides_have_nothing_in_common() -> None:
    empty, full = table_of([]), table_of(pairs(("p", "a", "b")))
    for train, val in ((empty, full), (full, empty), (empty, empty)):
        assert [each.count for each in overlap_findings(train, val) if each.count] == []
    assert all(each.count == each.share == 0 for each in duplicate_findings(empty))


def test_dropped_rows_become_findings_the_most_frequent_first() -> None:
    dropped = Dropped()
    for reason, row in (("null chosen", 4), ("empty rejected", 5), ("empty rejected", 6)):
        dropped.add(reason, f"f:{row}")
    found = dropped_findings(dropped, 7)
    assert [(each.title, each.count, each.share, each.examples) for each in found] == [
        ("empty rejected", 2, 0.2, ("f:5",)),
        ("null chosen", 1, 0.1, ("f:4",)),
    ]
