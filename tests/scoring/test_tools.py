"""Tool definitions reach the chat template, whoever scores; the rewards are those of the library with these tools."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.cli import main
from rm_gallery.core.graders import GraderError
from rm_gallery.core.graders.common import RelevanceGrader, RewardModelGrader
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.core.runner import GradingRunner
from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from rm_gallery.scoring.inputs import InputBuilder

TEMPLATE = (
    "{%- for tool in tools or [] -%}{{- '[' + (tool | tojson) + ']' -}}{%- endfor -%}"
    "{%- for m in messages -%}{{- m.role + ': ' + (m.content or '') + '\\n' -}}{%- endfor -%}"
)
SCHEMA = {"type": "object", "properties": {"day": {"type": "string", "default": None}}}
TOOLS = [{"type": "function", "function": {"name": "book", "description": "Book a table", "parameters": SCHEMA}}]
OTHERS = [{"type": "function", "function": {"name": "add"}}]
CHAT = [{"role": "user", "content": "A table?"}, {"role": "assistant", "content": "Booked."}]
WORSE = [{"role": "assistant", "content": "No."}]


@pytest.fixture(scope="module")
def folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(chat_folder, tmp_path_factory.mktemp("tools") / "model"))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, float]:
    """The library's rewards of CHAT with TOOLS, with OTHERS and without, and of WORSE with TOOLS."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases: dict[str, tuple[Any, Any]] = {
        "tools": (CHAT, TOOLS), "others": (CHAT, OTHERS), "none": (CHAT, None), "worse": (CHAT[:1] + WORSE, TOOLS),
    }  # fmt: skip
    found = {}
    for name, (messages, tools) in cases.items():
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found[name] = network(input_ids=ids).logits[0, 0].item()
    assert len({round(reward, 3) for reward in found.values()}) == 4
    return found


