"""One text, one reward: trainer, scorer, plain transformers and pipeline, any batch size, any neighbours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import split_prefix
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from tests.scoring.models import make_checkpoint, make_classifier, plain_rewards
from tests.small import make_tokenizer, text_pairs

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
PAIRS = text_pairs(12)
TEXTS = [row[side] for row in PAIRS for side in ("chosen", "rejected")] + ["x"]
GROUPS = [PreferenceGroup("", [row["chosen"], row["rejected"]]) for row in PAIRS] + [PreferenceGroup("", ["x"])]


@pytest.fixture(scope="module", params=["qwen2", "gemma3_text", "deberta-v2", "roberta"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RewardModel]:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def flat(rewards: list[list[float]]) -> list[float]:
    return [reward for each in rewards for reward in each]


def test_trainer_scorer_transformers_and_pipeline_agree(trained: tuple[Path, RewardModel]) -> None:
    from transformers import pipeline

    folder, model = trained
    expected = plain_rewards(folder, TEXTS)
    ids = make_tokenizer(encoder=model.padded)(TEXTS)["input_ids"]
    with torch.no_grad():
        packed = model(collate([split_prefix(ids[i : i + 2], ()) for i in range(0, len(ids), 2)]))
    assert packed.tolist() == pytest.approx(expected, abs=TOLERANCE)
    scorer = RewardScorer.from_folder(folder, device="cpu")
    assert flat(scorer.score(GROUPS)) == pytest.approx(expected, abs=TOLERANCE)
    classify = pipeline("text-classification", model=str(folder), dtype=torch.float32, device="cpu")
    found = classify(TEXTS, function_to_apply="none", batch_size=4, padding=True)
    assert [answer["score"] for answer in found] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("token_budget", [1, 300, 100_000])
def test_rewards_do_not_depend_on_pack_size_order_or_neighbours(
    trained: tuple[Path, RewardModel], token_budget: int
) -> None:
    scorer = RewardScorer.from_folder(trained[0], device="cpu", token_budget=token_budget)
    expected = dict(zip(TEXTS, plain_rewards(trained[0], TEXTS), strict=True))
    draw = random.Random(token_budget)
    texts = draw.choices(TEXTS, k=40)
    groups = [PreferenceGroup("", texts[i : i + draw.choice((1, 3, 7))]) for i in range(0, 40, 4)]
    for group, rewards in zip(groups, scorer.score(groups), strict=True):
        assert rewards == pytest.approx([expected[text] for text in group.responses], abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "qwen3_moe", "falcon"])
def test_other_architectures_go_through_the_library_as_they_are(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}, "gpt2": {}, "falcon": {},
             "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                           "moe_intermediate_size": 16}}  # fmt: skip
    folder = make_classifier(kind, tmp_path / "model", **extra[kind])
    expected = dict(zip(TEXTS, plain_rewards(folder, TEXTS), strict=True))
    with caplog.at_level("INFO", logger="rm_gallery"):
        scorer = RewardScorer.from_folder(folder, device="cpu", token_budget=400)
    way = "padded: packed rewards of a small falcon" if kind == "falcon" else "packed with transformers' layers"
    assert way in caplog.text and "one text at a time" in caplog.text
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    for texts in ([[text] for text in TEXTS], [shuffled], [shuffled[:5], shuffled[2:4], TEXTS]):
        rewards = scorer.score([PreferenceGroup("", each) for each in texts])
        for each, found in zip(texts, rewards, strict=True):
            assert found == pytest.approx([expected[text] for text in each], abs=TOLERANCE)


def test_a_group_larger_than_a_pack_is_cut_and_put_together_again(text_folder: Path) -> None:
    group = PreferenceGroup("A long common prompt. " * 5, TEXTS)
    whole = RewardScorer.from_folder(text_folder, device="cpu")
    small = RewardScorer.from_folder(text_folder, device="cpu", token_budget=300)
    assert small.score([group])[0] == pytest.approx(whole.score([group])[0], abs=TOLERANCE)
    assert (whole.engine.num_packs, small.engine.num_packs > 5) == (1, True)


def test_nothing_gives_nothing(text_scorer: RewardScorer) -> None:
    assert text_scorer.score([]) == []
    assert text_scorer.score([PreferenceGroup("a", []), PreferenceGroup("", ["b"])])[0] == []
    assert text_scorer.engine.num_packs == 1


def test_bfloat16_gives_nearly_the_same_rewards(text_folder: Path) -> None:
    exact = flat(RewardScorer.from_folder(text_folder, device="cpu").score(GROUPS))
    rounded = flat(RewardScorer.from_folder(text_folder, device="cpu", dtype="bf16").score(GROUPS))
    assert rounded == pytest.approx(exact, abs=0.2)
    assert rounded != exact
