"""What the model reads: the input of its training, whatever a query and its responses are given as."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from rm_gallery.scoring.inputs import InputBuilder

QUERY = "Why is the sky blue?"
TURNS = [{"role": "user", "content": QUERY}]
ANSWER = {"role": "assistant", "content": "Air."}


def texts(group: PreferenceGroup) -> list[str]:
    assert group.style == "text"
    return [f"{group.prompt}{response}" for response in group.responses]


def conversations(group: PreferenceGroup) -> list[list[Any]]:
    assert group.style == "chat"
    return [[*group.prompt, *response] for response in group.responses]


@pytest.mark.parametrize("query", [QUERY, TURNS])
@pytest.mark.parametrize("response", ["Air.", ANSWER, [ANSWER], [*TURNS, ANSWER]])
def test_a_chat_model_gets_the_same_turns_however_they_are_given(query: Any, response: Any) -> None:
    assert conversations(InputBuilder("chat").group(query, [response])) == [[*TURNS, ANSWER]]


@pytest.mark.parametrize("query", [QUERY, TURNS])
@pytest.mark.parametrize("response", ["Air.", [ANSWER], [*TURNS, ANSWER]])
def test_a_text_model_gets_turns_joined_by_a_blank_line(query: Any, response: Any) -> None:
    assert texts(InputBuilder("text").group(query, [response])) == [f"{QUERY}\n\nAir."]


@pytest.mark.parametrize("separator", ["\n\n", ""])
def test_turns_are_joined_as_the_exported_chat_template_joins_them(separator: str) -> None:
    from rm_gallery.modeling.export import text_template
    from tests.small import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = text_template(separator)
    rendered = tokenizer.apply_chat_template([*TURNS, ANSWER, *TURNS], tokenize=False)
    assert [rendered] == texts(InputBuilder("text", separator).group([*TURNS, ANSWER], [TURNS]))


@pytest.mark.parametrize("query", [None, "", []])
def test_without_a_query_a_text_model_gets_the_response_alone(query: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert texts(InputBuilder("text").group(query, ["a", ""])) == ["a", ""]
    assert caplog.text == ""


def test_a_text_model_says_once_what_it_does_with_a_query(caplog: pytest.LogCaptureFixture) -> None:
    inputs = InputBuilder("text")
    for _ in range(3):
        inputs.group(QUERY, ["a", "b"])
    assert caplog.text.count("joined by a blank line") == 1


def test_pairs_are_read_as_in_training() -> None:
    pair = {"prompt": "Q: ", "chosen": "a", "rejected": "b"}
    assert texts(InputBuilder("text").pair(pair)) == ["Q: a", "Q: b"]
    assert texts(InputBuilder("text").pair(("a", "b"))) == ["a", "b"]
    assert conversations(InputBuilder("chat").pair({**pair, "prompt": QUERY}))[0] == [
        *TURNS,
        {"role": "assistant", "content": "a"},
    ]


def test_a_pair_of_single_messages_is_read_as_in_training() -> None:
    other = {"role": "assistant", "content": "Water."}
    pair = InputBuilder("chat").pair({"prompt": TURNS[0], "chosen": ANSWER, "rejected": other})
    assert conversations(pair) == [[*TURNS, ANSWER], [*TURNS, other]]
    for turns in (ANSWER, [*TURNS, ANSWER]):  # one response in place of a list of responses
        with pytest.raises(UserError, match=r"pass (a list of responses|each response as a list of messages)"):
            InputBuilder("chat").group(QUERY, turns)


def test_group_pair_and_conversation_of_one_text_have_one_reward(
    chat_scorer: RewardScorer, text_scorer: RewardScorer
) -> None:
    for scorer in (chat_scorer, text_scorer):
        (first, second), (again,) = scorer.score(
            [scorer.build_group(QUERY, ["Air.", "Water."]), scorer.build_group(TURNS, [[ANSWER]])]
        )
        assert again == pytest.approx(first, abs=1e-4)
        assert scorer.score_messages([[*TURNS, ANSWER]]) == pytest.approx([first], abs=1e-4)
        pair = {"prompt": TURNS, "chosen": "Air.", "rejected": "Water."}
        assert scorer.score_pairs([pair])[0] == pytest.approx((first, second), abs=1e-4)


def test_a_chat_group_for_a_text_model_is_turned_into_text(text_scorer: RewardScorer) -> None:
    chat, text = PreferenceGroup(TURNS, [[ANSWER]], style="chat"), PreferenceGroup("", [f"{QUERY}\n\nAir."])
    assert text_scorer.score([chat])[0] == pytest.approx(text_scorer.score([text])[0], abs=1e-4)


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ("abc", "responses is a text"),
        ([None], "response 0 is NoneType"),
        (["a", 3], "response 1 is int"),
        ([[{"content": "a"}]], "response 0 has a message without a role"),
        ([{"content": "a"}], "response 0 is dict"),
    ],
)
@pytest.mark.parametrize("style", ["text", "chat"])
def test_wrong_types_end_in_one_sentence(style: Any, responses: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        InputBuilder(style).group(QUERY, responses)


@pytest.mark.parametrize("pair", [{"chosen": "a"}, ("a",), "ab", {"chosen": "a", "rejected": None}])
def test_wrong_pairs_end_in_one_sentence(pair: Any) -> None:
    with pytest.raises(UserError):
        InputBuilder("text").pair(pair)


def test_parts_of_a_message_are_read_when_they_are_text() -> None:
    parts = [{"type": "text", "text": "Air"}, {"type": "text", "text": "."}]
    assert (
        texts(InputBuilder("text").conversation([{"role": "user", "content": parts}]))
        == InputBuilder("text").group(None, ["Air."]).responses
    )
    chat = InputBuilder("chat").conversation([{"role": "user", "content": parts}])
    assert conversations(chat) == [[{"role": "user", "content": "Air."}]]
    with pytest.raises(UserError, match="content other than text"):
        InputBuilder("text").conversation([{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    ("page", "heading"), [("docs/scoring.md", "## Python"), ("README.md", "## Use a trained model")]
)
def test_the_lines_of_a_page_run_as_written(page: str, heading: str, in_tmp: Path, chat_folder: Path) -> None:
    (in_tmp / "checkpoints/bt/my-rm").mkdir(parents=True)
    (in_tmp / "checkpoints/bt/my-rm/global_step_500").symlink_to(chat_folder)
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8").partition(heading)[2]
    [block, *_] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, page, "exec"), {})
