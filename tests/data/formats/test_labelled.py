"""Labelled responses: which one is chosen, by hand for each published layout; ties and unusable labels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.data.formats import FormatConfig, ResponsesConfig, RowReader, choose_format
from rm_gallery.data.formats.cells import LONE_SURROGATE
from rm_gallery.data.sources import SourceConfig, read_rows, resolve_files
from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup
from tests.data.formats.rows import assistant, conversations, numbered, only, order, read, read_all, read_one, user
from tests.data.sources.writing import write

HI = [user("hi")]
A, B = [assistant("a")], [assistant("b")]
PKU = {"prompt": "hi", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
SHP = {"history": "hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9, "score_B": 2}
ARENA = {"model_a": "x", "model_b": "y", "winner": "model_b", "conversation_a": HI + A, "conversation_b": HI + B}
LMSYS = {
    "id": 1, "model_a": "x", "model_b": "y", "prompt": '["hi"]', "response_a": '["a"]', "response_b": '["b"]',
    "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0,
}  # fmt: skip
SUMMARIES = {"info": {"id": "t3", "title": "T", "post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}
NECTAR = {
    "prompt": "hi",
    "answers": [{"answer": "a", "rank": 2.0, "model": "m"}, {"answer": "b", "rank": 1.0, "model": "n"}],
}
HELPSTEER2 = {"prompt": "hi", "response_1": "a", "response_2": "b", "preference_strength": 2}
SWIFT = {"messages": HI + B, "rejected_response": "a"}
FACTORY = {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "b"}}
FACTORY = {**FACTORY, "rejected": {"from": "gpt", "value": "a"}}
LISTS = {"prompt": "hi", "chosen": ["b"], "rejected": ["a"]}

# Of two responses a and b to "hi", b is chosen.
LAYOUTS: dict[str, dict[str, Any]] = {
    "PKU-SafeRLHF": PKU,
    "PKU-SafeRLHF, text": {**PKU, "better_response_id": "1"},
    "SHP": {**SHP, "labels": 0},
    "Arena": ARENA,
    "LMSYS": LMSYS,
    "LMSYS, text": {**LMSYS, "prompt": "hi", "response_a": "a", "response_b": "b", "winner_model_b": "1"},
    "Arena, name of the model": {**ARENA, "winner": "y"},
    "Arena, responses": {"prompt": "hi", "response_a": "a", "response_b": "b", "winner": "b"},
    "Nectar": NECTAR,
    "Nectar, markers": {**NECTAR, "prompt": "\n\nHuman: hi\n\nAssistant: "},
    "HelpSteer2, preferences": HELPSTEER2,
    "ms-swift": SWIFT,
    "ms-swift, messages": {"messages": HI + B, "rejected_messages": HI + A},
    "ms-swift, query": {"query": "hi", "response": "b", "rejected_response": "a"},
    "LLaMA-Factory": FACTORY,
    "RewardBench 2": LISTS,
    "UltraFeedback by Argilla": {"instruction": "hi", "chosen_response": "b", "rejected_response": "a"},
    "OpenAI": {"input": {"messages": HI}, "preferred_output": B, "non_preferred_output": A},
    "objects with messages": {"chosen": {"messages": HI + B}, "rejected": {"messages": HI + A}},
}


def check_b_is_chosen(group: PreferenceGroup) -> None:
    pair = only(group)
    turns = [[*group.prompt, *group.responses[place]] for place in (pair.better, pair.worse)]  # type: ignore[list-item]
    assert turns == [HI + B, HI + A]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_better_response_of_each_layout(name: str) -> None:
    check_b_is_chosen(read_one(LAYOUTS[name]))


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet"])
def test_the_same_from_files(kind: str, tmp_path: Path) -> None:
    for name, row in LAYOUTS.items():
        write(tmp_path / kind, [row, row], like=kind)
        groups, _ = read_all(
            read_rows(resolve_files(SourceConfig(str(tmp_path / kind)), key="k"), key="k"), FormatConfig()
        )
        assert len(groups) == 2, name
        check_b_is_chosen(groups[1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_scoring_reads_both_responses_without_the_label(name: str) -> None:
    labels = ("better_response_id", "safer_response_id", "labels", "winner", "preference_strength", "winner_model_a")
    rows = numbered({key: value for key, value in LAYOUTS[name].items() if key not in labels})
    group = RowReader(config := ResponsesConfig(), choose_format(rows, config).name, has_chat_template=True).read(
        rows[0]
    )
    found = [[*group.prompt, *response] for response in group.responses]  # type: ignore[list-item]
    assert sorted(found, key=str) == [HI + A, HI + B]
    assert not group.comparisons


@pytest.mark.parametrize(("label", "chosen"), [(0, 0), (1, 1), ("0", 0), ("1", 1), (1.0, 1)])
def test_the_id_of_saferlhf_counts_from_0(label: Any, chosen: int) -> None:
    assert order(read_one({**PKU, "better_response_id": label})) == [(chosen, 1 - chosen)]
    safer = {**PKU, "safer_response_id": label, "better_response_id": 0}
    assert order(read_one(safer, better_response_id="safer_response_id")) == [(chosen, 1 - chosen)]


@pytest.mark.parametrize(("label", "chosen"), [(1, 0), (0, 1), ("1", 0)])
def test_label_1_of_shp_is_the_first_comment(label: Any, chosen: int) -> None:
    assert order(read_one({**SHP, "labels": label})) == [(chosen, 1 - chosen)]


@pytest.mark.parametrize(
    ("winner", "chosen"), [("model_a", 0), ("Model_A ", 0), ("a", 0), ("B", 1), ("x", 0), ("y", 1), ("model_b", 1)]
)
def test_the_winner_of_arena_is_a_side_or_a_model(winner: str, chosen: int) -> None:
    assert order(read_one({**ARENA, "winner": winner})) == [(chosen, 1 - chosen)]


@pytest.mark.parametrize(("outcome", "chosen"), [((1, 0, 0), 0), (("0", "1", "0"), 1), ((True, False, False), 0)])
def test_the_winner_of_lmsys_is_in_one_of_three_columns(outcome: Any, chosen: int) -> None:
    said = dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), outcome, strict=True))
    assert order(read_one({**LMSYS, **said})) == [(chosen, 1 - chosen)]


def test_turns_of_lmsys_become_conversations() -> None:
    row = {**LMSYS, "prompt": '["hi", "why?"]', "response_a": '["a", "c"]', "response_b": '["b", "d"]'}
    why = user("why?")
    assert conversations(row) == [[*HI, *A, why, assistant("c")], [*HI, *B, why, assistant("d")]]
    assert order(read_one(row)) == [(1, 0)]
    text = {**LMSYS, "prompt": "[1]", "response_a": "[2]", "response_b": "[3]"}
    assert conversations(text) == [[user("[1]"), assistant("[2]")], [user("[1]"), assistant("[3]")]]


OUTCOMES = "winner_model_a, winner_model_b, winner_tie"
BOTH_SAFE = [
    ({**ARENA, "winner": "tie"}, "winner that is a tie"),
    ({**ARENA, "winner": "tie (bothbad)"}, "winner that is a tie"),
    ({**ARENA, "winner": "both_bad"}, "winner that is a tie"),
    ({**ARENA, "winner": "x", "model_b": "x"}, "winner that names neither side"),
    ({**ARENA, "winner": "gpt"}, "winner that names neither side"),
    ({**ARENA, "winner": None}, "null winner"),
    ({**LMSYS, "winner_model_b": 0, "winner_tie": 1}, "winner that is a tie"),
    ({**LMSYS, "winner_model_a": 1}, f"{OUTCOMES} of which not exactly one is 1 and the others 0"),
    ({**LMSYS, "winner_model_b": 0.5, "winner_tie": 0.5}, f"{OUTCOMES} of which not exactly one is 1 and the others 0"),
    ({**LMSYS, "winner_tie": None}, "null winner_tie"),
    ({**LMSYS, "response_a": "[null]"}, "response_a with a turn that is null"),
    ({**LMSYS, "response_a": '[" "]'}, "empty response_a"),
    ({**LMSYS, "response_a": '["a", "c"]'}, "prompt, response_a, response_b with different numbers of turns"),
    ({**LMSYS, "response_a": '["\\ud83d"]'}, LONE_SURROGATE),
    ({**PKU, "better_response_id": 2}, "better_response_id that is not from 0 to 1"),
    ({**PKU, "better_response_id": -1}, "better_response_id that is not from 0 to 1"),
    ({**PKU, "better_response_id": 0.5}, "better_response_id that is not from 0 to 1"),
    ({**PKU, "better_response_id": None}, "null better_response_id"),
    ({**PKU, "better_response_id": True}, "better_response_id that is true or false, not a number"),
    ({**PKU, "better_response_id": math.nan}, "better_response_id that is not finite"),
    ({**SHP, "labels": "A"}, "labels that is not a number"),
    ({**SUMMARIES, "choice": 2}, "choice that is not from 0 to 1"),
    ({**HELPSTEER2, "preference_strength": 0}, "preference_strength that is a tie"),
    ({**NECTAR, "answers": [{"answer": text, "rank": 1} for text in "ab"]}, "all ranks in answers equal"),
    ({**NECTAR, "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]}, "null rank in answers"),
    ({**LISTS, "rejected": []}, "empty rejected"),
    ({"messages": HI, "rejected_response": "a"}, "messages that do not end with an assistant turn after others"),
]


@pytest.mark.parametrize(("row", "reason"), BOTH_SAFE)
def test_ties_and_labels_that_say_nothing_cost_their_row(row: dict[str, Any], reason: str) -> None:
    good = next(
        each
        for each in (ARENA, LMSYS, PKU, SHP, SUMMARIES, HELPSTEER2, NECTAR, LISTS, SWIFT)
        if each.keys() == row.keys()
    )
    others = [row | {"better_response_id": 0}, good] if row.keys() == PKU.keys() else [good]
    others = [{**SUMMARIES, "choice": 0}] if row.keys() == SUMMARIES.keys() else others
    groups, dropped = read(*others, row)
    assert [group.where for group in groups] == [f"a.parquet:{place}" for place in range(len(others))]
    assert dropped.counts == {reason: 1}


@pytest.mark.parametrize("row", [{**PKU, "better_response_id": 2}, {**SHP, "labels": "2"}, {**SUMMARIES, "choice": 2}])
def test_labels_that_count_from_1_are_an_error(row: dict[str, Any]) -> None:
    column = next(name for name in ("better_response_id", "labels", "choice") if name in row)
    sentence = f"{column} counts from 0, but here from 1 to the number of responses; subtract 1"
    assert sentence in refused({**row, column: 1}, row)


def test_summaries_have_the_title_and_the_post_as_prompt() -> None:
    group = read_one(SUMMARIES)
    assert (group.prompt, group.responses, order(group)) == ([user("T\n\nP")], [A, B], [(1, 0)])
    article = {**SUMMARIES, "info": {"article": "N", "post": None}, "choice": 0}
    assert (read_one(article).prompt, order(read_one(article))) == ([user("N")], [(0, 1)])


def test_equal_ranks_are_not_compared_and_scores_take_precedence_over_ranks() -> None:
    answers = [{"answer": text, "rank": rank} for text, rank in (("a", 2), ("b", 1), ("c", 2))]
    assert order(read_one({**NECTAR, "answers": answers})) == [(1, 0), (1, 2)]
    assert order(read_one({**NECTAR, "answers": [{**each, "score": each["rank"]} for each in answers]})) == [
        (0, 1),
        (2, 1),
    ]
    assert order(read_one({**NECTAR, "answers": answers}, score="rank")) == [(1, 0), (1, 2)]


def test_markers_of_several_turns_become_turns() -> None:
    prompt = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: and? \n\nAssistant: "
    assert conversations({**NECTAR, "prompt": prompt})[0] == [*HI, assistant("yes"), user("and?"), *A]


def test_every_chosen_response_is_better_than_every_rejected_one() -> None:
    for chosen, rejected in ((["a", "b"], ["c"]), (json.dumps(["a", "b"]), '["c"]'), ([A, B], [[assistant("c")]])):
        group = read_one({"prompt": "hi", "chosen": chosen, "rejected": rejected})
        assert group.responses == [A, B, [assistant("c")]]
        assert order(group) == [(0, 2), (1, 2)]


def test_consecutive_rows_of_helpsteer2_are_one_group() -> None:
    prompts, scores = ["p", "p", "q", "r", "r", "r", "s", "s"], [4, 1, 3, 2, 0, 2, 1, 1]
    rows = [
        {"prompt": prompt, "response": f"{place}", "helpfulness": score, "verbosity": 9 - score}
        for place, (prompt, score) in enumerate(zip(prompts, scores, strict=True))
    ]
    groups, dropped = read(*rows)
    assert [(group.where, order(group)) for group in groups] == [
        ("a.parquet:0", [(0, 1)]),
        ("a.parquet:3", [(0, 1), (2, 1)]),
    ]
    assert groups[0].comparisons[0].margin == 3
    assert dropped.counts == {
        "one response to a prompt that the next row does not repeat": 1, "all helpfulness of a prompt equal": 1
    }  # fmt: skip
    verbose, _ = read(*rows, helpfulness="verbosity")
    assert order(verbose[0]) == [(1, 0)]


def test_rows_of_helpsteer2_in_another_order_are_an_error() -> None:
    rows = [{"prompt": prompt, "response": "a", "helpfulness": 1} for prompt in "pqpq"]
    with pytest.raises(
        UserError, match=r"no two consecutive rows have the same prompt; sort .*docs/custom-datasets\.md"
    ):
        read(*rows)


def test_lists_of_distilabel_have_ratings() -> None:
    row = {"instruction": "hi", "generations": ["a", "b"], "ratings": [1.0, 4.5]}
    assert order(read_one(row)) == [(1, 0)]


def refused(*rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(UserError) as error:
        read(*rows, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("row", "keys", "label"),
    [
        (PKU, ("response_0", "response_1"), "better_response_id"),
        (SHP, ("human_ref_A", "human_ref_B"), "labels"),
        (ARENA, ("conversation_a", "conversation_b"), "winner"),
        ({"p": "hi", "answer 1": "a", "answer 2": "b", "my_label": "2"}, ("answer 1", "answer 2"), "my_label"),
        ({"left": "a", "right": "b", "preferred": True}, ("right", "left"), "preferred"),
        ({"answer_0": "a", "answer_1": "b", "score_0": 0.5, "score_1": -0.5}, ("answer_0", "answer_1"), "score_0"),
    ],
)
def test_sides_are_not_chosen_and_rejected_beside_a_label(row: dict[str, Any], keys: Any, label: str) -> None:
    sentence = refused(row, chosen_key=keys[0], rejected_key=keys[1])
    assert f"data.chosen_key={keys[0]} and data.rejected_key={keys[1]} are the two sides of a comparison" in sentence
    assert label in sentence
    bare = {key: value for key, value in row.items() if key in keys}
    assert len(read(bare, chosen_key=keys[0], rejected_key=keys[1])[0]) == 1


def test_names_of_sides_in_the_columns_of_a_pair_are_labels() -> None:
    row = {"prompt": "hi", "response_a": "yes", "response_b": "no", "chosen": "A"}
    assert "which response is better seems to be in chosen, so no two columns are" in refused(row)
    assert "seems to be in chosen" in refused(row, chosen_key="response_a", rejected_key="response_b")
    named = {**row, "chosen": "response_a", "rejected": "response_b"}
    assert refused(named).startswith("a.parquet: chosen and rejected hold names of columns, not responses; see docs/")


def test_columns_whose_names_say_which_is_better_stand_beside_a_label() -> None:
    row = {"prompt": "hi", "better": "a", "worse": "b", "label": 1}
    assert len(read(row, chosen_key="better", rejected_key="worse")[0]) == 1
    assert len(read({"prompt": "hi", "chosen": "a", "rejected": "b", "winner": "model_b"})[0]) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "answer_x": "a", "answer_y": "b", "preference": "x"},
        {"prompt": "hi", "response_x": "a", "response_y": "b", "winner_model_x": 1, "winner_model_y": 0},
        {"prompt": "hi", "completion": "a", "label": True},
        {"prompt": "hi", "response": "a", "label": False},
    ],
)
def test_an_error_about_columns_names_the_label_and_advises_no_mapping(row: dict[str, Any]) -> None:
    sentence = refused(row)
    assert next(name for name in row if "label" in name or "prefer" in name or "winner" in name) in sentence
    assert "docs/custom-datasets.md" in sentence
    assert "chosen_key" not in sentence