def test_every_call_of_the_scorer_takes_tools(folder: Path, expected: dict[str, float]) -> None:
    close = lambda *names: pytest.approx([expected[name] for name in names], abs=1e-4)  # noqa: E731
    pair, row = (CHAT, CHAT[:1] + WORSE), {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": WORSE}
    with RewardScorer.from_folder(folder, device="cpu") as scorer:
        assert scorer.score_messages([CHAT, CHAT], tools=TOOLS) == close("tools", "tools")
        assert scorer.score_messages([CHAT, CHAT], tools=json.dumps(TOOLS)) == close("tools", "tools")
        assert scorer.score_messages([CHAT] * 3, tools=[TOOLS, None, OTHERS]) == close("tools", "none", "others")
        assert scorer.score_messages([CHAT] * 2, tools=[None, json.dumps(OTHERS)]) == close("none", "others")
        assert asyncio.run(scorer.ascore_messages([CHAT] * 2, tools=[TOOLS, []])) == close("tools", "none")
        for given, tools in ((pair, TOOLS), (row, [TOOLS]), ({**row, "tools": json.dumps(TOOLS)}, OTHERS)):
            assert list(scorer.score_pairs([given], tools=tools)[0]) == close("tools", "worse")
            assert list(asyncio.run(scorer.ascore_pairs([given], tools=tools))[0]) == close("tools", "worse")
        group = scorer.build_group("A table?", ["Booked.", "No."], TOOLS)
        assert scorer.score([group])[0] == close("tools", "worse")


def test_models_graders_and_runners_take_tools(folder: Path, expected: dict[str, float]) -> None:
    model = OpenAIChatModel(str(folder), is_local=True, device="cpu")
    assert model.chat(CHAT, tools=TOOLS).parsed["reward"] == pytest.approx(expected["tools"], abs=1e-4)
    sample = {"query": "A table?", "response": "Booked.", "tools": TOOLS}
    for grader in (RelevanceGrader(model), RewardModelGrader(model)):
        assert grader.evaluate(**sample).score == pytest.approx(expected["tools"], abs=1e-4)  # type: ignore[union-attr]
    several = RelevanceGrader(model).evaluate(**{**sample, "response": ["Booked.", "No."]})
    assert several.metadata["rewards"] == pytest.approx([expected["tools"], expected["worse"]], abs=1e-4)
    runner = GradingRunner({"reward": RewardModelGrader(model)}, show_progress=False)
    results = runner.run([sample, {**sample, "tools": None}, {**sample, "tools": [5]}])["reward"]
    assert [result.score for result in results[:2]] == pytest.approx([expected["tools"], expected["none"]], abs=1e-4)
    assert isinstance(results[2], GraderError) and "tools with a tool that is not a JSON object" in results[2].error


def test_files_with_tools_are_scored_with_them(folder: Path, expected: dict[str, float], in_tmp: Path) -> None:
    rows = [{"messages": CHAT, "tools": tools} for tools in (TOOLS, json.dumps(OTHERS), None)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", "--model", str(folder), "a.jsonl", "--output", "b.jsonl", "--device", "cpu"]) == 0
    rewards = [json.loads(line)["reward"] for line in Path("b.jsonl").read_text().splitlines()]
    assert rewards == pytest.approx([expected[name] for name in ("tools", "others", "none")], abs=1e-4)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (TOOLS[0], "tools is dict; pass a list of tool definitions"),
        (5, "tools is int; pass a list"),
        ([print], "tools has a function; pass its definition: transformers.utils.get_json_schema"),
        ([TOOLS], "tools has 1 lists for 2 conversations; pass one list of tools, or one per conversation"),
        ([*TOOLS, print], "tools cannot be read"),
        ([*TOOLS, "x"], "tools with a tool that is not a JSON object"),
        ([[5], None], "tools with a tool that is not a JSON object"),
        ("[{", "tools"),
        ([{"a": float("nan")}], "tools cannot be read"),
        ([{"a": "\ud800"}], "tools"),
    ],
)
def test_wrong_tools_end_in_one_sentence(chat_scorer: RewardScorer, tools: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        chat_scorer.score_messages([CHAT, CHAT], tools=tools)
    assert "\n" not in str(caught.value)


def test_tools_that_change_nothing_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    said = "tools are given, but the model's input has none"
    for inputs in (InputBuilder("text"), InputBuilder("chat", reads_tools=False)):
        with caplog.at_level(logging.WARNING):
            inputs.conversation(CHAT, TOOLS)
            group = inputs.pair({"prompt": "a", "chosen": "b", "rejected": "c", "tools": TOOLS})
        assert caplog.text.count(said) == 1 and group.metadata == {"tools": TOOLS}
        caplog.clear()
    kept = PreferenceGroup([{"role": "user", "content": "a"}], [WORSE], style="chat", where="a:1", source="s")
    fitted = InputBuilder("text").fit(kept)
    assert (fitted.where, fitted.source) == ("a:1", "s"), "the place of the row is kept"


def test_calls_of_the_wrong_kind_show_the_right_one(chat_scorer: RewardScorer) -> None:
    group = chat_scorer.build_group("a", ["b"])
    calls: list[tuple[Any, Any, str]] = [
        (chat_scorer.score, ["hello"], r"score takes a list of PreferenceGroup, not str: build one with scorer.build"),
        (chat_scorer.score, None, r"score takes a list of PreferenceGroup, not NoneType"),
        (chat_scorer.score, ["hello"], r'e\.g\. score\(\[scorer\.build_group\("Why\?", \["Because\."\]\)\]\), or call'),
        (chat_scorer.score, "hello", r"score takes a list of PreferenceGroup, not str"),
        (chat_scorer.score, CHAT, r"score takes a list of PreferenceGroup, not dict"),
        (chat_scorer.score, group, r"score takes a list of groups; for one group, score\(\[group\]\)"),
        (chat_scorer.score_each, [None], r"not NoneType"),
        (chat_scorer.score_messages, CHAT, r"not one message; for one conversation, score_messages\(\[\["),
        (chat_scorer.score_messages, "hello", r"not text; for one"),
        (chat_scorer.score_messages, ["hello"], r"not text; for one"),
        (chat_scorer.score_messages, [group], r"not a group"),
        (chat_scorer.score_pairs, ("a", "b"), r"score_pairs takes a list of pairs; for one pair, score_pairs\(\[pair"),
        (chat_scorer.score_pairs, {"chosen": "a", "rejected": "b"}, r"score_pairs takes a list of pairs"),
        (chat_scorer.score_pairs, ["a"], r"a pair is \(chosen, rejected\)"),
        (chat_scorer.score_pairs, [5], r"a pair is \(chosen, rejected\)"),
    ]
    for call, value, message in calls:
        with pytest.raises(UserError, match=message):
            call(value)
    assert chat_scorer.score_messages(iter([CHAT])) == chat_scorer.score_messages([CHAT])  # type: ignore[arg-type]
