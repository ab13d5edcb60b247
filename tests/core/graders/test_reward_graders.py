"""Graders with a reward model: the score is the reward, whoever asks for it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.core.graders import GraderError, GraderRank, GraderScore, LLMGrader
from rm_gallery.core.graders.common import CorrectnessGrader, RelevanceGrader, RewardModelGrader
from rm_gallery.core.graders.reward import places, win_probabilities
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.scorer import RewardScorer
from tests.core.reward_folders import make_reward_folder, plain_rewards

SAMPLES = [("What is 2 + 2?", "It is 4."), ("Hello", "so " * 30), ("Name a fruit. " * 9, "Apple"), ("Hello", "")]


@pytest.fixture(scope="module", params=["chat", "text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_folder(tmp_path_factory.mktemp("reward"), request.param)


def turns(query: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": query}, {"role": "assistant", "content": response}]


def texts_of(folder: Path) -> list[list[dict[str, str]]]:
    """What plain transformers must be given to read the same tokens."""
    return [turns(query, response) for query, response in SAMPLES]


def test_one_text_has_one_reward(folder: Path) -> None:
    """Plain transformers, the scorer, the chat model and a grader; alone and with neighbours."""
    plain = plain_text_rewards(folder)
    model = OpenAIChatModel(str(folder), is_local=True)
    grader = RelevanceGrader(model=model)
    scorer = RewardScorer.from_folder(folder)
    assert scorer.score_messages([turns(*sample) for sample in SAMPLES]) == pytest.approx(plain, abs=1e-4)
    alone = [scorer.score([scorer.build_group(query, [response])])[0][0] for query, response in SAMPLES]
    assert alone == pytest.approx(plain, abs=1e-4)
    assert [model.chat(turns(*sample)).parsed["reward"] for sample in SAMPLES] == pytest.approx(plain, abs=1e-4)

    async def together() -> list[Any]:
        return await asyncio.gather(*(grader.aevaluate(query=q, response=r) for q, r in SAMPLES * 5))

    results = asyncio.run(together())
    assert [result.score for result in results] == pytest.approx(plain * 5, abs=1e-4)
    assert all(result.metadata == {"reward": result.score} and result.reason == "" for result in results)


def plain_text_rewards(folder: Path) -> list[float]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rm_gallery.modeling.export import read_record

    record = read_record(folder)
    assert record is not None
    if record.input_style == "chat":
        return plain_rewards(folder, texts_of(folder))
    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [
            network(**tokenizer(f"{query}\n\n{response}", return_tensors="pt", return_token_type_ids=False))
            .logits[0, 0]
            .item()
            for query, response in SAMPLES
        ]


def test_several_responses_get_places_rewards_and_win_probabilities(folder: Path) -> None:
    model = OpenAIChatModel(str(folder), is_local=True)
    responses = ["good", "bad", "so so"]
    each = [RelevanceGrader(model).evaluate(query="How?", response=response) for response in responses]
    rewards = [result.score for result in each if isinstance(result, GraderScore)]
    for grader in (RelevanceGrader(model), RelevanceGrader(model, mode="listwise"), RewardModelGrader(model)):
        result = grader.evaluate(query="How?", response=responses)
        assert isinstance(result, GraderRank)
        assert result.metadata["rewards"] == pytest.approx(rewards, abs=1e-4)
        assert sum(result.metadata["win_probabilities"]) == pytest.approx(1)
        assert result.rank == [sorted(rewards, reverse=True).index(reward) + 1 for reward in rewards]


def test_win_probabilities_are_bradley_terry_for_two() -> None:
    [better, worse] = win_probabilities([1.25, -0.5])
    assert better == pytest.approx(1 / (1 + math.exp(-1.75))) and worse == pytest.approx(1 - better)
    assert win_probabilities([1e4, 0.0]) == [1.0, 0.0], "no overflow"
    assert win_probabilities([3.0]) == [1.0]


def test_equal_rewards_share_the_better_place() -> None:
    assert places([0.5, 2.0, 0.5, -1.0]) == [2, 1, 2, 4]


class FixedScorer:
    """Any object with `ascore` is a reward model."""

    def __init__(self, reward: float) -> None:
        self.reward = reward
        self.seen: list[PreferenceGroup] = []

    async def ascore(self, groups: Sequence[PreferenceGroup]) -> list[list[float]]:
        self.seen += groups
        return [[self.reward] * len(group.responses) for group in groups]


def test_any_object_with_ascore_scores() -> None:
    scorer = FixedScorer(0.25)
    result = LLMGrader(scorer, "own").evaluate(query="q", response="r")
    assert isinstance(result, GraderScore) and (result.name, result.score) == ("own", 0.25)
    assert list(scorer.seen[0].prompt) == [{"role": "user", "content": "q"}]


def test_context_goes_before_the_query_and_the_reference_is_left_out() -> None:
    scorer = FixedScorer(0.25)
    result = CorrectnessGrader(scorer).evaluate(query="q", response="r", context="c", reference_response="x")
    assert isinstance(result, GraderScore) and result.metadata["not_used"] == ["reference_response"]
    assert list(scorer.seen[0].prompt) == [{"role": "user", "content": "c\n\nq"}]


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_a_grader_error(reward: float) -> None:
    result = RelevanceGrader(FixedScorer(reward)).evaluate(query="q", response="r")
    assert isinstance(result, GraderError) and result.error.startswith(f"the model returned the reward {reward}")


def test_a_missing_query_is_an_error_but_not_for_the_reward_itself(folder: Path) -> None:
    model = OpenAIChatModel(str(folder), is_local=True)
    missing = RelevanceGrader(model).evaluate(response="r")
    assert isinstance(missing, GraderError) and missing.error.startswith("query is missing")
    assert isinstance(RewardModelGrader(model).evaluate(response="r"), GraderScore)
    assert isinstance(RewardModelGrader(str(folder)).evaluate(response=turns("q", "r")), GraderScore)


def test_bad_input_to_a_reward_model_is_one_sentence(folder: Path) -> None:
    grader = RelevanceGrader(OpenAIChatModel(str(folder), is_local=True))
    for query, response in ((5, "r"), ("q", 5), ("q", [None, "r"]), ("q", {"role": "user", "content": "r"})):
        result = grader.evaluate(query=query, response=response)
        assert isinstance(result, GraderError) and "\n" not in result.error, result
