"""The table: places, sources, rankings."""

from __future__ import annotations

import numpy as np
import pytest

from rm_gallery.inspection.longer import longer_report, source_reports
from rm_gallery.inspection.table import Places
from rm_gallery.schema import Comparison, PreferenceGroup
from tests.inspection.made import pair, pairs, table_of


@pytest.mark.parametrize(
    "where", ["a.parquet:3", "s3://b/a:b.parquet:0", "no row", "", "x:-1", "x:1.5", "x:" + "9" * 30]
)
def test_places_come_back_as_they_were(where: str) -> None:
    places = Places()
    places.add("other.parquet:7")
    places.add(where)
    assert places.where(1) == where


def test_a_ranking_becomes_several_pairs_of_one_group() -> None:
    ranking = PreferenceGroup("p", ["aaa", "bb", "c"], [Comparison(0, 1), Comparison(2, 1)], where="f:0")
    table = table_of([pair("q", "x", "y"), ranking, PreferenceGroup("lonely", ["answer"])])
    assert (table.num_groups, table.num_pairs) == (3, 3)
    assert table.group.tolist() == [0, 1, 1]
    assert (table.chars[table.better].tolist(), table.chars[table.worse].tolist()) == ([1, 3, 1], [1, 2, 2])
    assert table.first_response.tolist() == [0, 2, 5, 6]


def test_longer_counts_ties_apart() -> None:
    table = table_of(pairs(("p", "aa", "b"), ("p", "a", "bb"), ("p", "aaa", "b"), ("p", "a", "b")))
    report = longer_report(table, table.chars, unit="characters")
    assert (report.longer_chosen, report.shorter_chosen, report.ties) == (2, 1, 1)
    assert report.share == 2 / 3
    assert longer_report(table, np.ones(8, int), unit="tokens").share is None


def test_sources_are_listed_when_there_are_several() -> None:
    rows = [pair("p", "aa", "b", source="one"), pair("p", "a", "bb", source="two"), pair("p", "aa", "b", source="one")]
    assert [(each.name, each.pairs, each.longer_chosen) for each in source_reports(table_of(rows))] == [
        ("one", 2, 1.0),
        ("two", 1, 0.0),
    ]
    assert source_reports(table_of(rows[:1])) == []


def test_many_sources_end_in_one_line() -> None:
    rows = [pair("p", "aa", "b", source=f"s{number:02d}") for number in range(30)]
    reports = source_reports(table_of(rows), most=5)
    assert [(each.name, each.pairs) for each in reports][3:] == [("s03", 1), ("(26 others)", 26)]
    assert sum(each.pairs for each in reports) == 30
