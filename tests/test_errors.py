"""Errors: the nearest known word."""

from __future__ import annotations

import pytest

from rm_gallery.errors import TrainingStopped, UserError, nearest


@pytest.mark.parametrize(
    ("word", "hint"),
    [("cosin", " Did you mean 'cosine'?"), ("wds", " Did you mean 'wsd'?"), ("linear", ""), ("", "")],
)
def test_the_nearest_word_is_named_when_one_looks_alike(word: str, hint: str) -> None:
    assert nearest(word, ["cosine", "wsd", "constant"]) == hint


def test_every_mistake_of_a_person_is_one_kind_of_error() -> None:
    assert issubclass(TrainingStopped, UserError)
    assert issubclass(UserError, ValueError)
