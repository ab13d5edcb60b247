"""Views: plain texts of a group, words, hashes."""

from __future__ import annotations

from rm_gallery.inspection.views import WordIds, hash_text, view_of, words_of
from rm_gallery.schema import Comparison, PreferenceGroup
from tests.inspection.made import pair


def test_a_conversation_that_stands_in_both_responses_is_counted_to_the_prompt() -> None:
    shared = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    answers = [[*shared, {"role": "user", "content": "So"}, {"role": "assistant", "content": t}] for t in "ab"]
    view = view_of(PreferenceGroup([], answers, (Comparison(0, 1),), "chat"))
    assert view.prompt == "Hi\nYes?\nSo"
    assert view.responses == ("a", "b")


def test_every_response_keeps_its_last_turn() -> None:
    same = [{"role": "assistant", "content": "a"}]
    assert view_of(PreferenceGroup([], [same, same], (), "chat")).responses == ("a", "a")


def test_tool_calls_are_part_of_the_text() -> None:
    answers = [[{"role": "assistant", "tool_calls": [{"name": name}]}] for name in "ab"]
    assert view_of(PreferenceGroup([], answers, (), "chat")).responses == ('[{"name": "a"}]', '[{"name": "b"}]')


def test_texts_are_taken_as_they_are() -> None:
    view = view_of(PreferenceGroup("p ", ["a", "b"], (Comparison(1, 0),)))
    assert (view.prompt, view.responses) == ("p ", ("a", "b"))
    assert view_of(pair("p", "x", "y")).responses == ("x", "y")


def test_words_have_no_case_and_scripts_without_spaces_count_by_the_character() -> None:
    assert words_of("Don't STOP, 2x!") == ["don", "t", "stop", "2x"]
    assert words_of("\u6211\u7231 ok\u4f60") == ["\u6211", "\u7231", "ok", "\u4f60"]
    assert words_of("\ud83d\ude0a ...") == []


def test_hashes_are_the_same_everywhere_and_take_half_characters() -> None:
    assert hash_text("") == 13020603013274838756
    assert hash_text("\ud800") != hash_text("\ud801")


def test_remembered_and_computed_word_numbers_are_equal() -> None:
    ids = WordIds()
    first = ids["word"]
    assert "word" in ids
    assert ids["word"] == first == WordIds()["word"] < 2**31
    assert ids["x" * 100] == ids["x" * 100]
    assert "x" * 100 not in ids
