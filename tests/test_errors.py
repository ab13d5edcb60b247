"""Errors: the nearest known word; rows that are left out.

Those are counted by reason, with memory that does not grow with the data.
"""

from __future__ import annotations

import pytest

from rm_gallery.errors import Dropped, TrainingStopped, UserError, nearest, one_line


@pytest.mark.parametrize(
    ("word", "hint"),
    [("cosin", " Did you mean 'cosine'?"), ("wds", " Did you mean 'wsd'?"), ("linear", ""), ("", "")],
)
def test_the_nearest_word_is_named_when_one_looks_alike(word: str, hint: str) -> None:
    assert nearest(word, ["cosine", "wsd", "constant"]) == hint


def test_every_mistake_of_a_person_is_one_kind_of_error() -> None:
    assert issubclass(TrainingStopped, UserError)
    assert issubclass(UserError, ValueError)


def test_reasons_are_counted_with_the_first_place_of_each() -> None:
    dropped = Dropped()
    for reason, where, count in (("null chosen", "a:3", 1), ("empty", "a:4", 2), ("null chosen", "a:9", 4)):
        dropped.add(reason, where, count)
    assert dropped.total == 7
    assert dropped.describe() == "5 null chosen (first: a:3), 2 empty (first: a:4)"


def test_reasons_that_quote_their_row_do_not_fill_the_memory() -> None:
    dropped = Dropped()
    for number in range(5000):
        dropped.add(f"the template rejects {number}", f"a:{number}")
    assert dropped.total == 5000
    assert len(dropped.counts) == len(dropped.examples) == 201


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("disk full", "disk full"),
        ("  disk\tfull.\n\nmore", "disk full"),
        ("Error loading:\n  missing key a\n  missing key b", "Error loading: missing key a missing key b"),
        ("", "ValueError"),
        ("x" * 300, "x" * 197 + "..."),
    ],
)
def test_an_error_in_one_line(text: str, line: str) -> None:
    assert one_line(ValueError(text)) == line


def test_an_error_without_a_message_is_described_by_its_cause() -> None:
    error = RuntimeError()
    error.__cause__ = OSError("no route to host")
    assert one_line(error) == "no route to host"
